"""The cut changes nothing: every example once, equal counts, the same global units and targets."""

import math
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.core.batches import Branch, Cut, LossUnits, SequenceGroup
from orchestrator.data.micro_batches import cut_step, loss_units, micro_batches_per_worker

LAYOUTS = ("prefix_shared", "packed", "padded")


def sized(index, prompt, *branches):
    """A group of these lengths with distinct tokens."""
    answers = tuple(
        Branch(np.arange(n) + 1000 * (index + 1) + 100 * (k + 1), np.arange(n) % 3 != 1)
        for k, n in enumerate(branches)
    )
    return SequenceGroup(index, np.arange(prompt) + 1000 * (index + 1), answers)


@st.composite
def steps(draw):
    branches = draw(st.sampled_from([1, 2]))
    lengths = draw(st.lists(st.tuples(*[st.integers(1, 12)] * (1 + branches)), min_size=1, max_size=14))
    return [sized(i, *sizes) for i, sizes in enumerate(lengths)]


@st.composite
def cuts(draw):
    examples = draw(st.one_of(st.none(), st.integers(1, 6)))
    positions = draw(st.integers(1, 90)) if examples is None else None
    return Cut(draw(st.integers(1, 5)), examples, positions, draw(st.sampled_from(LAYOUTS)), 0, "no_sync")


def cut(workers=1, examples=None, positions=None, layout="padded"):
    return Cut(workers, examples, positions, layout, 0, "no_sync")


def targets(batch):
    """(example, branch) -> its scored tokens in order, without fillers."""
    by_branch = {}
    for mb in (mb for rank in batch.micro_batches for mb in rank if mb.weight):
        for sequence, target in zip(mb.sequence, mb.targets, strict=True):
            which, branch = divmod(int(sequence), mb.branches)
            by_branch.setdefault((int(mb.examples[which]), branch), []).append(int(target))
    return by_branch


def content(batch):
    return [
        [(mb.examples.tolist(), mb.input_ids.tolist(), mb.weight) for mb in rank]
        for rank in batch.micro_batches
    ]


@settings(max_examples=200)
@given(groups=steps(), how=cuts())
def test_every_example_once_and_the_same_number_on_every_rank(groups, how):
    batch = cut_step(groups, how)
    assert len(batch.micro_batches) == how.workers
    assert len({len(rank) for rank in batch.micro_batches}) == 1
    real = [mb for rank in batch.micro_batches for mb in rank if mb.weight]
    assert sorted(i for mb in real for i in mb.examples.tolist()) == [g.id for g in groups]
    assert all(mb.weight == 1.0 for mb in real)
    fillers = [mb for rank in batch.micro_batches for mb in rank if not mb.weight]
    assert all(len(mb) == 1 for mb in fillers)
    assert not fillers or all(len(mb) == 1 for mb in real)  # fillers only where nothing is left to split
    assert len(fillers) < how.workers
    assert [g.id for g in batch.groups] == [g.id for g in groups]


@settings(max_examples=200)
@given(groups=steps(), how=cuts())
def test_the_budget_is_obeyed(groups, how):
    for mb in (mb for rank in cut_step(groups, how).micro_batches for mb in rank):
        if how.examples is not None:
            assert len(mb) <= how.examples
        else:
            assert mb.positions <= how.positions or len(mb) == 1


@settings(max_examples=200)
@given(groups=steps(), how=cuts())
def test_units_and_targets_do_not_depend_on_the_cut(groups, how):
    batch = cut_step(groups, how)
    branches = len(groups[0].branches)
    assert batch.units == LossUnits(
        len(groups), tuple(sum(int(g.branches[k].loss_mask.sum()) for g in groups) for k in range(branches))
    )
    assert batch.tokens == sum(g.tokens for g in groups)
    expected = {(g.id, k): b.ids[b.loss_mask].tolist() for g in groups for k, b in enumerate(g.branches)}
    assert targets(batch) == expected
    assert (
        sum(len(mb.targets) for rank in batch.micro_batches for mb in rank if mb.weight) == batch.units.tokens
    )


@settings(max_examples=50)
@given(groups=steps(), how=cuts(), data=st.data())
def test_the_same_examples_in_another_order_are_cut_alike(groups, how, data):
    shuffled = data.draw(st.permutations(groups))
    assert content(cut_step(shuffled, how)) == content(cut_step(groups, how))


@given(count=st.integers(1, 60), workers=st.integers(1, 8), examples=st.integers(1, 8))
@example(count=256, workers=2, examples=8)
def test_the_batch_arithmetic_is_what_happens(count, workers, examples):
    how = cut(workers, examples)
    batch = cut_step([sized(i, 1, 1) for i in range(count)], how)
    assert (
        len(batch.micro_batches[0])
        == micro_batches_per_worker(count, how)
        == math.ceil(count / workers / examples)
    )


