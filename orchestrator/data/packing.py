"""Rows of a micro-batch: padded, packed, or with the prompt stored once for its branches.

    prefix_shared   [prompt | chosen | rejected] [prompt | …   position ids restart after each prompt
    packed          [prompt chosen] [prompt rejected] …        several sequences in a row
    padded          [prompt chosen . . .]                      one sequence in a row

All three give the same log-probs: a token sees the earlier tokens of its own sequence and nothing else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

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
from orchestrator.core.errors import DataError, OrchestratorError

_WORD = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens of one segment, which lie next to each other in a row."""

    example: int
    """Id of the group that the tokens belong to."""
    ids: Ints
    positions: Ints
    branch: Ints
    """Int[t]: MicroBatch.branch of each token."""
    owner: Ints
    """Int[t]: 0 for the prompt's tokens, k + 1 for those of branch k, in every layout."""
    loss_mask: Bools
    sequence: Ints
    """Int[t]: sequence that each token is scored in."""
    previous: Ints
    """Int[t]: index in the piece of the token that predicts each token."""
    last: tuple[tuple[int, int], ...]
    """(sequence, index of its last token in the piece) of each sequence."""
    branches: tuple[Branch, ...]
    """Branches of the tokens, in the order in which they lie."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a piece lies: a row and the column of its first token."""

    piece: int
    row: int
    column: int


def pack(
    groups: Sequence[SequenceGroup],
    layout: Layout,
    *,
    row_tokens: int | None = None,
    one_row: bool = False,
    weight: float = 1.0,
) -> MicroBatch:
    """One MicroBatch that holds `groups` in `layout`.

    row_tokens: length of a packed or prefix-shared row. The default is the longest piece: on a CPU attention
    over one long row is slower than padding. one_row: a single row for block attention, which skips what
    tokens cannot see. Its length is a multiple of ROW_MULTIPLE and at least SHORTEST_ROW.
    """
    branches = len(groups[0].branches)
    pieces = [p for index, group in enumerate(groups) for p in _pieces(group, index * branches, layout)]
    lengths = [len(p) for p in pieces]
    rows = [list(range(len(pieces)))] if one_row else _rows(lengths, layout, row_tokens)
    length = _single(lengths) if one_row else max(sum(lengths[i] for i in row) for row in rows)
    places = list(_places(rows, lengths))
    ids, positions, segment, branch, identity = _grids(pieces, places, (len(rows), length))
    if layout == "padded":
        _count_on(positions, segment)
    score_at, targets, sequence = _scored(pieces, places, length)
    return MicroBatch(
        layout=layout,
        input_ids=ids,
        position_ids=positions,
        segment=segment,
        branch=branch,
        score_at=score_at,
        targets=targets,
        sequence=sequence,
        last_at=_last_at(pieces, places, length, len(groups) * branches),
        identity=identity,
        examples=np.array([g.id for g in groups], np.int64),
        branches=branches,
        one_row=one_row,
        unshared_tokens=sum(g.tokens for g in groups),
        weight=weight,
        source=np.array([g.source for g in groups], np.int64),
        label=_column([g.label for g in groups], "label"),
        margin=_column([g.margin for g in groups], "margin"),
        experience=_experience([b.experience for place in places for b in pieces[place.piece].branches]),
    )


