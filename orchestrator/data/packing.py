"""Rows a micro-batch is made of: padded, packed, or with the prompt stored once for its branches.

    prefix_shared   [prompt | chosen | rejected] [prompt | chosen | rejected] …   positions restart after each prompt
    packed          [prompt chosen] [prompt rejected] …                           several sequences in a row
    padded          [prompt chosen . . .]                                         one sequence a row

All three compute the same log-probs: a token sees the earlier tokens of its own sequence and nothing else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from orchestrator.core.batches import (
    ROW_MULTIPLE,
    SHORTEST_ROW,
    Bools,
    Branch,
    Experience,
    Floats,
    Ints,
    Layout,
    MicroBatch,
    SequenceGroup,
)

_WORD = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is laid down in one go: tokens of one segment. branch: Int[t]; owner: Int[t], as branch wherever
    the prompt lies (0: the prompt); branches: whose tokens, in the order they lie in."""

    ids: Ints
    positions: Ints
    branch: Ints
    owner: Ints
    loss_mask: Bools
    sequence: Ints
    previous: Ints
    last: tuple[tuple[int, int], ...]
    branches: tuple[Branch, ...]

    def __len__(self) -> int:
        return len(self.ids)


def pack(
    groups: Sequence[SequenceGroup],
    layout: Layout,
    *,
    row_tokens: int | None = None,
    one_row: bool = False,
    weight: float = 1.0,
) -> MicroBatch:
    """One MicroBatch holding `groups` in `layout`.

    row_tokens: length of a packed or prefix-shared row, default the longest piece, so that rows stay short
    (attention over one long row is slower than padding on a CPU). one_row: everything in a single row for
    block attention, which skips what tokens cannot see; its length is a multiple of ROW_MULTIPLE and at least
    SHORTEST_ROW.
    """
    branches = len(groups[0].branches)
    pieces = [p for index, group in enumerate(groups) for p in _pieces(group, index * branches, layout)]
    lengths = [len(p) for p in pieces]
    rows = [list(range(len(pieces)))] if one_row else _rows(lengths, layout, row_tokens)
    length = _single(lengths) if one_row else max(sum(lengths[i] for i in row) for row in rows)
    shape = (len(rows), length)
    ids, branch = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segment = np.full(shape, -1, np.int64)
    positions, identity = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    score_at, targets, sequence = [], [], []
    last_at = np.zeros(len(groups) * branches, np.int64)
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            piece = pieces[i]
            end, base = start + len(piece), r * length + start
            ids[r, start:end], positions[r, start:end] = piece.ids, piece.positions
            segment[r, start:end], branch[r, start:end] = i, piece.branch
            identity[r, start:end] = _identity(groups[int(piece.sequence[-1]) // branches].id, piece)
            score_at.append(base + piece.previous[piece.loss_mask])
            targets.append(piece.ids[piece.loss_mask])
            sequence.append(piece.sequence[piece.loss_mask])
            for which, at in piece.last:
                last_at[which] = base + at
            start = end
        if (
            layout == "padded"
        ):  # without a mask, transformers reads a position that does not count up as a new sequence
            positions[r, start:] = np.arange(start, length)
    return MicroBatch(
        layout=layout,
        input_ids=ids,
        position_ids=positions,
        segment=segment,
        branch=branch,
        score_at=np.concatenate(score_at),
        targets=np.concatenate(targets),
        sequence=np.concatenate(sequence),
        last_at=last_at,
        identity=identity,
        examples=np.array([g.id for g in groups], np.int64),
        branches=branches,
        one_row=one_row,
        unshared_tokens=sum(g.tokens for g in groups),
        weight=weight,
        source=np.array([g.source for g in groups], np.int64),
        label=_column([g.label for g in groups]),
        margin=_column([g.margin for g in groups]),
        experience=_experience([b.experience for row in rows for i in row for b in pieces[i].branches]),
    )


def filler(groups: Sequence[SequenceGroup], layout: Layout, *, one_row: bool = False) -> MicroBatch:
    """The cheapest micro-batch made of one of `groups`, with weight 0: it only keeps ranks in step."""
    return pack([min(groups, key=lambda g: (g.tokens, g.id))], layout, one_row=one_row, weight=0.0)


def cost(groups: Sequence[SequenceGroup], layout: Layout, *, one_row: bool = False) -> int:
    """Positions that the model computes for these groups in one micro-batch, padding included."""
    lengths = [n for g in groups for n in _lengths(g, layout)]
    if one_row:
        return _single(lengths)
    rows = _rows(lengths, layout, None)
    return len(rows) * max(sum(lengths[i] for i in row) for row in rows)


def _single(lengths: Sequence[int]) -> int:
    """Length of the single row that holds them all."""
    return max(SHORTEST_ROW, -(-sum(lengths) // ROW_MULTIPLE) * ROW_MULTIPLE)


def _lengths(group: SequenceGroup, layout: Layout) -> list[int]:
    if layout == "prefix_shared":
        return [group.shared_tokens]
    return [len(group.prompt) + len(b.ids) for b in group.branches]


def _rows(lengths: Sequence[int], layout: Layout, row_tokens: int | None) -> list[list[int]]:
    """First-fit decreasing into rows, longest first; padded rows hold one piece each."""
    if layout == "padded":
        return [[i] for i in range(len(lengths))]
    capacity = max(row_tokens or 0, max(lengths))
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, room in enumerate(free) if room >= lengths[i]), None)
        if row is None:
            rows.append([])
            free.append(capacity)
            row = len(rows) - 1
        rows[row].append(i)
        free[row] -= lengths[i]
    return sorted(rows, key=lambda row: -sum(lengths[i] for i in row))


def _pieces(group: SequenceGroup, first_sequence: int, layout: Layout) -> Iterator[_Piece]:
    if layout == "prefix_shared":
        yield _shared_piece(group, first_sequence)
        return
    for k, branch in enumerate(group.branches):
        size, prompt = len(group.prompt) + len(branch.ids), len(group.prompt)
        loss_mask = np.concatenate([np.zeros(prompt, np.bool_), branch.loss_mask])
        yield _Piece(
            ids=np.concatenate([group.prompt, branch.ids]),
            positions=np.arange(size),
            branch=np.zeros(size, np.int64),
            owner=np.where(np.arange(size) < prompt, 0, k + 1),
            loss_mask=loss_mask,
            sequence=np.full(size, first_sequence + k),
            previous=np.arange(size) - 1,
            last=((first_sequence + k, size - 1),),
            branches=(branch,),
        )


def _shared_piece(group: SequenceGroup, first_sequence: int) -> _Piece:
    prompt = len(group.prompt)
    sizes = [len(b.ids) for b in group.branches]
    starts = prompt + np.cumsum([0, *sizes])
    previous = np.arange(starts[-1]) - 1
    previous[starts[:-1][np.array(sizes) > 0]] = (
        prompt - 1
    )  # a branch's first token is predicted by the prompt's last
    owner = np.concatenate([np.zeros(prompt, np.int64), *(np.full(n, k + 1) for k, n in enumerate(sizes))])
    return _Piece(
        ids=np.concatenate([group.prompt, *(b.ids for b in group.branches)]),
        positions=np.concatenate([np.arange(prompt), *(np.arange(prompt, prompt + n) for n in sizes)]),
        branch=owner,
        owner=owner,
        loss_mask=np.concatenate([np.zeros(prompt, np.bool_), *(b.loss_mask for b in group.branches)]),
        sequence=np.concatenate(
            [np.zeros(prompt, np.int64), *(np.full(n, first_sequence + k) for k, n in enumerate(sizes))]
        ),
        previous=previous,
        last=tuple((first_sequence + k, int(starts[k + 1]) - 1) for k in range(len(sizes))),
        branches=group.branches,
    )


def _identity(example: int, piece: _Piece) -> Ints:
    """splitmix64 of (example, owner, position) of each token."""
    word = np.uint64(example * 0x9E37_79B9_7F4A_7C15 & _WORD)  # products wrap, here and below
    word = (
        word
        + piece.owner.astype(np.uint64) * np.uint64(0xC2B2_AE3D_27D4_EB4F)
        + piece.positions.astype(np.uint64)
    )
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return (word ^ (word >> np.uint64(31))).view(np.int64)


def _column(values: Sequence[float | None]) -> Floats | None:
    present = [v for v in values if v is not None]
    if not present:
        return None
    assert len(present) == len(values), "a column is given for some examples of a step and not for others"
    return np.array(present, np.float32)


def _experience(parts: Sequence[Experience | None]) -> Experience | None:
    """The columns of all branches one after the other: the order of the scored tokens."""
    present = [p for p in parts if p is not None]
    if not present:
        return None
    assert len(present) == len(parts), "some branches of a micro-batch are rollouts and some are not"

    def joined(name: str) -> Floats | None:
        columns = [getattr(p, name) for p in present]
        assert all((c is None) == (columns[0] is None) for c in columns), (
            f"{name} is given for some rollouts of a step and not for others"
        )
        return None if columns[0] is None else np.concatenate(columns)

    return Experience(**{f.name: joined(f.name) for f in fields(Experience)})  # pyright: ignore[reportArgumentType]


def by_branch(micro_batch: MicroBatch, values: Floats) -> list[tuple[Floats, ...]]:
    """Splits Float[N] values of the scored tokens by example and branch: [example][branch]: Float[scored
    tokens]."""
    order = np.argsort(micro_batch.sequence, kind="stable")
    sequences = len(micro_batch) * micro_batch.branches
    ends = np.cumsum(np.bincount(micro_batch.sequence, minlength=sequences))
    parts = np.split(values[order], ends[:-1])
    return [tuple(parts[i : i + micro_batch.branches]) for i in range(0, sequences, micro_batch.branches)]
