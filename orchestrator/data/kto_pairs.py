"""KTO's mismatched completions: the second branch from which its KL term is estimated."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from orchestrator.core.batches import SequenceGroup


def with_mismatched(groups: Sequence[SequenceGroup], max_length: int) -> tuple[SequenceGroup, ...]:
    """Each group with the completion of the next one that has another prompt as branch 1 (KTO, arXiv
    2402.01306, §4.2).

    The next one alone would not do: the two answers of an unpaired preference pair follow each other. The
    pairing goes round the whole data set, fixed before batching, so that no batch or rank can change it.
    """
    paired = []
    for group, other in zip(groups, _next_with_other_prompt(groups), strict=True):
        branch = groups[other].branches[0]
        room = max(1, max_length - len(group.prompt))
        mismatched = replace(branch, ids=branch.ids[:room], loss_mask=branch.loss_mask[:room])
        paired.append(replace(group, branches=(group.branches[0], mismatched)))
    return tuple(paired)


def _next_with_other_prompt(groups: Sequence[SequenceGroup]) -> list[int]:
    """Index of that group for each one, going round; the next one where all prompts are equal."""
    count = len(groups)
    found = [0] * count
    other = None
    for at in reversed(range(2 * count - 1)):  # two rounds, backwards: the first finds what the second needs
        here, after = at % count, (at + 1) % count
        if not np.array_equal(groups[here].prompt, groups[after].prompt):
            other = after
        found[here] = after if other is None else other
    return found
