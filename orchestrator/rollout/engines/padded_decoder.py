"""Decodes a padded batch that is refilled while it decodes.

    requests --admit: prefill each prompt once, fork it for its samples--> rows of one left-padded batch
                 ^                                                             |
                 +---- rows end, the batch is compacted <-- one token per row --+

transformers' own `generate` repeats the prompt for every sample and keeps ended rows until the longest ends.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from orchestrator.core.batches import Finish
from orchestrator.core.errors import ConfigError
from orchestrator.core.rollouts import Completion, Sampling
from orchestrator.models.noise import words
from orchestrator.rollout.engines.engine import Request
from orchestrator.rollout.engines.sampling import Drawn, draw

COMPACT_AT = 0.25
"""Share of ended rows at which the batch is compacted; copying the cache costs more than a few idle rows."""
SPARE_TOKENS = 8
"""Tokens decoded beyond the longest stop text; some tokenizers lose a space at the start of a text."""


@dataclass(frozen=True, slots=True)
class StopCriteria:
    """What ends a completion: an eos token, a stop text, or its limit of tokens."""

    eos: frozenset[int]
    decode: Callable[[Sequence[int]], str]
    """Tokens -> text, special tokens included."""

    def finish(self, ids: Sequence[int], limit: int, stop: Sequence[str]) -> Finish | None:
        """Why a completion ends with the last of its tokens; None if it does not end yet."""
        if ids[-1] in self.eos or (stop and self._has_stop_text(ids, stop)):
            return "stop"
        return "length" if len(ids) >= limit else None

    def _has_stop_text(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        tokens = SPARE_TOKENS + max(len(text.encode()) for text in stop)  # no token is shorter than a byte
        tail = self.decode(ids[-tokens:])
        return any(text in tail for text in stop)


@dataclass(slots=True)
class _Row:
    """One sample that is being decoded."""

    request: int
    """Index of its request."""
    sample: int
    """Index among the request's samples."""
    limit: int
    """Tokens that it may draw."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    finish: Finish | None = None

    def completion(self) -> Completion:
        return as_completion(self.ids, self.logprobs, self.kept, self.finish)


class StaticDecoder:
    """Decodes requests with one model in this process."""

    def __init__(
        self, model: Any, eos: Sequence[int], rows: int, decode: Callable[[Sequence[int]], str]
    ) -> None:
        """`rows` sequences are decoded together; `eos` are the tokens that end a sequence.

        ConfigError if the model's cache holds more than keys and values.
        """
        self.model, self.rows, self.stops = model, rows, StopCriteria(frozenset(eos), decode)
        self.device = next(model.parameters()).device
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if getattr(model, "_is_stateful", False) or kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
            raise ConfigError(
                f"{type(model).__name__} keeps more than keys and values while it generates",
                why="rows of its cache cannot be forked and refilled",
                fix="set rollouts.engine=vllm",
            )

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Completion, ...]]:
        """The completions of each request, in order, each with the eos or stop text that ended it."""
        self.model.eval()
        done: list[list[Completion | None]] = [[None] * len(r.seeds) for r in requests]
        waiting = deque(range(len(requests)))
        batch = _Batch(self.device)
        while waiting or batch.rows:
            self._admit(batch, waiting, requests)
            self._draw(batch, sampling)
            for row in batch.rows:
                if row.finish is not None and done[row.request][row.sample] is None:
                    done[row.request][row.sample] = row.completion()
            alive = [i for i, row in enumerate(batch.rows) if row.finish is None]
            if not alive:
                batch = _Batch(self.device)
                continue
            if len(batch.rows) - len(alive) >= max(1, COMPACT_AT * len(batch.rows)):
                batch.keep(alive)
            self._forward(batch)
        return [tuple(c for c in completions if c is not None) for completions in done]

    def _admit(self, batch: "_Batch", waiting: deque[int], requests: Sequence[Request]) -> None:
        """Fills free rows once a quarter of them is free; each prefill interrupts all the other rows."""
        free = self.rows - len(batch.rows)
        if not waiting or (
            batch.rows and free < max(len(requests[waiting[0]].seeds), COMPACT_AT * self.rows)
        ):
            return
        admitted: list[int] = []
        while waiting and (not (admitted or batch.rows) or len(requests[waiting[0]].seeds) <= free):
            free -= len(requests[waiting[0]].seeds)
            admitted.append(waiting.popleft())
        chosen = [requests[i] for i in admitted]
        width = max(len(r.prompt) for r in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros(len(chosen), width, dtype=torch.long)
        for row, request in enumerate(chosen):
            ids[row, width - len(request.prompt) :] = torch.from_numpy(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        # Without the config sliding layers keep all keys, so that all layers are padded and compacted alike.
        cache = DynamicCache()
        logits = self._logits(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        forks = torch.tensor([len(r.seeds) for r in chosen], device=self.device)
        origin = torch.repeat_interleave(torch.arange(len(chosen), device=self.device), forks)
        rows = [
            _Row(i, k, r.tokens_left)
            for i, r in zip(admitted, chosen, strict=True)
            for k in range(len(r.seeds))
        ]
        seeds = torch.tensor([words(seed) for r in chosen for seed in r.seeds], device=self.device)
        positions = torch.tensor([r.position for r in chosen for _ in r.seeds], device=self.device)
        layers = [(keys[origin], values[origin]) for keys, values in map(_keys_values, cache.layers)]
        batch.add(rows, layers, mask[origin], logits[origin], seeds, positions)

    def _draw(self, batch: "_Batch", sampling: Sampling) -> None:
        """Draws the next token of each row, and notes which rows end with it."""
        drawn = draw(batch.logits, batch.seeds, batch.positions, sampling)
        batch.tokens, batch.positions = drawn.tokens, batch.positions + 1
        for row, token, logprob, kept in zip(batch.rows, *on_host(drawn), strict=True):
            if row.finish is not None:
                continue
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.kept.extend(kept)
            row.finish = self.stops.finish(row.ids, row.limit, sampling.stop)

    def _forward(self, batch: "_Batch") -> None:
        """Computes the logits after the tokens drawn last."""
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], 1)
        positions = batch.mask.sum(1, keepdim=True) - 1
        batch.logits = self._logits(batch.tokens[:, None], batch.mask, positions, batch.cache)

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


class _Batch:
    """R rows that decode together, left-padded to the same length T."""

    def __init__(self, device: torch.device) -> None:
        self.rows: list[_Row] = []
        self.cache = DynamicCache()
        """Keys and values Float[R, heads, T, d] of each layer."""
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=device)
        """Int[R, T], 0 for padding."""
        self.logits = torch.zeros(0, device=device)
        """Float[R, V], from which the next tokens are drawn."""
        self.tokens = torch.zeros(0, device=device)
        """Int[R], the tokens drawn last."""
        self.seeds = torch.zeros(0, device=device)
        """Int[R, 2], two 32-bit words each."""
        self.positions = torch.zeros(0, device=device)
        """Int[R], tokens that each seed has drawn so far."""

    def add(
        self,
        rows: list[_Row],
        layers: list[tuple[Tensor, Tensor]],
        mask: Tensor,
        logits: Tensor,
        seeds: Tensor,
        positions: Tensor,
    ) -> None:
        """Adds rows; old and new ones are padded on the left to the longer of the two."""
        if not self.rows:
            self.rows, self.mask, self.logits = rows, mask, logits
            self.seeds, self.positions = seeds, positions
            for index, (keys, values) in enumerate(layers):
                self.cache.update(keys, values, index)
            return
        width = max(self.mask.shape[1], mask.shape[1])
        for layer, added in zip(self.cache.layers, layers, strict=True):
            pairs = zip(_keys_values(layer), added, strict=True)
            _set(
                layer, *(torch.cat([pad_left(old, width, 2), pad_left(new, width, 2)]) for old, new in pairs)
            )
        self.mask = torch.cat([pad_left(self.mask, width, 1), pad_left(mask, width, 1)])
        self.rows = self.rows + rows
        self.logits, self.seeds = torch.cat([self.logits, logits]), torch.cat([self.seeds, seeds])
        self.positions = torch.cat([self.positions, positions])

    def keep(self, alive: list[int]) -> None:
        """Drops the other rows, and the columns that are padding in all rows that remain."""
        index = torch.tensor(alive, device=self.mask.device)
        self.rows = [self.rows[i] for i in alive]
        self.mask = self.mask[index]
        first = int(self.mask.argmax(1).min())
        self.mask = self.mask[:, first:]
        for layer in self.cache.layers:
            _set(layer, *(part[index, :, first:] for part in _keys_values(layer)))
        self.logits, self.seeds = self.logits[index], self.seeds[index]
        self.positions, self.tokens = self.positions[index], self.tokens[index]


def on_host(drawn: Drawn) -> tuple[list[int], list[float], list[list[float]]]:
    """Each row's token, log-prob, and a list with the log of its kept mass, which is empty if all is kept."""
    kept = [[] for _ in drawn.tokens] if drawn.kept is None else [[k] for k in drawn.kept.tolist()]
    return drawn.tokens.tolist(), drawn.logprobs.tolist(), kept


def as_completion(
    ids: list[int], logprobs: list[float], kept: list[float], finish: Finish | None
) -> Completion:
    """The arrays of a sample that has ended."""
    assert finish is not None and len(kept) in (0, len(ids))
    masses = np.array(kept, np.float32) if kept else None
    return Completion(np.array(ids, np.int64), np.array(logprobs, np.float32), finish, masses)


def _keys_values(layer: Any) -> tuple[Tensor, Tensor]:
    """Float[R, heads, T, d] each."""
    return layer.keys, layer.values


def _set(layer: Any, keys: Tensor, values: Tensor) -> None:
    layer.keys, layer.values = keys, values


def pad_left(values: Tensor, width: int, dim: int) -> Tensor:
    """Puts zeros in front until dimension `dim` has `width` entries."""
    missing = width - values.shape[dim]
    if not missing:
        return values
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values.new_zeros(shape), values], dim)
