"""The order of examples as a function of (seed, epoch, cursor in GLOBAL examples).

It does not depend on workers: a run that resumes on another world size sees the same examples in the same
order.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Generic, Literal, TypeVar

import numpy as np

Item = TypeVar("Item")


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size) from a counter-based generator with up to four numbers as its key."""
    words = np.array([*key, 0, 0, 0, 0][:4], np.uint64)
    packed = words[:2] ^ (words[2:] << np.uint64(32))
    return np.random.Generator(np.random.Philox(key=packed)).permutation(size)


class Order:
    """A weighted mixture of sources. sizes, weights: one per source; weight w: w passes per epoch.

    The permutations of a source, one after the other, are an endless sequence. In epoch e source s gives its
    next floor(w n (e+1)) - floor(w n e) items. The items of all sources are then shuffled together.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sizes, self.weights, self.seed = tuple(sizes), tuple(weights), seed
        self._offsets = np.cumsum([0, *self.sizes])
        self.epoch = lru_cache(maxsize=4)(self._epoch)

    def _epoch(self, epoch: int) -> np.ndarray:
        """Example indices of one epoch, in order."""
        drawn = [self._draw(s, epoch) for s in range(len(self.sizes))]
        items = np.concatenate(drawn)
        return items[permutation(len(items), self.seed, epoch, 0, 1)]

    def size(self, epoch: int) -> int:
        """Number of examples of an epoch."""
        return sum(last - first for first, last in (self._bounds(s, epoch) for s in range(len(self.sizes))))

    def _bounds(self, source: int, epoch: int) -> tuple[int, int]:
        items = self.weights[source] * self.sizes[source]
        return math.floor(items * epoch), math.floor(items * (epoch + 1))

    def _draw(self, source: int, epoch: int) -> np.ndarray:
        size = self.sizes[source]
        at = np.arange(*self._bounds(source, epoch))
        result = np.empty(len(at), np.int64)
        for lap in np.unique(at // size) if size else ():
            in_lap = at // size == lap
            result[in_lap] = permutation(size, self.seed, int(lap), source, 2)[at[in_lap] % size]
        return result + self._offsets[source]


class Batches(Generic[Item]):
    """Batches of `effective` examples (sequence groups, or prompts) at any cursor.

    cursor: GLOBAL examples consumed so far; the next cursor is cursor + len(batch).
    remainder: what becomes of the last partial batch of an epoch:

        drop   it is left out
        use    it is a smaller step, divided by its own count
        carry  examples of the next epoch fill it
    """

    def __init__(
        self, groups: Sequence[Item], order: Order, effective: int, remainder: Literal["drop", "use", "carry"]
    ) -> None:
        self.groups, self.order, self.effective, self.remainder = groups, order, effective, remainder

    def at(self, cursor: int) -> tuple[Item, ...]:
        """The batch that starts at `cursor`."""
        epoch, start = self._locate(cursor)
        indices = self._usable(epoch)[start : start + self.effective]
        while self.remainder == "carry" and len(indices) < self.effective:
            epoch += 1
            indices = np.concatenate([indices, self._usable(epoch)[: self.effective - len(indices)]])
        return tuple(self.groups[i] for i in indices)

    def steps_in(self, epochs: float) -> int:
        """Optimizer steps in `epochs` passes, at least one."""
        full = math.floor(epochs)
        sizes = [self._size(e) for e in range(full)]
        part = (epochs - full) * self._size(full)
        if self.remainder == "carry":
            return max(1, math.ceil((sum(sizes) + part) / self.effective - 1e-9))
        return max(
            1, sum(math.ceil(n / self.effective) for n in sizes) + math.ceil(part / self.effective - 1e-9)
        )

    def _locate(self, cursor: int) -> tuple[int, int]:
        epoch = 0
        while cursor >= (size := self._size(epoch)):
            cursor -= size
            epoch += 1
        return epoch, cursor

    def _usable(self, epoch: int) -> np.ndarray:
        return self.order.epoch(epoch)[: self._size(epoch)]

    def _size(self, epoch: int) -> int:
        size = self.order.size(epoch)
        if self.remainder == "drop" and size > self.effective:
            return size // self.effective * self.effective
        return size
