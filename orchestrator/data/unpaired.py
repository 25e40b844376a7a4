"""KTO's mismatched completions: the second branch from which its KL term is estimated."""

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.records import SequenceGroup


def with_mismatched(groups: Sequence[SequenceGroup], max_length: int) -> tuple[SequenceGroup, ...]:
    """Each group with the completion of the next one as branch 1 (KTO, arXiv 2402.01306, §4.2).

    The pairing is a rotation of the whole data set, fixed before batching, so that no batch or rank can change it.
    """
    paired = []
    for group, other in zip(groups, [*groups[1:], groups[0]], strict=True):
        branch = other.branches[0]
        room = max(1, max_length - len(group.prompt))
        mismatched = replace(branch, ids=branch.ids[:room], scored=branch.scored[:room])
        paired.append(replace(group, branches=(group.branches[0], mismatched)))
    return tuple(paired)
