"""`report.html`: one self-contained page of a run. No framework, no network; light and dark; fits a phone.

metrics.jsonl  samples.jsonl  alerts.jsonl  recipe.yaml  plan.json  ->  report.html
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from orchestrator.core.errors import DataError, MissingInput
from orchestrator.core.files import is_evaluation, read_lines, write_atomically
from orchestrator.core.format import duration, number
from orchestrator.observe.metric_names import display_name, ranked_by
from orchestrator.observe.metrics import step_seconds
from orchestrator.observe.report import charts
from orchestrator.observe.report.charts import Chart, Point, Series
from orchestrator.observe.report.panels import PHASES, QUESTIONS, Question
from orchestrator.observe.report.samples import sample_sections
from orchestrator.recipe.strict_yaml import parse

Line = Mapping[str, Any]
EVAL = "eval/"
HIDDEN = {"step", "num_tokens", "examples", "optimizer_steps"}
"""Counters of a line that get no chart."""
CHARTED_IN_PANELS = ("perf/", "time/", "weights/")
"""Prefixes of metrics that get no chart outside of the panels."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The files of a run folder, as far as the page shows them."""

    steps: tuple[Line, ...]
    """Lines of metrics.jsonl that training steps wrote."""
    evaluations: tuple[Line, ...]
    """Lines of metrics.jsonl that evaluations wrote."""
    samples: tuple[Line, ...]
    """Lines of samples.jsonl of the last step that has any."""
    alerts: tuple[Line, ...]
    """Lines of alerts.jsonl."""
    recipe_text: str
    recipe: Mapping[str, Any]
    plan: Mapping[str, Any]


def write_report(run_dir: Path) -> Path:
    """Writes report.html from the run's records so far, and returns its path.

    MissingInput without metrics; DataError or ConfigError if a file is damaged.
    """
    page = render(_read(run_dir), run_dir.resolve().name)
    path = run_dir / "report.html"
    # ASCII is read the same under every locale
    write_atomically(path, page.encode("ascii", "xmlcharrefreplace").decode("ascii"))
    return path


def render(run: RunRecord, folder: str) -> str:
    """The page. folder: name of the run folder, shown if the recipe does not name the run."""
    name = escape(str(_at(run.recipe, "run", "name") or folder))
    sections = [
        _head(run, name),
        _before_after(run.evaluations),
        _section("Alerts", _alerts(run.alerts)),
        *(_question(question, run.steps) for question in QUESTIONS),
        _section("Held-out evaluation", _grid(_evaluation_charts(run.evaluations))),
        _section("Other metrics", _grid(_other_charts(run.steps))),
        *_samples(run.samples),
        _section("Plan", _plan(run.plan)),
        _section(
            "Recipe",
            f"<details><summary>recipe.yaml</summary><pre>{escape(run.recipe_text)}</pre></details>"
            if run.recipe_text
            else "",
        ),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{name}</title>'
        f"<style>{STYLE}{charts.STYLE}</style></head>\n<body><main>{''.join(sections)}</main>"
        f"<script>{charts.SCRIPT}</script></body></html>\n"
    )


def _read(run_dir: Path) -> RunRecord:
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        fix = "give the --output folder of a run; the first evaluation or step writes the file"
        raise MissingInput(f"{metrics} is missing", why="a report is made from it", fix=fix)
    lines = [line for line in read_lines(metrics) if "step" in line]
    samples = _optional_lines(run_dir / "samples.jsonl")
    last = max((s.get("step", 0) for s in samples), default=0)
    recipe_text = _optional_text(run_dir / "recipe.yaml")
    return RunRecord(
        steps=tuple(x for x in lines if not is_evaluation(x)),
        evaluations=tuple(x for x in lines if is_evaluation(x)),
        samples=tuple(s for s in samples if s.get("step", 0) == last),
        alerts=tuple(_optional_lines(run_dir / "alerts.jsonl")),
        recipe_text=recipe_text,
        recipe=_mapping(parse(recipe_text, str(run_dir / "recipe.yaml"))[0]),
        plan=_mapping(_json(run_dir / "plan.json")),
    )


