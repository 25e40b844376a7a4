"""A finding of the doctor, the table that shows findings, and the words that they share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from orchestrator.cluster.doctor.facts import ClusterFacts, NodeCapacity, NodeFacts

Level = Literal["ok", "warning", "error"]
STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "error": "red"}
MAX_LISTED = 4
"""Nodes that are named one by one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor."""

    check: str
    """The check that gave it, such as "disk"."""
    level: Level
    where: str
    """Nodes or folder."""
    what: str
    """What was found."""
    fix: str = ""
    """A command or an edit; empty if nothing is wrong."""


def render(findings: Sequence[Finding]) -> Table:
    """The findings as a table, each fix below its problem."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        what = (
            Text(finding.what)
            if finding.level == "ok"
            else Text.assemble(finding.what, "\n", (f"fix: {finding.fix}", "bold"))
        )
        level = Text(finding.level, style=STYLES[finding.level])
        table.add_row(level, finding.check, Text(finding.where, style="dim"), what)
    return table


def all_nodes(facts: ClusterFacts) -> str:
    """Example: all 3 nodes."""
    return facts.nodes[0].name if len(facts.nodes) == 1 else f"all {len(facts.nodes)} nodes"


def listed(names: Sequence[str]) -> str:
    """Example: a, b, c, d and 3 more."""
    if len(names) <= MAX_LISTED:
        return ", ".join(names)
    return f"{', '.join(names[:MAX_LISTED])} and {len(names) - MAX_LISTED} more"


def counted(number: int, noun: str) -> str:
    """Example: 3 nodes."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def with_capacity(facts: ClusterFacts) -> list[tuple[NodeFacts, NodeCapacity]]:
    """The nodes that answered, with what Ray gives out on them."""
    by_name = {capacity.node: capacity for capacity in facts.capacities}
    return [(node, by_name[node.name]) for node in facts.nodes]
