"""The transformers engine: a model in this process, with the padded or the paged decoder."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from orchestrator.core.rollouts import Completion, Sampling
from orchestrator.models.load import load, placed
from orchestrator.models.precision import precision_of
from orchestrator.models.weight_buckets import Bucket, Entry, Receiver
from orchestrator.recipe.schema import Recipe, Rollouts
from orchestrator.rollout.engines.engine import Decoder, Request, end_tokens
from orchestrator.rollout.engines.padded_decoder import StaticDecoder
from orchestrator.rollout.engines.paged_decoder import (
    ContinuousBatchingFailed,
    ContinuousDecoder,
)


class TransformersEngine:
    """A transformers model in this process; `rollouts.batching` selects its decoder."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        loaded = load(recipe.model, seed=recipe.run.seed, head="lm", longest=recipe.data.max_length)
        model: Any = loaded.model
        self.model = (
            placed(model, device, precision_of(recipe.learners.precision).wire_dtype)
            .eval()
            .requires_grad_(False)
        )
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
        """Nothing to do: the model ends with the process."""


def make_decoder(cfg: Rollouts, model: Any, tokenizer: Any, device: torch.device) -> Decoder:
    """The decoder that `rollouts.batching` names.

    All decoders give the same tokens, but log-probs differ in their last bits. So `auto` looks at the device
    and never at a clock: a resumed run must decode as it did before.
    """
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
    return continuous


def _note(line: str) -> None:
    """Prints to the actor's log."""
    print(line, flush=True)