def test_256_pairs_on_two_workers_by_eight():
    batch = cut_step([sized(i, 2, 3, 4) for i in range(256)], cut(2, 8))
    assert [[len(mb) for mb in rank] for rank in batch.micro_batches] == [[8] * 16] * 2
    assert micro_batches_per_worker(256, cut(2, positions=100)) is None


def test_micro_batches_are_sorted_by_length_and_balanced():
    groups = [sized(i, 1, n) for i, n in enumerate([9, 1, 8, 2, 7, 3, 6, 4])]
    batch = cut_step(groups, cut(2, 2))
    assert sorted(
        sorted(len(groups[i].branches[0].ids) for i in mb.examples)
        for rank in batch.micro_batches
        for mb in rank
    ) == [
        [1, 2],
        [3, 4],
        [6, 7],
        [8, 9],
    ]
    loads = [sum(mb.positions for mb in rank) for rank in batch.micro_batches]
    assert loads == [2 * 10 + 2 * 3, 2 * 8 + 2 * 5]


def ragged(seed: int, prompt: int, answer: int, count: int = 256) -> list[SequenceGroup]:
    """Pairs whose parts are between a half and the whole of these lengths."""
    draw = random.Random(seed)

    def size(longest: int) -> int:
        return draw.randint(longest // 2, longest)

    return [sized(i, size(prompt), size(answer), size(answer)) for i in range(count)]


def imbalance(batch) -> float:
    loads = [sum(mb.positions for mb in rank) for rank in batch.micro_batches]
    return max(loads) / (sum(loads) / len(loads)) - 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("positions", [2048, 8192, 12_000, 16_384])
@pytest.mark.parametrize("workers", [2, 8])
def test_ranks_have_the_same_work_however_large_the_micro_batches(workers, positions, layout):
    """An eighth of 4k context, for speed. There, 65,536 positions and 3 micro-batches on each of 8 ranks left
    17 %."""
    for seed in range(3):
        groups = ragged(seed, 256, 256)
        batch = cut_step(groups, cut(workers, positions=positions, layout=layout))
        assert imbalance(batch) <= 0.03
        assert max(mb.positions for rank in batch.micro_batches for mb in rank) <= positions


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    workers=st.integers(2, 8),
    positions=st.integers(1000, 20_000),
    layout=st.sampled_from(LAYOUTS),
)
def test_no_rank_waits_long_for_another(seed, workers, positions, layout):
    groups = ragged(seed, 100, 300, count=32 * workers)
    assert imbalance(cut_step(groups, cut(workers, positions=positions, layout=layout))) <= 0.05


def test_micro_batches_in_examples_stay_as_large_as_asked_for():
    batch = cut_step(ragged(0, 256, 256), cut(8, examples=11))
    assert max(len(mb) for rank in batch.micro_batches for mb in rank) <= 11
    assert len(batch.micro_batches[0]) == micro_batches_per_worker(256, cut(8, examples=11))


def test_a_rank_without_data_gets_fillers_of_weight_zero():
    batch = cut_step([sized(0, 2, 3), sized(1, 1, 1)], cut(3, 4))
    assert [[mb.weight for mb in rank] for rank in batch.micro_batches] == [[1.0], [1.0], [0.0]]
    assert batch.micro_batches[2][0].examples.tolist() == [1]
    assert batch.units == LossUnits(2, (3,))


def test_loss_units_literally():
    pair = SequenceGroup(
        0,
        np.array([1, 7, 8]),
        (
            Branch(np.array([9, 2]), np.array([True, True])),
            Branch(np.array([5, 6, 2]), np.array([True, False, True])),
        ),
    )
    assert loss_units([pair]) == LossUnits(1, (2, 2))
    assert loss_units([pair, pair]).tokens == 8


@pytest.mark.parametrize("budget", [{"examples": 4}, {"positions": 64}])
def test_a_halved_cut_holds_the_same_step(budget):
    groups = [sized(i, 2, 3 + i % 5) for i in range(12)]
    how = cut(2, **budget)
    while (finer := how.halved()) != how:
        assert targets(cut_step(groups, finer)) == targets(cut_step(groups, how))
        how = finer
    assert (how.examples, how.positions) == ((1, None) if "examples" in budget else (None, 1))


def test_reference_columns_go_to_their_micro_batches():
    batch = cut_step([sized(i, 2, 3, 4) for i in range(5)], cut(2, 2))
    columns = tuple(tuple(mb.targets.astype(np.float32) for mb in rank) for rank in batch.micro_batches)
    filled = batch.with_reference(columns)
    for rank in filled.micro_batches:
        assert all((mb.ref_logprobs == mb.targets).all() for mb in rank)
    assert batch.micro_batches[0][0].ref_logprobs is None
    with pytest.raises(ValueError, match="zip"):
        batch.with_coefficients(columns[:1])
