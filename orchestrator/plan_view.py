"""The plan as a person reads it: batch arithmetic first, then why, then data and memory."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.plan import DataReport, Plan
from orchestrator.stages import Ignored
from orchestrator.words import size

BAR = 30


def render(plan: Plan) -> RenderableType:
    """Everything `orchestrator plan` prints."""
    return Group(
        Text(plan.arithmetic, style="bold"),
        *_nearest(plan),
        Text(f"{plan.total_steps} optimizer steps of {plan.algorithm}"),
        Text(),
        _choices(plan),
        Text(),
        _data(plan.data),
        Text(),
        _memory(plan),
        Text(f"traffic per worker and step: {size(plan.traffic.reduced)} reduced, {size(plan.traffic.gathered)} gathered"),
    )


def not_read(keys: Sequence[Ignored]) -> RenderableType:
    """The inherited keys that a stage does not read, a line each; nothing where there are none."""
    return Group(*([Text("inherited, and not read by this run:")] if keys else []), *(Text(f"  {key}", style="dim") for key in keys))


def _nearest(plan: Plan) -> list[Text]:
    if not plan.nearest:
        return []
    return [Text(f"cuts evenly at batch.effective {' or '.join(map(str, plan.nearest))}; as it is, the result is the same and a little slower")]


def _choices(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for choice in plan.choices:
        table.add_row(choice.name, Text(choice.value, style="bold"), Text(choice.reason, style="dim"))
    return table


def _data(data: DataReport) -> Group:
    formats = ", ".join(f"{name} ({form})" for name, form in zip(data.sources, data.formats, strict=True))
    lines = [
        Text(f"data: {data.rows} rows of {formats}; {data.kept} kept, {data.held_out} held out"),
        Text(f"bad rows {len(data.bad)}, too long: {data.dropped} dropped, {data.truncated} truncated ({data.made_identical} pairs made equal)"),
    ]
    lines += [Text(f"  {bad}", style="yellow") for bad in data.bad[:5]]
    if data.not_prefix:
        lines.append(Text(f"{data.not_prefix} prompts are not a token prefix of their completions; cut back to the shared tokens", style="yellow"))
    lines += data_notes(data)
    lines.append(Text("tokens: " + ", ".join(f"{name} {value}" for name, value in data.quantiles.items())))
    most = max(count for _, count in data.histogram)
    for bound, count in data.histogram:
        lines.append(Text(f"  ≤ {bound:>6} {'█' * max(1, round(BAR * count / most))} {count}", style="dim"))
    return Group(*lines)


def data_notes(data: DataReport) -> list[Text]:
    """What a user should know of the data before a run: columns that nothing reads, and notes."""
    unused = [Text(f"unused columns: {', '.join(data.unused)}", style="yellow")] if data.unused else []
    return unused + [Text(note, style="yellow") for note in data.notes]


def _memory(plan: Plan) -> Group:
    table = Table(box=None, pad_edge=False, show_header=False)
    memory, limit = plan.memory, f"of {size(plan.memory_limit)} a worker may use"
    for name, count in memory.parts.items():
        if count:
            table.add_row(f"  {name}", Text(size(count), justify="right"))
    table.add_row("  peak", Text(size(memory.total), style="bold", justify="right"), limit)
    table.add_row("  while loading", Text(size(memory.loading), justify="right"), limit)
    if memory.ram:
        table.add_row("  RAM", Text(size(memory.ram), justify="right"), f"of {size(plan.ram_limit)} that each may use of its machine's")
    return Group(Text("predicted memory per worker, beyond the Python process itself"), table)
