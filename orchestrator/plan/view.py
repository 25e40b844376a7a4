"""A plan as text on one screen: batch arithmetic, warnings, keys that are set, decisions with reasons, data
and memory."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.core.format import size
from orchestrator.plan.data_report import BINS, DataReport
from orchestrator.plan.planner import Plan
from orchestrator.recipe.pipeline import IgnoredKey
from orchestrator.recipe.schema import Recipe, Section

MAX_PARTS = 3
"""Parts of the memory that are printed by name, the largest ones."""
BARS = "▁▂▃▄▅▆▇█"


def render(plan: Plan, given: Recipe | None = None) -> RenderableType:
    """All that `orchestrator plan` prints of a stage. given: the recipe before planning, for the list of set
    keys."""
    return Group(
        Text(plan.arithmetic, style="bold"),
        *_nearest(plan),
        Text(
            f"{plan.total_steps} {'rollout batches' if plan.is_online else 'optimizer steps'} of "
            f"{plan.algorithm}"
        ),
        *warning_lines(plan),
        *([] if given is None else [Text("\nset", style="bold"), _table(set_keys(given))]),
        Text("\ndecided", style="bold"),
        _table((choice.name, choice.value, choice.reason) for choice in plan.choices),
        Text(),
        _data(plan.data),
        *_memory(plan),
        Text(
            f"traffic per worker and step: {size(plan.traffic.reduced)} reduced, "
            f"{size(plan.traffic.gathered)} gathered"
        ),
    )


def warning_lines(plan: Plan) -> list[Text]:
    """A line for each warning of the plan."""
    return [Text(f"warning: {warning}", style="yellow") for warning in plan.warnings]


def set_keys(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(section, "key value, key value") of the keys that do not have their default."""
    for name in type(recipe).model_fields:
        if pairs := [f"{key} {_shown(value)}" for key, value in _changed(getattr(recipe, name), "")]:
            yield name, ", ".join(pairs)


def _changed(section: Section, prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the keys below a section that do not have their default."""
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, Section):
            yield from _changed(value, f"{prefix}{key}.")
        elif value != field.default:
            yield prefix + key, value


def _shown(value: Any) -> str:
    """Short text of a value. Of sections it holds the keys that are set."""
    if isinstance(value, list):
        return f"[{', '.join(_shown(item) for item in value)}]"
    if isinstance(value, Section):
        return "{" + ", ".join(f"{key} {_shown(inner)}" for key, inner in _changed(value, "")) + "}"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def not_read(keys: Sequence[IgnoredKey]) -> RenderableType:
    """A line for each inherited key that a stage does not read. Empty without keys."""
    return Group(
        *([Text("inherited keys that this run does not read:")] if keys else []),
        *(Text(f"  {key}", style="dim") for key in keys),
    )


def _nearest(plan: Plan) -> list[Text]:
    """A line with the effective batches that cut evenly, if this one does not."""
    if not plan.nearest:
        return []
    return [
        Text(
            f"batch.effective {' or '.join(map(str, plan.nearest))} would cut evenly; this one has the same "
            "result, a little slower"
        )
    ]


def _table(rows: Iterable[tuple[str, ...]]) -> Table:
    """Rows of (name, value) or (name, value, reason). A value with a reason is bold."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value, *reason in rows:
        table.add_row(
            name, Text.assemble((value, "bold" if reason else ""), *((f"  {why}", "dim") for why in reason))
        )
    return table


def _data(data: DataReport) -> Group:
    """Lines on rows, lengths and columns."""
    formats = ", ".join(f"{name} ({form})" for name, form in zip(data.sources, data.formats, strict=True))
    equal = f", {data.made_identical} pairs made equal" if data.made_identical else ""
    lines = [
        Text(f"data: {data.rows} rows of {formats}; {data.kept} kept, {data.held_out} held out"),
        Text(
            f"bad rows {len(data.bad)}, too long: {data.dropped} dropped, {data.truncated} truncated{equal}"
        ),
    ]
    lines += [Text(f"  {reason}", style="yellow") for reason in data.reasons]
    if data.not_prefix:
        lines.append(
            Text(
                f"{data.not_prefix} prompts are not a token prefix of their completions; they are cut to the "
                "shared tokens",
                style="yellow",
            )
        )
    lines += data_notes(data)
    lines.append(
        Text(
            "tokens: "
            + ", ".join(f"{name} {value}" for name, value in data.quantiles.items())
            + f"  {_bars(data)}"
        )
    )
    return Group(*lines)


def _bars(data: DataReport) -> str:
    """The histogram of lengths as a line of bars, shortest rows first."""
    width = max(1, -(-data.quantiles["max"] // BINS))
    counts = {bound // width: count for bound, count in data.histogram}
    most = max(counts.values())
    return "".join(
        BARS[round((len(BARS) - 1) * counts[i] / most)] if i in counts else " "
        for i in range(1, max(counts) + 1)
    )


def data_notes(data: DataReport) -> list[Text]:
    """Lines on columns that nothing reads, and the notes on the data."""
    unused = [Text(f"unused columns: {', '.join(data.unused)}", style="yellow")] if data.unused else []
    return unused + [Text(note, style="yellow") for note in data.notes]


def _memory(plan: Plan) -> list[Text]:
    """Lines on predicted memory and its limits."""
    memory, limit = plan.memory, size(plan.memory_limit)
    ordered = sorted(
        ((name, count) for name, count in memory.parts.items() if count), key=lambda part: -part[1]
    )
    rest = sum(count for _, count in ordered[MAX_PARTS:])
    parts = ", ".join(
        f"{name} {size(count)}"
        for name, count in [*ordered[:MAX_PARTS], *([("others", rest)] if rest else [])]
    )
    lines = [
        Text.assemble(
            "predicted memory per worker: ",
            (f"peak {size(memory.total)}", "bold"),
            f" of {limit} a worker may use, beyond Python itself",
        ),
        Text(f"  {parts}; while loading {size(memory.loading)}", style="dim"),
    ]
    if memory.ram:
        lines.append(
            Text(f"  RAM {size(memory.ram)} of {size(plan.ram_limit)} a worker may use of its machine")
        )
    return lines
