"""KTO's mismatched completions: another prompt's, fixed for the data set, within the length."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.batches import Branch, SequenceGroup
from orchestrator.data.kto_pairs import with_mismatched


def group(index, prompt, answer):
    return SequenceGroup(
        index, np.array(prompt), (Branch(np.array(answer), np.ones(len(answer), np.bool_)),), label=1.0
    )


def answers(groups):
    return [[b.ids.tolist() for b in g.branches] for g in groups]


def test_the_next_groups_completion_is_the_second_branch():
    groups = [group(0, [1], [10, 11]), group(1, [2], [20]), group(2, [3], [30])]
    paired = with_mismatched(groups, 16)
    assert answers(paired) == [[[10, 11], [20]], [[20], [30]], [[30], [10, 11]]]
    assert [(g.id, g.label, g.prompt.tolist()) for g in paired] == [
        (0, 1.0, [1]),
        (1, 1.0, [2]),
        (2, 1.0, [3]),
    ]


def test_the_other_answer_to_the_same_prompt_is_not_a_mismatch():
    groups = [group(0, [1], [10]), group(1, [1], [11]), group(2, [2], [20]), group(3, [2], [21])]
    assert answers(with_mismatched(groups, 16)) == [[[10], [20]], [[11], [20]], [[20], [10]], [[21], [10]]]


def test_if_all_prompts_are_equal_the_next_completion_is_used():
    groups = [group(i, [1], [10 + i]) for i in range(3)]
    assert answers(with_mismatched(groups, 16)) == [[[10], [11]], [[11], [12]], [[12], [10]]]
    assert answers(with_mismatched(groups[:1], 16)) == [[[10], [10]]]


def test_a_mismatch_is_cut_to_the_length_but_not_to_nothing():
    groups = [group(0, [1, 1, 1], [10]), group(1, [2], [20, 21, 22, 23])]
    assert answers(with_mismatched(groups, 5))[0] == [[10], [20, 21]]
    assert answers(with_mismatched(groups, 3))[0] == [[10], [20]]


@given(prompts=st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_it_is_the_nearest_following_group_with_another_prompt(prompts):
    groups = [group(i, [p], [10 + i]) for i, p in enumerate(prompts)]
    for i, paired in enumerate(with_mismatched(groups, 16)):
        following = [*range(i + 1, len(prompts)), *range(i)]
        other = next((j for j in following if prompts[j] != prompts[i]), (i + 1) % len(prompts))
        assert paired.branches[1].ids.tolist() == [10 + other]
        assert paired.branches[0] is groups[i].branches[0]
