"""The three row layouts: literal examples, and what every scored position sees."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.batches import Branch, Experience, SequenceGroup
from orchestrator.core.errors import DataError, OrchestratorError
from orchestrator.data.packing import cost, filler, pack

LAYOUTS = ("prefix_shared", "packed", "padded")


def branch(ids, scored=None):
    return Branch(
        np.array(ids, np.int64), np.ones(len(ids), np.bool_) if scored is None else np.array(scored, np.bool_)
    )


PAIR = SequenceGroup(7, np.array([1, 7, 8]), (branch([9, 2]), branch([5, 6, 2])), margin=0.5)
TALK = SequenceGroup(4, np.array([1]), (branch([3, 4, 5], [True, False, True]),), label=1.0)


@st.composite
def groups_of(draw, branches=None, max_size=6):
    """Groups with distinct ids, the same number of branches, at least one scored token each."""
    branches = branches or draw(st.sampled_from([1, 2]))
    groups = []
    for number in range(draw(st.integers(1, max_size))):
        prompt = draw(st.lists(st.integers(1, 99), min_size=1, max_size=6))
        answers = []
        for _ in range(branches):
            ids = draw(st.lists(st.integers(1, 99), min_size=1, max_size=7))
            scored = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
            answers.append(branch(ids, [*scored[:-1], True]))
        groups.append(SequenceGroup(100 + number, np.array(prompt), tuple(answers)))
    return groups


def test_prefix_shared_literally():
    mb = pack([PAIR], "prefix_shared")
    assert mb.input_ids.tolist() == [[1, 7, 8, 9, 2, 5, 6, 2]]
    assert mb.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert mb.segment.tolist() == [[0] * 8]
    assert mb.branch.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert mb.score_at.tolist() == [2, 3, 2, 5, 6]
    assert mb.targets.tolist() == [9, 2, 5, 6, 2]
    assert mb.sequence.tolist() == [0, 0, 1, 1, 1]
    assert mb.last_at.tolist() == [4, 7]
    assert (mb.examples.tolist(), mb.branches, mb.unshared_tokens, mb.tokens, mb.positions) == (
        [7],
        2,
        11,
        8,
        8,
    )


def test_packed_literally():
    mb = pack([PAIR], "packed", row_tokens=11)
    assert mb.input_ids.tolist() == [[1, 7, 8, 5, 6, 2, 1, 7, 8, 9, 2]]
    assert mb.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]]
    assert mb.segment.tolist() == [[1] * 6 + [0] * 5]
    assert mb.branch.tolist() == [[0] * 11]
    assert mb.score_at.tolist() == [2, 3, 4, 8, 9]
    assert mb.targets.tolist() == [5, 6, 2, 9, 2]
    assert mb.sequence.tolist() == [1, 1, 1, 0, 0]
    assert mb.last_at.tolist() == [10, 5]


def test_padded_literally():
    mb = pack([PAIR], "padded")
    assert mb.input_ids.tolist() == [[1, 7, 8, 9, 2, 0], [1, 7, 8, 5, 6, 2]]
    assert mb.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert mb.segment.tolist() == [[0, 0, 0, 0, 0, -1], [1] * 6]
    assert mb.score_at.tolist() == [2, 3, 8, 9, 10]
    assert mb.targets.tolist() == [9, 2, 5, 6, 2]
    assert mb.last_at.tolist() == [4, 11]
    assert (mb.tokens, mb.positions) == (11, 12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_scored_tokens_are_targets(layout):
    mb = pack([TALK], layout)
    assert (mb.targets.tolist(), mb.score_at.tolist(), mb.last_at.tolist()) == ([3, 5], [0, 2], [3])


def test_a_column_of_a_part_of_the_examples_is_an_error():
    without = SequenceGroup(8, PAIR.prompt, PAIR.branches)
    with pytest.raises(DataError, match=r"1 of 2 examples[\s\S]*data\.columns\.margin=null"):
        pack([PAIR, without], "padded")


def rollout(count: int, **columns: np.ndarray) -> Branch:
    zeros = np.zeros(count, np.float32)
    return replace(branch([5] * count), experience=Experience(zeros, zeros, **columns))


@pytest.mark.parametrize("other", [branch([5, 6]), rollout(2, values=np.zeros(2, np.float32))])
def test_experience_of_a_part_of_the_branches_is_an_error(other):
    with pytest.raises(OrchestratorError, match=r"experience|values"):
        pack([SequenceGroup(1, PAIR.prompt, (rollout(2), other))], "padded")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_follow_the_examples(layout):
    mb = pack([PAIR, SequenceGroup(8, PAIR.prompt, PAIR.branches, margin=2.0)], layout)
    assert (mb.margin.tolist(), mb.label, mb.examples.tolist()) == ([0.5, 2.0], None, [7, 8])
    assert pack([TALK], layout).label.tolist() == [1.0]


def visible(mb, at):
    """Flat positions that the token at `at` sees, by the rule in MicroBatch."""
    length = mb.input_ids.shape[1]
    row, column = divmod(int(at), length)
    segment, parts = mb.segment[row], mb.branch[row]
    seen = [j for j in range(column + 1) if segment[j] == segment[column] and parts[j] in (0, parts[column])]
    return [row * length + j for j in seen]


@settings(max_examples=80)
@given(groups=groups_of(), layout=st.sampled_from(LAYOUTS), room=st.sampled_from([None, 20, 60]))
def test_every_scored_position_sees_its_own_sequence_and_nothing_else(groups, layout, room):
    mb = pack(groups, layout, row_tokens=room)
    ids, positions = mb.input_ids.ravel(), mb.position_ids.ravel()
    scores = list(zip(mb.score_at, mb.targets, mb.sequence, strict=True))
    for index, group in enumerate(groups):
        for k, answer in enumerate(group.branches):
            number = index * mb.branches + k
            own = [(at, target) for at, target, sequence in scores if sequence == number]
            whole = [*group.prompt, *answer.ids]
            ends = [len(group.prompt) + int(t) for t in np.flatnonzero(answer.loss_mask)]
            assert [target for _, target in own] == [whole[end] for end in ends]
            for (at, _), end in zip(own, ends, strict=True):
                # the prompt's last token has no branch: it sees the prompt alone and predicts token `end`
                seen = visible(mb, at)
                assert ids[seen].tolist() == whole[:end]
                assert positions[seen].tolist() == list(range(end))
            last = visible(mb, mb.last_at[number])
            assert ids[last].tolist() == whole
            assert positions[last].tolist() == list(range(len(whole)))
    assert len(scores) == sum(g.scored_tokens for g in groups)


@given(groups=groups_of(), layout=st.sampled_from(LAYOUTS))
def test_cost_is_the_number_of_positions(groups, layout):
    mb = pack(groups, layout)
    assert cost(groups, layout) == mb.positions
    assert mb.tokens == sum(g.shared_tokens if layout == "prefix_shared" else g.tokens for g in groups)
    assert mb.unshared_tokens == sum(g.tokens for g in groups)


@given(groups=groups_of(), layout=st.sampled_from(LAYOUTS))
def test_a_filler_is_the_cheapest_group_with_weight_zero(groups, layout):
    mb = filler(groups, layout)
    assert (mb.weight, len(mb)) == (0.0, 1)
    assert mb.unshared_tokens == min(g.tokens for g in groups)


@given(groups=groups_of(), room=st.integers(1, 80))
def test_packed_rows_hold_whole_pieces_without_gaps(groups, room):
    for layout in ("packed", "prefix_shared"):
        mb = pack(groups, layout, row_tokens=room)
        for segment in mb.segment:
            used = segment[segment >= 0]
            assert (segment[: len(used)] >= 0).all()
            assert np.count_nonzero(np.diff(used)) + 1 == len(set(used.tolist()))
        pieces = len(groups) if layout == "prefix_shared" else len(groups) * mb.branches
        assert sorted(set(mb.segment[mb.segment >= 0].tolist())) == list(range(pieces))
        assert mb.input_ids.shape[1] <= max(
            room, *(g.shared_tokens if layout == "prefix_shared" else g.longest for g in groups)
        )
