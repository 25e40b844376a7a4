"""Metrics of every step as Ray gauges. Ray's agent on the driver's node serves them to Prometheus, beside
Ray's own."""

import math
from collections.abc import Mapping

import ray
from ray.util.metrics import Gauge

from orchestrator.core.reports import EvaluationReport, StepReport
from orchestrator.observe.alerts import Alert
from orchestrator.observe.metric_names import gauge
from orchestrator.observe.sink import Note

TAGS = ("run", "algorithm", "stage")


class RayMetricsSink:
    """Sets one gauge per metric, made when the metric first comes. Does nothing if Ray has no metrics agent.

    run: the name that a run and its stages have in common; stage: the stage's own name. Values that are not
    finite are left out.
    """

    def __init__(self, run: str, algorithm: str, stage: str) -> None:
        self._tags: dict[str, str] = {"run": run, "algorithm": algorithm, "stage": stage}
        self._gauges: dict[str, Gauge] = {}
        self._served: bool | None = None

    def open(self, note: Note) -> None:
        """Does nothing: Ray may not have started yet."""

    def step(self, report: StepReport) -> None:
        self._set({**report.metrics, "global_step": report.step})

    def evaluation(self, report: EvaluationReport) -> None:
        self._set(report.metrics)

    def note(self, message: str) -> None:
        """Does nothing: a note is not a metric."""

    def alert(self, alert: Alert) -> None:
        """Does nothing: Prometheus has its own alert rules."""

    def close(self, *, failed: bool = False) -> None:
        """Does nothing: the agent forgets the gauges of a process that ended."""

    def _set(self, metrics: Mapping[str, float]) -> None:
        if self._served is None:
            self._served = ray.is_initialized() and any(
                node["Alive"] and node.get("MetricsExportPort") for node in ray.nodes()
            )
        if not self._served:
            return
        for metric, value in metrics.items():
            if math.isfinite(value):
                name = gauge(metric)
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, description=f"{metric} of metrics.jsonl", tag_keys=TAGS)
                self._gauges[name].set(value, tags=self._tags)
