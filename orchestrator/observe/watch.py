"""Watches one run over all its attempts: adds goodput and restarts to every step, and says what is wrong."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.core.errors import Interrupted, OrchestratorError, OutOfMemory, WorkerLost
from orchestrator.core.files import is_evaluation, read_lines
from orchestrator.core.reports import EvaluationReport, StepReport
from orchestrator.observe.alerts import Alert, AlertRules
from orchestrator.observe.goodput import StartLog
from orchestrator.recipe.schema import Alerts

GOES_ON = (Interrupted, WorkerLost, OutOfMemory)
"""Ends of an attempt that another attempt follows."""


class Watch:
    """limits: None for no alerts; resume_step: that the run goes on from."""

    def __init__(
        self, run_dir: Path, limits: Alerts | None, resume_step: int, attempts: StartLog | None = None
    ) -> None:
        self._metrics, self._resume_step = run_dir / "metrics.jsonl", resume_step
        self._attempts = attempts or StartLog(run_dir)
        self._rules = None if limits is None else AlertRules(limits)
        self._last = resume_step

    def begin(self) -> tuple[Alert, ...]:
        """Once the ledger is at the step to go on from."""
        self._attempts.begin(self._resume_step)
        if self._rules is None:
            return ()
        for line in read_lines(self._metrics) if self._metrics.is_file() else ():
            metrics = {name: math.nan if value is None else value for name, value in line.items()}
            self._alerts(int(line.get("step", 0)), metrics)  # said already
        return self._rules.started(self._resume_step, self._attempts.starts)

    def step(self, report: StepReport) -> tuple[StepReport, tuple[Alert, ...]]:
        """The report with what the attempts say, and what is wrong with it."""
        self._last = report.step
        whole = replace(report, metrics={**report.metrics, **self._attempts.after(report.metrics)})
        return whole, self._alerts(report.step, whole.metrics)

    def evaluation(self, report: EvaluationReport) -> tuple[Alert, ...]:
        return self._alerts(report.step, report.metrics)

    def ended(self, error: BaseException | None) -> tuple[Alert, ...]:
        """At the end of an attempt. error: that ended it; one that the user asked for, or that is tried
        again, is no alert."""
        if self._rules is None or not isinstance(error, Exception) or isinstance(error, GOES_ON):
            return ()
        text = error.what if isinstance(error, OrchestratorError) else f"{type(error).__name__}: {error}"
        return (Alert("the run failed", text, "ERROR", self._last),)

    def _alerts(self, step: int, metrics: Mapping[str, Any]) -> tuple[Alert, ...]:
        if self._rules is None:
            return ()
        return (
            self._rules.evaluation(EvaluationReport(step, metrics))
            if is_evaluation(metrics)
            else self._rules.step(StepReport(step, metrics))
        )
