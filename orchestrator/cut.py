"""Cuts one optimizer step into micro-batches: same step, whatever the cut.

    groups --sort by length--> micro-batches within the budget --balance--> ranks x the same number

Every rank gets the same number of micro-batches, with a zero-weight one where data runs out: ZeRO-3 hangs otherwise.
"""

import heapq
from collections.abc import Sequence

from orchestrator.data.packing import cost, filler, pack
from orchestrator.records import Cut, LossUnits, PackedBatch, SequenceGroup


def loss_units(groups: Sequence[SequenceGroup]) -> LossUnits:
    """The global counts that loss sums of these groups are divided by."""
    branches = len(groups[0].branches)
    return LossUnits(len(groups), tuple(sum(int(g.branches[k].scored.sum()) for g in groups) for k in range(branches)))


def cut_step(groups: Sequence[SequenceGroup], cut: Cut) -> PackedBatch:
    """One PackedBatch from the examples of one optimizer step, the same for the same groups and cut."""
    dealt = shares(groups, cut)
    count = max(len(share) for share in dealt)
    ranks = []
    for share in dealt:
        packed = [pack(chunk, cut.layout, one_row=cut.one_row) for chunk in share]
        packed += [filler(groups, cut.layout, one_row=cut.one_row)] * (count - len(packed))
        ranks.append(tuple(packed))
    return PackedBatch(tuple(groups), tuple(ranks), loss_units(groups))


def shares(groups: Sequence[SequenceGroup], cut: Cut) -> list[list[list[SequenceGroup]]]:
    """Examples by rank and micro-batch, without the rows that `cut_step` makes of them."""
    return _deal(_even(_chunks(groups, cut), cut.workers), cut)


def _chunks(groups: Sequence[SequenceGroup], cut: Cut) -> list[list[SequenceGroup]]:
    """Runs of similar length, longest first, each within the cut's budget (a single group may exceed it)."""
    ordered = sorted(groups, key=lambda g: (-g.longest, -g.tokens, g.id))
    chunks: list[list[SequenceGroup]] = []
    for group in ordered:
        if chunks and _fits([*chunks[-1], group], cut):
            chunks[-1].append(group)
        else:
            chunks.append([group])
    return chunks


def _fits(chunk: list[SequenceGroup], cut: Cut) -> bool:
    if cut.examples is not None:
        return len(chunk) <= cut.examples
    assert cut.positions is not None, "a Cut has a budget in examples or in positions"
    return cost(chunk, cut.layout, one_row=cut.one_row) <= cut.positions


def _even(chunks: list[list[SequenceGroup]], workers: int) -> list[list[SequenceGroup]]:
    """Splits the largest chunks until every rank can have the same number: cheaper than idle fillers."""
    chunks = list(chunks)
    while len(chunks) % workers and max(len(c) for c in chunks) > 1:
        largest = max(range(len(chunks)), key=lambda i: (len(chunks[i]), -i))
        chunk = chunks.pop(largest)
        middle = (len(chunk) + 1) // 2
        chunks += [chunk[:middle], chunk[middle:]]
    return chunks


def _deal(chunks: list[list[SequenceGroup]], cut: Cut) -> list[list[list[SequenceGroup]]]:
    """Largest chunk first to the least loaded rank that still has a free slot."""
    slots = -(-len(chunks) // cut.workers)
    dealt: list[list[list[SequenceGroup]]] = [[] for _ in range(cut.workers)]
    heap = [(0, rank) for rank in range(cut.workers)]
    for size, index in sorted(((cost(c, cut.layout, one_row=cut.one_row), i) for i, c in enumerate(chunks)), key=lambda p: (-p[0], p[1])):
        load, rank = heapq.heappop(heap)
        dealt[rank].append(chunks[index])
        if len(dealt[rank]) < slots:
            heapq.heappush(heap, (load + size, rank))
    return dealt


def micro_batches_per_worker(effective: int, cut: Cut) -> int | None:
    """Micro-batches a worker runs per step when the budget is in examples; None when lengths decide."""
    if cut.examples is None:
        return None
    return -(-effective // (cut.workers * cut.examples))
