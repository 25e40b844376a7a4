"""Cuts one optimizer step into micro-batches. No cut changes the step.

    groups --sort by length--> micro-batches within the budget --balance--> ranks x the same number
                                              ^                       |
                                              +-- a little smaller, if the ranks' work differs

Every rank gets the same number of micro-batches, if need be one with weight zero: else ZeRO-3 hangs.
"""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.core.batches import Cut, LossUnits, PackedBatch, SequenceGroup
from orchestrator.data.packing import cost, filler, pack

IMBALANCE = 0.03
"""Share of a step that ranks may wait for the one with most positions; beyond it the step is cut again."""
SMOOTH = 6
"""Micro-batches per rank from which on the ranks' work is equal enough."""


def loss_units(groups: Sequence[SequenceGroup]) -> LossUnits:
    """The global counts that the loss sums of these groups are divided by."""
    branches = len(groups[0].branches)
    return LossUnits(
        len(groups), tuple(sum(int(g.branches[k].loss_mask.sum()) for g in groups) for k in range(branches))
    )


def cut_step(groups: Sequence[SequenceGroup], cut: Cut) -> PackedBatch:
    """The PackedBatch of one optimizer step: a function of its groups and the cut."""
    dealt = shares(groups, cut)
    count = max(len(share) for share in dealt)
    ranks = []
    for share in dealt:
        packed = [pack(chunk, cut.layout, one_row=cut.one_row) for chunk in share]
        packed += [filler(groups, cut.layout, one_row=cut.one_row)] * (count - len(packed))
        ranks.append(tuple(packed))
    return PackedBatch(tuple(groups), tuple(ranks), loss_units(groups))


def shares(groups: Sequence[SequenceGroup], cut: Cut) -> list[list[list[SequenceGroup]]]:
    """Examples by rank and micro-batch, [rank][micro-batch][example].

    A few micro-batches as large as the budget leave the ranks unequal: by 17 % at three of them. Then smaller
    budgets are tried, with which the micro-batches are equal, and more of them, up to SMOOTH per rank.
    """
    ordered = sorted(groups, key=lambda g: (-g.longest, -g.tokens, g.id))
    chunks = _even(_chunks(ordered, cut), cut.workers)
    best = _deal(chunks, cut)
    if cut.positions is None:
        return best
    each = -(-len(chunks) // cut.workers)
    for count in range(each, max(each, SMOOTH) + 1):
        if _imbalance(best, cut) <= IMBALANCE:
            break
        even = replace(cut, positions=_smallest_budget(ordered, cut, count * cut.workers))
        best = min(
            best,
            _deal(_even(_chunks(ordered, even), cut.workers), cut),
            key=lambda dealt: _imbalance(dealt, cut),
        )
    return best


def positions_of(groups: Sequence[SequenceGroup], cut: Cut) -> int:
    """Positions that the model computes for these groups in one micro-batch of the cut."""
    return cost(groups, cut.layout, one_row=cut.one_row)


def _imbalance(dealt: list[list[list[SequenceGroup]]], cut: Cut) -> float:
    """Positions of the rank with most of them above the mean. Example: 0.03 for 3 %."""
    loads = [sum(positions_of(chunk, cut) for chunk in share) for share in dealt]
    return max(loads) * len(loads) / sum(loads) - 1.0


def _smallest_budget(ordered: Sequence[SequenceGroup], cut: Cut, count: int) -> int:
    """Positions of the smallest budget, at most the cut's, that needs `count` micro-batches or fewer."""
    assert cut.positions is not None
    low, high = 0, cut.positions
    while high - low > max(1, cut.positions // 256):
        middle = (low + high) // 2
        if len(_chunks(ordered, replace(cut, positions=middle))) <= count:
            high = middle
        else:
            low = middle
    return high


def _chunks(ordered: Sequence[SequenceGroup], cut: Cut) -> list[list[SequenceGroup]]:
    """Groups of similar length together, longest first, as many as the cut's budget allows.

    A single group may exceed the budget.
    """
    chunks: list[list[SequenceGroup]] = []
    start, total = 0, len(ordered)
    while start < total:
        end = start + 1
        while end < total and _fits(ordered[start : (twice := min(total, 2 * end - start))], cut):
            end = twice
        longer = range(end + 1, min(total + 1, 2 * end - start))  # bisected: each try costs the whole chunk
        end += bisect_left(longer, True, key=lambda stop: not _fits(ordered[start:stop], cut))
        chunks.append(list(ordered[start:end]))
        start = end
    return chunks


def _fits(chunk: Sequence[SequenceGroup], cut: Cut) -> bool:
    if cut.examples is not None:
        return len(chunk) <= cut.examples
    assert cut.positions is not None, "a Cut has a budget in examples or in positions"
    return positions_of(chunk, cut) <= cut.positions


def _even(chunks: list[list[SequenceGroup]], workers: int) -> list[list[SequenceGroup]]:
    """Splits the largest chunks until every rank can have the same number; idle fillers would cost more."""
    chunks = list(chunks)
    while len(chunks) % workers and max(len(c) for c in chunks) > 1:
        largest = max(range(len(chunks)), key=lambda i: (len(chunks[i]), -i))
        chunk = chunks.pop(largest)
        middle = (len(chunk) + 1) // 2
        chunks += [chunk[:middle], chunk[middle:]]
    return chunks


def _deal(chunks: list[list[SequenceGroup]], cut: Cut) -> list[list[list[SequenceGroup]]]:
    """Gives each chunk, the largest first, to the least loaded rank that has a free slot."""
    slots = -(-len(chunks) // cut.workers)
    dealt: list[list[list[SequenceGroup]]] = [[] for _ in range(cut.workers)]
    heap = [(0, rank) for rank in range(cut.workers)]
    for size, index in sorted(
        ((positions_of(c, cut), i) for i, c in enumerate(chunks)), key=lambda p: (-p[0], p[1])
    ):
        load, rank = heapq.heappop(heap)
        dealt[rank].append(chunks[index])
        if len(dealt[rank]) < slots:
            heapq.heappush(heap, (load + size, rank))
    return dealt


def micro_batches_per_worker(effective: int, cut: Cut) -> int | None:
    """Micro-batches of a worker per step; None if the budget is in positions, so that lengths decide."""
    if cut.examples is None:
        return None
    return -(-effective // (cut.workers * cut.examples))