def _optional_lines(path: Path) -> list[dict[str, Any]]:
    return read_lines(path) if path.is_file() else []


def _optional_text(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.is_file() else ""


def _json(path: Path) -> Any:
    try:
        return json.loads(_optional_text(path) or "null")
    except json.JSONDecodeError as error:
        fix = "restore it from the run, or remove it"
        raise DataError(f"{path} cannot be read", why=str(error), fix=fix) from error


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _at(tree: Any, *keys: str) -> Any:
    """The value below these keys; None if one is missing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _section(title: str, body: str, lead: str = "") -> str:
    if not body:
        return ""
    lead_html = f"<p class=lead>{escape(lead)}</p>" if lead else ""
    return f"<section><h2>{escape(title)}</h2>{lead_html}{body}</section>"


# --- head


def _head(run: RunRecord, name: str) -> str:
    path = _at(run.recipe, "model", "path")
    # the last two parts: a hub name, or the end of a folder
    model = "/".join(Path(path).parts[-2:]) if path else _at(run.recipe, "model", "tiny", "architecture")
    random = "random-weight " if not path and model else ""
    parts = [_at(run.recipe, "algorithm", "name"), f"{random}{model}" if model else None]
    line = " · ".join(escape(str(part)) for part in parts if part)
    arithmetic = _at(run.plan, "arithmetic")
    badge = f"<p class=arithmetic>{escape(str(arithmetic))}</p>" if arithmetic else ""
    tiles = "".join(
        f"<div class=tile><span>{escape(k)}</span><b>{escape(v)}</b></div>"
        for k, v in _header_tiles(run).items()
    )
    return (
        f"<header><p class=eyebrow>{line or 'training run'}</p><h1>{name}</h1>{badge}<div "
        f"class=tiles>{tiles}</div></header>"
    )


def _header_tiles(run: RunRecord) -> dict[str, str]:
    if not run.steps:
        return {"steps": "none yet"}
    first, last = run.steps[0], run.steps[-1]
    total = _at(run.plan, "total_steps")
    facts = {"steps": f"{last['step']} of {total}" if total else str(last["step"])}
    # a policy gradient's loss is about 0 throughout
    shown = "reward/mean" if "reward/mean" in last else "loss"
    if first.get(shown) is not None and last.get(shown) is not None:
        facts[shown.removesuffix("/mean")] = f"{number(first[shown])} → {number(last[shown])}"
    if last.get("num_tokens"):
        facts["tokens"] = _short(last["num_tokens"])
    rates = sorted(x["perf/tokens_per_s"] for x in run.steps if x.get("perf/tokens_per_s"))
    if rates:
        facts["median speed"] = f"{_short(rates[len(rates) // 2])} tok/s"
    seconds = sum(map(step_seconds, run.steps))
    if seconds:
        facts["time in steps"] = duration(seconds)
    if last.get("faults/restarts"):
        facts["restarts"] = str(last["faults/restarts"])
    if last.get("skipped"):
        facts["skipped steps"] = str(last["skipped"])
    return facts


def _short(value: float) -> str:
    """Example: 950, 12.3k, 4.56M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:,.0f}"


def _before_after(evaluations: Sequence[Line]) -> str:
    if not evaluations:
        return ""
    first, last = evaluations[0], evaluations[-1]
    names = [
        n
        for question in QUESTIONS
        for panel in question.panels
        for n in panel.among(last)
        if n.startswith(EVAL)
    ]
    names += [n for n in last if n.startswith(EVAL) and n not in names]
    single = len(evaluations) == 1
    rows = "".join(_change(display_name(n, last), first.get(n), last.get(n), single) for n in names)
    before = "" if single else f"<th>step {first['step']}</th>"
    change = "" if single else "<th>change</th>"
    head = f"<tr><th>metric</th>{before}<th>step {last['step']}</th>{change}</tr>"
    table = f"<div class=scroll><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"
    lead = f"Held-out data, {'the only evaluation so far' if single else 'first and last evaluation'}."
    return _section("Evaluation" if single else "Before and after", table, lead)


