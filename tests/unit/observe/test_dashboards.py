"""The dashboards in dashboards/: their queries and layout, and that grafana.json is what the code prints."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.observe.metric_names import gauge
from orchestrator.observe.report.panels import QUESTIONS, board

DASHBOARDS = Path(__file__).parents[3] / "dashboards"
RAY_METRIC = re.compile(r"\bray_\w+")


@pytest.fixture
def grafana(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(DASHBOARDS)
    monkeypatch.delitem(sys.modules, "grafana", raising=False)
    import grafana  # pyright: ignore[reportMissingImports]

    return grafana


@pytest.fixture
def dashboard() -> dict[str, Any]:
    return json.loads((DASHBOARDS / "grafana.json").read_text())


def expressions(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (
        variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"
    )


def test_the_file_is_what_the_code_prints(grafana: Any, dashboard: dict[str, Any]) -> None:
    assert dashboard == grafana.dashboard(), "python dashboards/grafana.py > dashboards/grafana.json"


def test_every_expression_uses_a_gauge_of_the_panels_or_one_of_ray(
    dashboard: dict[str, Any],
) -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    ours = {
        f"ray_{gauge(name)}" for question in QUESTIONS for panel in question.panels for name in panel.names
    }
    rays = {f"ray_{name}" for name in METRICS_GAUGES}
    asked = {name for expression in expressions(dashboard) for name in RAY_METRIC.findall(expression)}
    assert asked - rays == {*ours, f"ray_{gauge('global_step')}"}
    assert len(asked & rays) >= 8


def test_ids_are_unique_and_no_panel_lies_on_another(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert [p["title"] for p in panels if p["type"] == "row"] == [
        *(question.title for question in QUESTIONS),
        "The cluster",
    ]
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    for panel in panels:
        ids = [target["refId"] for target in panel.get("targets", ())]
        assert len(ids) == len(set(ids))
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel.get("targets", ()))


def test_a_board_has_only_what_a_run_emits() -> None:
    questions = dict(board({"loss", "eval/loss", "reward/mean", "step"}))
    assert questions == {"Is it learning?": (("Reward", ("reward/mean",)), ("Loss", ("loss", "eval/loss")))}