def _places(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> Iterator[_Place]:
    """The place of each piece, row after row."""
    for row, pieces in enumerate(rows):
        column = 0
        for piece in pieces:
            yield _Place(piece, row, column)
            column += lengths[piece]


def _grids(
    pieces: Sequence[_Piece], places: Sequence[_Place], shape: tuple[int, int]
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """(token ids, position ids, segment, branch, identity) of a micro-batch, Int[R, T] each."""
    ids, positions, branch, identity = (np.zeros(shape, np.int64) for _ in range(4))
    segment = np.full(shape, -1, np.int64)
    for place in places:
        piece = pieces[place.piece]
        at = place.row, slice(place.column, place.column + len(piece))
        ids[at], positions[at], branch[at] = piece.ids, piece.positions, piece.branch
        segment[at] = place.piece
        identity[at] = _identity(piece)
    return ids, positions, segment, branch, identity


def _count_on(positions: Ints, segment: Ints) -> None:
    """Lets position ids count on over the padding of each row, in place.

    Without a mask, transformers takes a position id that does not count up for the start of a new sequence.
    """
    columns = np.broadcast_to(np.arange(positions.shape[1]), positions.shape)
    padding = segment < 0
    positions[padding] = columns[padding]


def _scored(pieces: Sequence[_Piece], places: Sequence[_Place], length: int) -> tuple[Ints, Ints, Ints]:
    """(score_at, targets, sequence) of the tokens that count in the loss, Int[N] each."""
    score_at, targets, sequence = [], [], []
    for place in places:
        piece = pieces[place.piece]
        score_at.append(place.row * length + place.column + piece.previous[piece.loss_mask])
        targets.append(piece.ids[piece.loss_mask])
        sequence.append(piece.sequence[piece.loss_mask])
    return np.concatenate(score_at), np.concatenate(targets), np.concatenate(sequence)


def _last_at(pieces: Sequence[_Piece], places: Sequence[_Place], length: int, sequences: int) -> Ints:
    """Int[sequences]: flat position of the last token of each sequence."""
    last_at = np.zeros(sequences, np.int64)
    for place in places:
        for sequence, index in pieces[place.piece].last:
            last_at[sequence] = place.row * length + place.column + index
    return last_at


def filler(groups: Sequence[SequenceGroup], layout: Layout, *, one_row: bool = False) -> MicroBatch:
    """The cheapest micro-batch of one of `groups`, with weight 0: it only keeps ranks in step."""
    return pack([min(groups, key=lambda g: (g.tokens, g.id))], layout, one_row=one_row, weight=0.0)


def cost(groups: Sequence[SequenceGroup], layout: Layout, *, one_row: bool = False) -> int:
    """Positions that the model computes for these groups in one micro-batch, padding included."""
    lengths = [n for g in groups for n in _lengths(g, layout)]
    if one_row:
        return _single(lengths)
    rows = _rows(lengths, layout, None)
    return len(rows) * max(sum(lengths[i] for i in row) for row in rows)


def _single(lengths: Sequence[int]) -> int:
    """Length of a single row that holds pieces of these lengths."""
    return max(SHORTEST_ROW, -(-sum(lengths) // ROW_MULTIPLE) * ROW_MULTIPLE)


def _lengths(group: SequenceGroup, layout: Layout) -> list[int]:
    if layout == "prefix_shared":
        return [group.shared_tokens]
    return [len(group.prompt) + len(b.ids) for b in group.branches]


def _rows(lengths: Sequence[int], layout: Layout, row_tokens: int | None) -> list[list[int]]:
    """Pieces of each row by first-fit decreasing, the longest row first; a padded row holds one piece."""
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
            example=group.id,
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
    # the prompt's last token predicts the first token of each branch
    previous[starts[:-1][np.array(sizes) > 0]] = prompt - 1
    owner = np.concatenate([np.zeros(prompt, np.int64), *(np.full(n, k + 1) for k, n in enumerate(sizes))])
    return _Piece(
        example=group.id,
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


def _identity(piece: _Piece) -> Ints:
    """splitmix64 of (example, owner, position) of each token."""
    word = np.uint64(piece.example * 0x9E37_79B9_7F4A_7C15 & _WORD)  # products wrap, here and below
    word = (
        word
        + piece.owner.astype(np.uint64) * np.uint64(0xC2B2_AE3D_27D4_EB4F)
        + piece.positions.astype(np.uint64)
    )
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return (word ^ (word >> np.uint64(31))).view(np.int64)


def _column(values: Sequence[float | None], name: str) -> Floats | None:
    """Float[n] of a column; None if no example has it. DataError if only a part of the examples has it."""
    present = [v for v in values if v is not None]
    if not present:
        return None
    if len(present) < len(values):
        raise DataError(
            f"{len(values) - len(present)} of {len(values)} examples of a micro-batch have no {name}",
            why=f"the others have a {name}, and a loss reads it from all examples or from none",
            fix=f"give every row a {name}, or leave the column out with data.columns.{name}=null",
        )
    return np.array(present, np.float32)


def _experience(parts: Sequence[Experience | None]) -> Experience | None:
    """The columns of all branches one after the other, in the order of the scored tokens.

    OrchestratorError if a column is there for a part of the branches only.
    """
    present = [p for p in parts if p is not None]
    if not present:
        return None
    if len(present) < len(parts):
        raise _mixed("experience")

    def joined(name: str) -> Floats | None:
        columns = [getattr(p, name) for p in present]
        if any((c is None) != (columns[0] is None) for c in columns):
            raise _mixed(name)
        return None if columns[0] is None else np.concatenate(columns)

    columns: dict[str, Any] = {f.name: joined(f.name) for f in fields(Experience)}
    return Experience(**columns)


def _mixed(name: str) -> OrchestratorError:
    return OrchestratorError(
        f"some rollouts of a micro-batch have {name}, others have none",
        fix="this is a bug: report it with logs/ of the run",
    )


def by_branch(micro_batch: MicroBatch, values: Floats) -> list[tuple[Floats, ...]]:
    """Splits Float[N] values of the scored tokens: [example][branch]: Float[scored tokens]."""
    order = np.argsort(micro_batch.sequence, kind="stable")
    sequences = len(micro_batch) * micro_batch.branches
    ends = np.cumsum(np.bincount(micro_batch.sequence, minlength=sequences))
    parts = np.split(values[order], ends[:-1])
    return [tuple(parts[i : i + micro_batch.branches]) for i in range(0, sequences, micro_batch.branches)]
