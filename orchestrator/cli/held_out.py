"""The table of held-out metrics that `train` prints last."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from orchestrator.run.supervise import Outcome


def held_out(outcomes: "dict[str, Outcome]") -> Table:
    """A row for each metric, with its value before and after each stage."""
    from orchestrator.observe.metric_names import display_name

    table = Table(title="held out", title_justify="left")
    table.add_column("metric")
    for name in outcomes:
        table.add_column(f"before {name}", justify="right")
        table.add_column(f"after {name}", justify="right")
    metrics = dict.fromkeys(k for o in outcomes.values() for k in o.after)
    names = (
        "eval/loss",
        "eval/preference_accuracy",
        "eval/logp_accuracy",
        "eval/rewards/margins",
        "eval/exact_match",
        "eval/reward/mean",
    )
    components = [m for m in metrics if m.startswith("eval/reward/") and m != "eval/reward/mean"]
    shown = {*names, *(components if len(components) > 1 else ())}  # a single component is the reward itself
    for metric in (m for m in metrics if m in shown or m.startswith("eval/pass@")):
        last = next(o.after for o in reversed(outcomes.values()) if metric in o.after)
        cells = [_cell(metric, o.after, side) for o in outcomes.values() for side in (o.before, o.after)]
        table.add_row(display_name(metric, last), *cells)
    return table


def _cell(metric: str, measured: Mapping[str, float], side: Mapping[str, float]) -> str:
    """– if the stage measures this but has no value (policy equals reference); empty if it does not."""
    return f"{side[metric]:.3f}" if metric in side else "–" if metric in measured else ""
