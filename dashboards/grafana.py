"""Prints grafana.json: a row per question as in report.html, then a row of Ray's metrics of the cluster.

python dashboards/grafana.py > dashboards/grafana.json
"""

import json
from collections.abc import Iterator
from typing import Any

from orchestrator.observe.metric_names import gauge, grouped
from orchestrator.observe.report.panels import QUESTIONS, Panel

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SELECTED = 'run=~"$run", stage=~"$stage"'
CLUSTER: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("CPU per node", "percent", ("ray_node_cpu_utilization",)),
    ("GPU per node", "percent", ("ray_node_gpus_utilization",)),
    ("Memory per node", "bytes", ("ray_node_mem_used", "ray_node_mem_total")),
    ("GPU memory", "decmbytes", ("ray_node_gram_used", "ray_node_gram_available")),
    ("Network per node", "Bps", ("ray_node_network_send_speed", "ray_node_network_receive_speed")),
    ("Free disk per node", "bytes", ("ray_node_disk_free",)),
)
COLUMNS, WIDTH, HEIGHT = 3, 8, 7


def dashboard() -> dict[str, Any]:
    """The dashboard. Import it in Grafana, and choose the Prometheus that scrapes Ray."""
    rows = [
        (question.title, [_run_panel(panel) for panel in question.panels if panel.names])
        for question in QUESTIONS
    ]
    rows.append(("The cluster", [_cluster_panel(*panel) for panel in CLUSTER]))
    return {
        "uid": "orchestrator",
        "title": "orchestrator",
        "tags": ["orchestrator", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [_source_variable(), _variable("run"), _variable("stage")]},
        "panels": list(_with_positions(rows)),
    }


def _run_panel(panel: Panel) -> dict[str, Any]:
    # a panel may hold several metrics of several stages: a line is named after both
    targets = [(f"ray_{gauge(name)}{{{SELECTED}}}", f"{{{{stage}}}} {grouped(name)}") for name in panel.names]
    return _timeseries(panel.title, "short", targets, {"min": 0} if panel.from_zero else {})


def _cluster_panel(title: str, unit: str, names: tuple[str, ...]) -> dict[str, Any]:
    return _timeseries(
        title, unit, [(name, f"{{{{ip}}}} {name.removeprefix('ray_node_')}") for name in names], {"min": 0}
    )


def _timeseries(
    title: str, unit: str, targets: list[tuple[str, str]], limits: dict[str, float]
) -> dict[str, Any]:
    queries = [
        {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
        for i, (expression, legend) in enumerate(targets)
    ]
    defaults = {"unit": unit, "custom": {"lineWidth": 1, "showPoints": "never", "spanNulls": True}, **limits}
    return {
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "targets": queries,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }


def _with_positions(rows: list[tuple[str, list[dict[str, Any]]]]) -> Iterator[dict[str, Any]]:
    """Panels with ids and positions, three side by side, each row under a header."""
    number, top = 0, 0
    for title, panels in rows:
        number += 1
        yield {
            "type": "row",
            "id": number,
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": top, "w": 24, "h": 1},
        }
        top += 1
        for i, panel in enumerate(panels):
            number += 1
            position = {"x": i % COLUMNS * WIDTH, "y": top + i // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT}
            yield {**panel, "id": number, "gridPos": position}
        top += -(-len(panels) // COLUMNS) * HEIGHT


def _source_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
    }


def _variable(label: str) -> dict[str, Any]:
    selection = {"includeAll": True, "multi": True, "current": {"text": ["All"], "value": ["$__all"]}}
    query = f"label_values(ray_{gauge('global_step')}, {label})"
    return {
        "name": label,
        "type": "query",
        "datasource": SOURCE,
        "query": query,
        "refresh": 2,
        "sort": 1,
        **selection,
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
