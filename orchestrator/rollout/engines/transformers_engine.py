"""What a rollout actor holds: a model, its weights by version, and the engine that decodes with it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from orchestrator.recipe.schema import Recipe, Rollouts
from orchestrator.core.rollouts import Completion, Prompt, RolloutGroup, Sampling
from orchestrator.models.weight_buckets import WIRE, Bucket, Entry, Receiver
from orchestrator.models.load import load, load_tokenizer, placed
from orchestrator.rollout.engines.paged_decoder import ContinuousBatchingFailed, ContinuousDecoder, MeasuredDecoder
from orchestrator.rollout.engines.padded_decoder import Request, StaticDecoder
from orchestrator.rollout.episodes import Decoder, Roller, load_environment


class GenerationEngine(Protocol):
    """Decodes with one model whose weights can be replaced in place.

    Every log-prob it returns is the policy's, over the whole vocabulary at the temperature, whatever top-k, top-p and min-p left out.
    """

    @property
    def version(self) -> int | None:
        """Of the weights that are in place; None where there are none, or damaged ones."""
        ...

    def load(self, version: int, buckets: Iterable[Bucket]) -> None:
        """Replaces the weights; CorruptWeights (and no version held) where a bucket is damaged."""
        ...

    def take(self, entries: Sequence[Entry], flat: torch.Tensor) -> None:
        """One bucket of a version under way (broadcast); `commit` makes it the version held."""
        ...

    def commit(self, version: int | None) -> None: ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Completion, ...]]: ...

    def close(self) -> None: ...


class TransformersEngine:
    """A transformers model in this process. batching: static (a refilled padded batch) or continuous (paged)."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        loaded = load(recipe.model, seed=recipe.run.seed, head="lm", longest=recipe.data.max_length)
        model: Any = loaded.model
        self.model = placed(model, device, WIRE[recipe.learners.precision]).eval().requires_grad_(False)
        self.tokenizer = loaded.tokenizer
        self.receiver = Receiver(self.model)
        self.decoder = make_decoder(recipe.rollouts, self.model, loaded.tokenizer, device)

    @property
    def version(self) -> int | None:
        return self.receiver.version

    def load(self, version: int, buckets: Iterable[Bucket]) -> None:
        self.receiver.load(version, buckets)

    def take(self, entries: Sequence[Entry], flat: torch.Tensor) -> None:
        self.receiver.version = None
        self.receiver.take(entries, flat)

    def commit(self, version: int | None) -> None:
        self.receiver.version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Completion, ...]]:
        return self.decoder.generate(requests, sampling)

    def close(self) -> None:
        """Nothing to end: the model goes with the process."""


def make_decoder(cfg: Rollouts, model: Any, tokenizer: Any, device: torch.device) -> Decoder:
    """The decoder that `rollouts.batching` names; all give the same tokens, but log-probs differ in their last bits. So auto
    looks at the device, never at a clock: a resumed run must decode as the one before it did."""
    decode: Callable[[Sequence[int]], str] = lambda ids: tokenizer.decode(ids)  # noqa: E731
    options: Any = (model, end_tokens(model, tokenizer), cfg.rows, decode)
    static = StaticDecoder(*options)
    if cfg.batching == "static" or (cfg.batching == "auto" and device.type == "cpu"):
        return static
    try:
        continuous = ContinuousDecoder(*options)
    except ContinuousBatchingFailed as error:
        if cfg.batching == "continuous":
            raise
        _note(f"rollouts.batching={cfg.batching}: static\n{error}")
        return static
    return MeasuredDecoder(static, continuous, note=_note) if cfg.batching == "measured" else continuous


def _note(line: str) -> None:
    """To the log of the actor."""
    print(line, flush=True)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a sequence: the tokenizer's eos and those of the model's generation config."""
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = more if isinstance(more, list) else [more] if more is not None else []
    return list(dict.fromkeys([tokenizer.eos_token_id, *listed]))


class RolloutWorker:
    """One actor's share: groups for prompts, with exactly the version that was asked for."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.engine: GenerationEngine = make_engine(recipe, device)
        environment = load_environment(recipe.rollouts.environment) if recipe.rollouts.environment else None
        self.roller = Roller(self.engine, load_tokenizer(recipe.model), environment, recipe.rollouts.max_turns, recipe.rewards.retries)

    def roll_out(self, work: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int) -> tuple[RolloutGroup, ...]:
        """A group for each (draw, prompt); the engine must hold `version`."""
        assert self.engine.version == version, f"the actor holds weights {self.engine.version}, not {version}"
        return self.roller.roll_out(work, sampling, version)


def make_engine(recipe: Recipe, device: torch.device) -> GenerationEngine:
    """The engine that the recipe names."""
    if recipe.rollouts.engine == "vllm":
        from orchestrator.rollout.engines.vllm_engine import VllmEngine  # an optional package, and slow to import

        return VllmEngine(recipe, device)
    return TransformersEngine(recipe, device)

