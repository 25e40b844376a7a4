"""Order is a function of (seed, epoch, cursor); batches chain; the remainder of an epoch."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.batches import Branch, SequenceGroup
from orchestrator.data.order import Batches, Order, permutation

SEEDS = st.integers(0, 2**31)
REMAINDERS = st.sampled_from(["drop", "use", "carry"])


def group(index):
    return SequenceGroup(index, np.array([1]), (Branch(np.array([2]), np.array([True])),))


def batches(sizes, weights, seed, effective, remainder):
    return Batches([group(i) for i in range(sum(sizes))], Order(sizes, weights, seed), effective, remainder)


def walk(source, examples, start=0):
    """The batches from `start` until `examples` are consumed, as (cursor, ids)."""
    cursor, walked = start, []
    while cursor < examples - 1e-9:
        ids = [g.id for g in source.at(cursor)]
        walked.append((cursor, ids))
        cursor += len(ids)
    return walked


def flat(walked):
    return [i for _, ids in walked for i in ids]


def test_the_permutation_is_pinned():
    """A run resumed under another release must see the same order."""
    assert permutation(8, 0, 0, 0, 1).tolist() == [0, 6, 2, 5, 4, 1, 7, 3]
    assert permutation(8, 7, 3, 1, 2).tolist() == [6, 5, 2, 0, 7, 3, 4, 1]


@given(
    size=st.integers(1, 50),
    keys=st.lists(st.tuples(*[st.integers(0, 2**31)] * 4), min_size=2, max_size=2, unique=True),
)
def test_permutations_are_permutations_and_repeat(size, keys):
    for key in keys:
        assert sorted(permutation(size, *key)) == list(range(size))
        assert (permutation(size, *key) == permutation(size, *key)).all()


def test_each_part_of_the_key_matters():
    base = (1, 2, 3, 4)
    keys = [base, *(tuple(k + (i == j) for j, k in enumerate(base)) for i in range(4))]
    assert len({tuple(permutation(100, *key)) for key in keys}) == 5


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3), seed=SEEDS)
def test_an_epoch_of_weight_one_covers_each_example_once(sizes, seed):
    order = Order(sizes, [1.0] * len(sizes), seed)
    for epoch in range(3):
        assert sorted(order.epoch(epoch)) == list(range(sum(sizes)))


@given(size=st.integers(1, 15), seed=SEEDS)
def test_weight_two_takes_a_source_twice_and_a_half_takes_it_in_two_epochs(size, seed):
    order = Order([size, size], [2.0, 0.5], seed)
    for epoch in range(2):
        counts = Counter(order.epoch(epoch).tolist())
        assert all(counts[i] == 2 for i in range(size))
    halves = [i for epoch in range(2) for i in order.epoch(epoch).tolist() if i >= size]
    assert sorted(halves) == list(range(size, 2 * size))


@given(
    sources=st.lists(st.tuples(st.integers(1, 10), st.floats(0.2, 3)), min_size=1, max_size=3),
    seed=SEEDS,
    epochs=st.integers(1, 5),
)
def test_any_weight_is_kept_over_epochs_and_no_example_gets_ahead(sources, seed, epochs):
    sizes, weights = zip(*sources, strict=True)
    order = Order(sizes, weights, seed)
    counts = Counter(i for epoch in range(epochs) for i in order.epoch(epoch).tolist())
    assert all(order.size(epoch) == len(order.epoch(epoch)) for epoch in range(epochs))
    start = 0
    for size, weight in sources:
        own = [counts[i] for i in range(start, start + size)]
        assert sum(own) == int(np.floor(weight * size * epochs))
        assert max(own) - min(own) <= 1
        start += size


def test_each_lap_over_a_source_has_its_own_order():
    order = Order([40], [0.5], 0)
    first, second, third = (set(order.epoch(e).tolist()) for e in range(3))
    assert first.isdisjoint(second) and third not in (first, second)


@given(seed=SEEDS, epochs=st.permutations(range(6)))
def test_order_does_not_depend_on_earlier_calls(seed, epochs):
    used = Order([5, 4], [1.0, 0.5], seed)
    for epoch in epochs:
        assert used.epoch(epoch).tolist() == Order([5, 4], [1.0, 0.5], seed).epoch(epoch).tolist()


def test_seeds_and_epochs_give_different_orders():
    first = Order([100], [1.0], 0)
    assert first.epoch(0).tolist() != first.epoch(1).tolist()
    assert first.epoch(0).tolist() != Order([100], [1.0], 1).epoch(0).tolist()


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    effective=st.integers(1, 12),
    remainder=REMAINDERS,
    seed=SEEDS,
)
def test_a_resumed_run_continues_the_same_batches(sizes, effective, remainder, seed):
    weights = [1.0, 0.5][: len(sizes)]
    whole = walk(batches(sizes, weights, seed, effective, remainder), 3 * sum(sizes))
    for cursor, ids in whole:
        assert [g.id for g in batches(sizes, weights, seed, effective, remainder).at(cursor)] == ids
    assert all(next_cursor == cursor + len(ids) for (cursor, ids), (next_cursor, _) in pairwise(whole))


@given(size=st.integers(1, 12), seed=SEEDS, cuts=st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_carried_batches_are_one_stream_whatever_the_effective_batch(size, seed, cuts):
    streams = [flat(walk(batches([size], [1.0], seed, effective, "carry"), 40)) for effective in cuts]
    shorter = min(len(s) for s in streams)
    assert streams[0][:shorter] == streams[1][:shorter]
    order = Order([size], [1.0], seed)
    assert streams[0][:size] == order.epoch(0).tolist()


@pytest.mark.parametrize(
    ("remainder", "sizes", "cursors"),
    [
        ("drop", [4, 4, 4, 4], [0, 4, 8, 12]),
        ("use", [4, 4, 2, 4, 4, 2], [0, 4, 8, 10, 14, 18]),
        ("carry", [4, 4, 4, 4, 4], [0, 4, 8, 12, 16]),
    ],
)
def test_ten_examples_by_four(remainder, sizes, cursors):
    source = batches([10], [1.0], 3, 4, remainder)
    walked = walk(source, 16 if remainder == "drop" else 20)
    assert [len(ids) for _, ids in walked] == sizes
    assert [cursor for cursor, _ in walked] == cursors
    first, second = (source.order.epoch(e).tolist() for e in (0, 1))
    expected = {"drop": first[:8] + second[:8], "use": first + second, "carry": first + second}[remainder]
    assert flat(walked) == expected
    assert source.steps_in(2) == len(walked)


def test_an_epoch_smaller_than_the_batch_is_never_dropped_whole():
    source = batches([3], [1.0], 0, 4, "drop")
    assert sorted(flat(walk(source, 3))) == [0, 1, 2]
    assert source.steps_in(2) == 2


@settings(max_examples=100)
@given(
    size=st.integers(1, 30),
    weight=st.sampled_from([0.5, 1.0, 2.0]),
    effective=st.integers(1, 12),
    remainder=REMAINDERS,
    tenths=st.integers(1, 35),
)
def test_steps_in_matches_walking(size, weight, effective, remainder, tenths):
    source, epochs = batches([size], [weight], 1, effective, remainder), tenths / 10
    sizes = [source.order.size(e) for e in range(5)]
    if remainder == "drop":
        sizes = [n // effective * effective if n > effective else n for n in sizes]
    examples = sum(sizes[: tenths // 10]) + tenths % 10 / 10 * sizes[tenths // 10]
    assert source.steps_in(epochs) == max(1, len(walk(source, examples)))


def test_rounding_adds_no_step_to_a_tenth_of_an_epoch():
    assert batches([100], [1.0], 0, 10, "use").steps_in(1.1) == 11
    assert batches([100], [1.0], 0, 10, "carry").steps_in(1.1) == 11


def test_a_late_cursor_draws_only_the_epochs_it_needs():
    source = batches([50], [1.0], 0, 10, "carry")
    source.at(50 * 1000 + 45)
    assert source.order.epoch.cache_info().misses == 2
