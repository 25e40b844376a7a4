"""Watches a run over all its starts: adds goodput and restarts to each step, and finds alerts."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.core.errors import Exit, OrchestratorError
from orchestrator.core.files import is_evaluation, read_lines
from orchestrator.core.reports import EvaluationReport, StepReport
from orchestrator.observe.alerts import Alert, AlertRules
from orchestrator.observe.goodput import StartLog
from orchestrator.recipe.schema import Alerts


class Watch:
    """limits: None for no alerts; resume_step: step of the checkpoint that the run resumes from."""

    def __init__(
        self, run_dir: Path, limits: Alerts | None, resume_step: int, starts: StartLog | None = None
    ) -> None:
        self._metrics, self._resume_step = run_dir / "metrics.jsonl", resume_step
        self._starts = starts or StartLog(run_dir)
        self._rules = None if limits is None else AlertRules(limits)
        self._last = resume_step

    def begin(self) -> tuple[Alert, ...]:
        """Records the start. Call it when metrics.jsonl has been cut back to the resume step."""
        self._starts.begin(self._resume_step)
        if self._rules is None:
            return ()
        for line in read_lines(self._metrics) if self._metrics.is_file() else ():
            metrics = {name: math.nan if value is None else value for name, value in line.items()}
            self._alerts(int(line.get("step", 0)), metrics)  # these alerts were reported before
        return self._rules.started(self._resume_step, self._starts.starts)

    def step(self, report: StepReport) -> tuple[StepReport, tuple[Alert, ...]]:
        """(the report with goodput and restarts, its alerts)."""
        self._last = report.step
        report = replace(report, metrics={**report.metrics, **self._starts.after(report.metrics)})
        return report, self._alerts(report.step, report.metrics)

    def evaluation(self, report: EvaluationReport) -> tuple[Alert, ...]:
        return self._alerts(report.step, report.metrics)

    def ended(self, error: BaseException | None) -> tuple[Alert, ...]:
        """Alerts at the end of a start. error: the exception that ended it, if any.

        A stop by the user and an error that is followed by a restart are not alerts.
        """
        if self._rules is None or not isinstance(error, Exception) or _continues(error):
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


def _continues(error: Exception) -> bool:
    """Whether the run resumes after the error, by itself or by the same command."""
    return isinstance(error, OrchestratorError) and (
        error.recovery != "none" or error.exit_code is Exit.RESUMABLE
    )
