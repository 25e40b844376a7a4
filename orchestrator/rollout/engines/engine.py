"""The Protocols of an engine: it turns requests into completions, and its weights are replaced in place."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from orchestrator.core.batches import Ints
from orchestrator.core.rollouts import Completion, Sampling
from orchestrator.models.weight_buckets import Bucket, Entry


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and the seeds of its samples."""

    prompt: Ints
    """Int[T]."""
    seeds: tuple[int, ...]
    """One 64-bit seed per sample."""
    tokens_left: int
    """Tokens that each sample may still draw."""
    position: int = 0
    """Tokens that the seeds have drawn already, in earlier turns of an episode."""


class Decoder(Protocol):
    """Samples completions for requests, with the weights that are in place."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Completion, ...]]: ...


class GenerationEngine(Decoder, Protocol):
    """Decodes with one model whose weights can be replaced in place.

    Every log-prob that it returns is the policy's: over the whole vocabulary at the temperature, whatever
    top-k, top-p and min-p leave out.
    """

    @property
    def version(self) -> int | None:
        """Version of the weights in place; None if there are none, or if they are damaged."""
        ...

    def load(self, version: int, buckets: Iterable[Bucket]) -> None:
        """Replaces the weights. CorruptWeights, with no version held, if a bucket is damaged."""
        ...

    def take(self, entries: Sequence[Entry], flat: torch.Tensor) -> None:
        """Takes one bucket of a version (broadcast, cuda_ipc); `commit` makes it the version held."""
        ...

    def commit(self, version: int | None) -> None:
        """Holds the buckets taken as `version`; None holds no version."""
        ...

    def close(self) -> None: ...


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a sequence: the tokenizer's eos and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured] if configured is not None else []
    return list(dict.fromkeys([tokenizer.eos_token_id, *listed]))
