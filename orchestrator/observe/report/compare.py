"""Runs side by side: the keys in which their recipes differ, and their metrics.

    DIR … --run_folders--> folders --read_run--> RunSummary --differences, table, to_json--> terminal, JSON

It reads recipe.yaml and metrics.jsonl only, so runs can be compared while they run, or after everything else
was deleted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from orchestrator.core.errors import MissingInput
from orchestrator.core.files import is_evaluation, read_lines
from orchestrator.core.format import duration, number
from orchestrator.observe.metric_names import ranked_by
from orchestrator.observe.metrics import step_seconds
from orchestrator.recipe.strict_yaml import parse

HIGHER = (
    "reward/mean",
    "exact_match",
    "preference_accuracy",
    "logp_accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "explained_variance",
)
"""Metrics of which more is better, without `eval/`; the same holds for pass@k and reward/NAME. Of losses less
is better. Other metrics have no best."""
SHOWN = ("loss", "nll_loss", *HIGHER, "kl", "policy/entropy", "completions/mean_length", "grad_norm")
"""Metrics that are compared, without `eval/`; reward components and pass@k are added."""


@dataclass(frozen=True, slots=True)
class Value:
    """A metric over a run."""

    final: float
    """The last recorded value."""
    best: float | None
    """None if more is neither better nor worse."""
    best_step: int | None


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The recipe and the results of one run folder."""

    name: str
    settings: Mapping[str, Any]
    """Values of the recipe by dotted key."""
    steps: int
    metrics: Mapping[str, Value]
    tokens_per_s: float | None
    """Median over the steps."""
    seconds: float
    """Time spent in the recorded steps."""
    wall_seconds: float | None
    """From the first start to the last step, with evaluations, checkpoints, restarts and the time the run was
    down. None if the run has not recorded it."""
    restarts: int | None
    """None if the run has not recorded it."""
    ranked_by: str | None = None
    """What preference_accuracy ranks pairs by."""


def run_folders(directory: Path) -> list[tuple[str, Path]]:
    """(name, folder) of a run, or of the stages of a pipeline in the order in which they feed each other.

    MissingInput if `directory` is neither.
    """
    if (directory / "metrics.jsonl").is_file():
        return [(directory.name or str(directory), directory)]
    stages = sorted(path.parent for path in directory.glob("*/metrics.jsonl"))
    if not stages:
        fix = "give the --output folder of a run or of a pipeline that has begun"
        raise MissingInput(
            f"{directory} holds no run", why="neither it nor a folder in it has a metrics.jsonl", fix=fix
        )
    recipes = {stage: _text(stage / "recipe.yaml") for stage in stages}
    feeds = {
        stage: [other for other in stages if other != stage and f"/{other.name}/export" in recipes[stage]]
        for stage in stages
    }
    return [(f"{directory.name}/{stage.name}", stage) for stage in TopologicalSorter(feeds).static_order()]


def read_run(name: str, folder: Path) -> RunSummary:
    """The records of a folder so far; DataError or ConfigError if a file is damaged."""
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "step" in line]
    steps = [line for line in lines if not is_evaluation(line)]
    speeds = [line["perf/tokens_per_s"] for line in steps if line.get("perf/tokens_per_s") is not None]
    keys = dict.fromkeys(key for line in lines for key in line if _is_shown(key))
    online = "reward/mean" in keys
    return RunSummary(
        name,
        _settings(folder / "recipe.yaml"),
        max((line["step"] for line in steps), default=0),
        {key: value for key in keys if (value := _value(key, lines, online)) is not None},
        median(speeds) if speeds else None,
        sum(map(step_seconds, steps)),
        _last(steps, "perf/elapsed_s"),
        _last(steps, "faults/restarts"),
        ranked_by(key for line in lines for key in line),
    )


