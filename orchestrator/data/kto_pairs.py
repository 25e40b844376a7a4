"""KTO's mismatched completions: a second branch, from which the KL term is estimated."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from orchestrator.core.batches import SequenceGroup


def with_mismatched(groups: Sequence[SequenceGroup], max_length: int) -> tuple[SequenceGroup, ...]:
    """Each group with a mismatched completion as branch 1 (KTO, arXiv 2402.01306, §4.2).

    It is the completion of the next group with another prompt: the two answers of an unpaired preference pair
    follow each other. The pairing goes round the whole data set before batching, so no batch or rank can
    change it.
    """
    paired = []
    for group, other in zip(groups, _next_with_other_prompt(groups), strict=True):
        branch = groups[other].branches[0]
        room = max(1, max_length - len(group.prompt))
        mismatched = replace(branch, ids=branch.ids[:room], loss_mask=branch.loss_mask[:room])
        paired.append(replace(group, branches=(group.branches[0], mismatched)))
    return tuple(paired)


def _next_with_other_prompt(groups: Sequence[SequenceGroup]) -> list[int]:
    """For each group the index of the next one with another prompt; the next one if all prompts are equal."""
    count = len(groups)
    partners = [0] * count
    other = None
    for at in reversed(range(2 * count - 1)):  # backwards, twice: the end of the list needs its beginning
        group, following = at % count, (at + 1) % count
        if not np.array_equal(groups[group].prompt, groups[following].prompt):
            other = following
        partners[group] = following if other is None else other
    return partners