def _change(name: str, before: float | None, after: float | None, single: bool) -> str:
    cells = [after] if single else [before, after]
    shown = "".join(f"<td>{'–' if v is None else number(v)}</td>" for v in cells)
    if not single:
        shown += (
            "<td class=soft>–</td>"
            if before is None or after is None
            else f"<td class=soft>{after - before:+.4g}</td>"
        )
    return f"<tr><td>{escape(name)}</td>{shown}</tr>"


# --- charts


def _grid(shown: Sequence[Chart]) -> str:
    figures = "".join(charts.figure(chart) for chart in shown)
    return f"<div class=grid-of-charts>{figures}</div>" if figures else ""


def _points(lines: Sequence[Line], name: str) -> tuple[Point, ...]:
    return tuple((float(x["step"]), x[name]) for x in lines if name in x)


def _series(lines: Sequence[Line], names: Sequence[str]) -> tuple[Series, ...]:
    present = [n for n in names if any(n in x for x in lines)]
    heads = {n.rpartition("/")[0] for n in present}
    # a chart of rewards/chosen and rewards/rejected names its lines chosen and rejected
    short = len(present) > 1 and len(heads) == 1
    return tuple(Series(n.rpartition("/")[2] if short else n, _points(lines, n)) for n in present)


def _question(question: Question, steps: Sequence[Line]) -> str:
    """The section of one question. Metrics that were 0 throughout are listed in a line, not drawn."""
    emitted = _names(steps)
    shown, quiet = [], []
    for panel in question.panels:
        names = [name for name in panel.among(emitted) if not name.startswith(EVAL)]
        series = _series(steps, [*names, *(_other_phases(emitted) if panel.steps == PHASES else ())])
        if series and _quiet(series):
            quiet.append(panel.title[0].lower() + panel.title[1:])
        elif series:
            shown.append(Chart(panel.title, series, panel.smooth, panel.from_zero))
    return _section(question.title, _grid(shown), f"0 throughout: {', '.join(quiet)}." if quiet else "")


def _quiet(series: Sequence[Series]) -> bool:
    return all(y == 0 for line in series for _, y in line.points)


def _names(lines: Sequence[Line]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for line in lines for name in line))


def _other_phases(emitted: Sequence[str]) -> tuple[str, ...]:
    """Phases that no panel lists: only some algorithms have them."""
    return tuple(
        n
        for n in emitted
        if n.startswith("time/") and n.count("/") == 1 and n not in (*PHASES, "time/step", "time/learn")
    )


def _other_charts(steps: Sequence[Line]) -> list[Chart]:
    """Charts of metrics that no panel shows, such as parts of a loss."""
    emitted = _names(steps)
    asked = {
        name for question in QUESTIONS for panel in question.panels for name in panel.among(emitted)
    } | HIDDEN
    names = (n for n in emitted if n not in asked and not n.startswith(CHARTED_IN_PANELS))
    others = (Chart(n, _series(steps, [n]), smooth=True) for n in names)
    return [chart for chart in others if not _quiet(chart.series)]


def _evaluation_charts(evaluations: Sequence[Line]) -> list[Chart]:
    if len(evaluations) < 2:
        return []  # the table shows the only evaluation
    names = [name for name in _names(evaluations) if name.startswith(EVAL)]
    remaining, shown = dict.fromkeys(names), []
    for panel in (panel for question in QUESTIONS for panel in question.panels):
        asked = panel.among(names)
        series = _series(evaluations, asked)
        remaining = {name: None for name in remaining if name not in asked}
        if series and not _quiet(series):
            shown.append(Chart(_heading(panel.title, names), series))
    return shown + [Chart(name.removeprefix(EVAL), _series(evaluations, [name])) for name in remaining]


def _heading(title: str, metrics: Sequence[str]) -> str:
    """The panel's title, with what pairs are ranked by."""
    basis = ranked_by(metrics) if title.startswith("Preference accuracy") else None
    return title if basis is None else f"{title}, by {basis}"


# --- alerts, samples, plan


def _alerts(alerts: Sequence[Line]) -> str:
    rows = [(f"step {a.get('step')}", a.get("level"), a.get("title"), a.get("text")) for a in alerts]
    return _table_of_words(rows)