def differences(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """Key -> its value in each run, for keys that are not equal in all runs; None if a recipe lacks the
    key."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    columns = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: values for key, values in columns.items() if any(value != values[0] for value in values)}


def to_json(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """{"runs": [...], "differences": {key: [value of each run]}}, without keys that are equal in all
    recipes."""
    records = [{name: value for name, value in asdict(run).items() if name != "settings"} for run in runs]
    return {"runs": records, "differences": differences(runs)}


def table(runs: Sequence[RunSummary]) -> Table:
    """A column per run: differing keys, steps, metrics (last, and best if there is one), speed."""
    comparison = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    comparison.add_column("", no_wrap=True)
    for run in runs:
        comparison.add_column(Text(run.name), justify="right", overflow="fold")
    for key, values in differences(runs).items():
        # Text: in a str [brackets] would be markup
        comparison.add_row(key, *(Text("" if value is None else str(value)) for value in values))
    comparison.add_section()
    comparison.add_row("steps", *(str(run.steps) for run in runs))
    for key in sorted(dict.fromkeys(key for run in runs for key in run.metrics), key=_order):
        comparison.add_row(_label(key, runs), *(_shown(run.metrics.get(key)) for run in runs))
    comparison.add_row(
        "tokens/s, median", *("" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}" for run in runs)
    )
    comparison.add_row("time in steps", *(duration(run.seconds) for run in runs))
    comparison.add_row(
        "wall time", *("" if run.wall_seconds is None else duration(run.wall_seconds) for run in runs)
    )
    comparison.add_row("restarts", *("" if run.restarts is None else str(run.restarts) for run in runs))
    return comparison


def _is_shown(key: str) -> bool:
    name = key.removeprefix("eval/")
    component = (
        name.startswith("reward/")
        and name.count("/") == 1
        and name not in ("reward/std", "reward/max", "reward/group_std")
    )
    return name in SHOWN or name.startswith("pass@") or (component and key.startswith("eval/"))


def _value(key: str, lines: Sequence[Mapping[str, Any]], online: bool) -> Value | None:
    """online: the loss is a policy gradient's, which does not measure progress."""
    points = [
        (line[key], line["step"]) for line in lines if line.get(key) is not None and math.isfinite(line[key])
    ]
    if not points:
        return None
    pick = None if online and key == "loss" else _better(key.removeprefix("eval/"))
    best, step = pick(points, key=lambda point: point[0]) if pick else (None, None)
    return Value(points[-1][0], best, step)


def _better(name: str) -> Callable[..., Any] | None:
    if name in ("loss", "nll_loss"):
        return min
    return max if name in HIGHER or name.startswith(("pass@", "reward/")) else None


def _last(lines: Sequence[Mapping[str, Any]], key: str) -> Any:
    return next((line[key] for line in reversed(lines) if line.get(key) is not None), None)


def _settings(path: Path) -> dict[str, Any]:
    """The recipe's values by dotted key, read as a recipe is (`off` is text); empty without a recipe."""
    return _flat(parse(path.read_text("utf-8"), str(path))[0], "") if path.is_file() else {}


def _flat(tree: Any, prefix: str) -> dict[str, Any]:
    """The values of a tree by dotted key; lists of mappings are part of the tree.

    Example: {"data.eval[0].path": "a.jsonl", …}
    """
    if isinstance(tree, dict) and tree:
        children = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(value, dict) for value in tree):
        children = [(f"{prefix}[{i}]", value) for i, value in enumerate(tree)]
    else:
        return {prefix: tree}
    return {key: value for name, below in children for key, value in _flat(below, name).items()}


def _text(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.is_file() else ""


def _order(key: str) -> tuple[bool, bool, int, str]:
    """Held-out metrics first, then in the order of SHOWN."""
    name = key.removeprefix("eval/")
    return not key.startswith("eval/"), name not in SHOWN, SHOWN.index(name) if name in SHOWN else 0, name


def _label(key: str, runs: Sequence[RunSummary]) -> str:
    """The row's label, with what pairs are ranked by; of several runs each one's, in their order."""
    if key != "eval/preference_accuracy":
        return key
    bases = dict.fromkeys(basis for run in runs if (basis := run.ranked_by) is not None)
    return f"{key} (by {', '.join(bases)})" if bases else key


def _shown(value: Value | None) -> str:
    if value is None:
        return "–"
    best = (
        ""
        if value.best is None or value.best == value.final
        else f" (best {number(value.best)} at {value.best_step})"
    )
    return number(value.final) + best
