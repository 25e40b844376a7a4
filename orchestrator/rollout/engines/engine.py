"""What an engine is: requests in, completions out, weights replaced in place."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from orchestrator.core.batches import Ints
from orchestrator.core.rollouts import Completion, Sampling
from orchestrator.models.weight_buckets import Bucket, Entry


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and the seeds of its samples. position: tokens the seeds have drawn before (multi-turn);
    room: tokens each sample may still draw."""

    prompt: Ints
    seeds: tuple[int, ...]
    room: int
    position: int = 0


class Decoder(Protocol):
    """Samples completions for requests with weights that are already in place."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Completion, ...]]: ...


class GenerationEngine(Decoder, Protocol):
    """Decodes with one model whose weights can be replaced in place.

    Every log-prob it returns is the policy's, over the whole vocabulary at the temperature, whatever top-k,
    top-p and min-p left out.
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

    def close(self) -> None: ...


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a sequence: the tokenizer's eos and those of the model's generation config."""
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = more if isinstance(more, list) else [more] if more is not None else []
    return list(dict.fromkeys([tokenizer.eos_token_id, *listed]))