def _samples(samples: Sequence[Line]) -> list[str]:
    return [_section(title, body, lead) for title, body, lead in sample_sections(samples)]


def _plan(plan: Mapping[str, Any]) -> str:
    rows = [
        (c.get("name"), c.get("value"), c.get("reason"))
        for c in plan.get("choices", [])
        if isinstance(c, dict)
    ]
    for name, title in (("memory", "predicted memory per rank"), ("traffic", "traffic per rank and step")):
        parts = {k: v for k, v in (plan.get(name) or {}).items() if isinstance(v, int | float) and v}
        if parts:
            total = parts.pop("total", None) or sum(parts.values())
            rows.append(
                (title, f"{total / 1e9:.3g} GB", ", ".join(f"{k} {v / 1e9:.3g}" for k, v in parts.items()))
            )
    return _table_of_words(rows)


def _table_of_words(rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{escape(str(c))}</td>' for c in row)}</tr>" for row in rows)
    return f"<div class=scroll><table class=words><tbody>{cells}</tbody></table></div>" if rows else ""


STYLE = """
:root {
  --page: #f7f7f5; --card: #fff; --ink: #1c1e21; --soft: #6a6f76; --edge: #e6e5e1; --grid: #eeede9;
  --axis: #c3c2bc; --good: #2f8f5b; --bad: #c2504a;
  --c-0: #3569c8; --c-1: #d07a1c; --c-2: #16877a; --c-3: #a8478f; --c-4: #7a6a2f; --c-5: #5b6472;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14161a; --card: #1c1f24; --ink: #e8e9eb; --soft: #9aa1aa; --edge: #2c3037; --grid: #272b31;
  --axis: #4a505a; --good: #5cc28b; --bad: #ea857f;
  --c-0: #7ba7f5; --c-1: #f0a850; --c-2: #4cc3b3; --c-3: #de86c6; --c-4: #cbb75f; --c-5: #a4adba; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 var(--sans); }
main { max-width: 1240px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { margin: 2px 0 10px; font-size: 32px; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 19px; }
section { margin-top: 40px; }
.eyebrow, .lead, .soft, .small { color: var(--soft); }
.eyebrow { margin: 0; } .lead { margin: -8px 0 12px; } .small { margin: 4px 0 0; font-size: 12px; }
.tile, .scroll, article, details, .arithmetic {
  background: var(--card); border: 1px solid var(--edge); border-radius: 12px; }
.arithmetic { display: inline-block; margin: 0 0 4px; padding: 6px 12px; font: 14px/1.5 var(--mono); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  gap: 12px; margin-top: 16px; }
.tile { padding: 12px 16px; }
.tile span { display: block; font-size: 13px; color: var(--soft); }
.tile b { font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums; }
.grid-of-charts, .samples {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 16px; }
.samples { align-items: start; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 8px 16px; text-align: right; font-variant-numeric: tabular-nums; }
th { font-size: 13px; font-weight: 500; color: var(--soft); }
tbody tr { border-top: 1px solid var(--edge); }
table.words tr:first-child { border-top: 0; }
th:first-child, td:first-child, .words td { text-align: left; }
.words td:last-child { color: var(--soft); }
article { padding: 12px 16px 16px; min-width: 0; }
.score { margin: 0 0 4px; font-size: 13px; color: var(--soft); }
.score b { color: var(--ink); }
.text { margin-top: 8px; padding-left: 10px; border-left: 3px solid var(--edge); }
.text > span { font-size: 12px; color: var(--soft); }
.text.good { border-color: var(--good); } .text.bad { border-color: var(--bad); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 var(--mono); }
.text pre { max-height: 15em; overflow-y: auto; }
details { padding: 12px 16px; } summary { cursor: pointer; } details pre { margin-top: 12px; }
@media (max-width: 560px) {
  main { padding: 24px 14px 48px; } h1 { font-size: 25px; } th, td { padding: 8px 10px; }
  .tiles { grid-template-columns: 1fr 1fr; }
}
"""
