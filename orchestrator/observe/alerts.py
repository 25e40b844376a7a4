"""Alert rules: from the stream of reports to alerts. Pure: no clock, no files.

A rule fires once per cause, and again only after `steps` steps without the cause.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from orchestrator.core.reports import EvaluationReport, StepReport
from orchestrator.observe.advice import ADVICE
from orchestrator.observe.drift import ComponentFell, HeldOutLossRose, KlBeyond, NoSignal
from orchestrator.observe.latch import Latch, RunningMean, mean
from orchestrator.recipe.schema import Alerts

Metrics = Mapping[str, float]
Level = Literal["INFO", "WARN", "ERROR"]


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert, as a line of alerts.jsonl."""

    title: str
    text: str
    """The numbers, why they matter, and a fix."""
    level: Level
    """A level of wandb's alerts."""
    step: int
    """Step of the report that raised it."""


class Rule(Protocol):
    def check(self, metrics: Metrics) -> str | None:
        """The problem, if this report is the first to show it, else None. Missing metrics are no problem."""
        ...


class NonFinite:
    """A step was refused, or its loss or gradient norm is not finite."""

    def __init__(self, limits: Alerts) -> None:
        self._latch, self._skipped = Latch(1, limits.steps), 0.0

    def check(self, metrics: Metrics) -> str | None:
        before, self._skipped = self._skipped, metrics.get("skipped", self._skipped)
        refused = int(self._skipped - before)
        infinite = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics.get(name, 0.0))]
        if not self._latch(refused > 0 or bool(infinite)):
            return None
        return (
            f"{' and '.join(infinite)} not finite"
            if infinite
            else f"{refused} steps were refused: loss or gradient not finite"
        )


class RewardFell:
    """reward/mean stays far below its best. Both are means over `steps` steps; the distance is measured in
    typical standard deviations of one reward."""

    def __init__(self, limits: Alerts) -> None:
        self._drop, self._latch = limits.reward_drop, Latch(limits.steps, limits.steps)
        self._recent: deque[float] = deque(maxlen=limits.steps)
        self._best, self._deviation = -math.inf, RunningMean()

    def check(self, metrics: Metrics) -> str | None:
        reward, deviation = metrics.get("reward/mean", math.nan), metrics.get("reward/std", math.nan)
        if not math.isfinite(reward) or not math.isfinite(deviation):
            return None
        self._recent.append(reward)
        typical = self._deviation.after(deviation)
        if len(self._recent) == self._recent.maxlen:
            self._best = max(self._best, mean(self._recent))
        fallen = typical > 0 and reward < self._best - self._drop * typical
        return (
            f"reward/mean {reward:.4g}, its best was {self._best:.4g}; one reward's deviation {typical:.4g}"
            if self._latch(fallen)
            else None
        )


class RewardFlat:
    """All rewards are equal: nothing is left to learn from them."""

    def __init__(self, limits: Alerts) -> None:
        self._spread, self._deviation = limits.reward_spread, RunningMean()
        self._latch = Latch(limits.steps, limits.steps)

    def check(self, metrics: Metrics) -> str | None:
        deviation = metrics.get("reward/std", math.nan)
        if not math.isfinite(deviation):
            return None
        flat = deviation <= self._spread * self._deviation.after(deviation)
        return f"every reward is {metrics.get('reward/mean', math.nan):.4g}" if self._latch(flat) else None


class MarginAlone:
    """Margins grow while accuracy does not: the loss falls on pairs that were right already.

    prefix: "" or "eval/"; window: reports to average over.
    """

    def __init__(self, limits: Alerts, prefix: str, window: int) -> None:
        self._limits, self._prefix, self._latch = limits, prefix, Latch(1, window)
        self._recent: deque[tuple[float, float]] = deque(maxlen=window)
        self._mark: tuple[float, float] | None = None

    def check(self, metrics: Metrics) -> str | None:
        limits = self._limits
        margin, accuracy = (
            metrics.get(f"{self._prefix}rewards/{name}", math.nan) for name in ("margins", "accuracies")
        )
        if not math.isfinite(margin) or f"{self._prefix}rewards/accuracies" not in metrics:
            return None
        # an unknown accuracy means that all pairs are ties, which count one half
        self._recent.append((margin, accuracy if math.isfinite(accuracy) else 0.5))
        if len(self._recent) < (self._recent.maxlen or 0):
            return None
        margin, accuracy = (mean(values) for values in zip(*self._recent, strict=True))
        if self._mark is None or accuracy >= self._mark[1] + limits.accuracy_gain:
            self._mark = (margin, accuracy)
        grown = margin - self._mark[0] >= limits.margin_growth and accuracy < limits.accuracy_enough
        if not self._latch(grown):
            return None
        (then, right), where = self._mark, f"{self._prefix}rewards"
        return (
            f"{where}/margins grew from {then:.4g} to {margin:.4g}, {where}/accuracies only from "
            f"{right:.3f} to {accuracy:.3f}"
        )


class GoodputLow:
    """Too little of the time since the first start was spent in steps."""

    def __init__(self, limits: Alerts) -> None:
        self._limits, self._latch = limits, Latch(limits.steps, limits.steps)

    def check(self, metrics: Metrics) -> str | None:
        goodput, elapsed = metrics.get("perf/goodput"), metrics.get("perf/elapsed_s", 0.0)
        if goodput is None or elapsed < self._limits.goodput_after_s:
            return None
        share = f"{goodput:.0%} of {elapsed / 3600:.1f} h since the first start were spent in steps"
        return share if self._latch(goodput < self._limits.goodput) else None


class AlertRules:
    """All rules of a run. A resumed run feeds them its earlier reports first, so no alert is repeated."""

    def __init__(self, limits: Alerts) -> None:
        self._limits = limits
        self._steps: tuple[tuple[str, Level, Rule], ...] = (
            ("non-finite step", "ERROR", NonFinite(limits)),
            ("reward collapse", "ERROR", RewardFell(limits)),
            ("rewards without spread", "WARN", RewardFlat(limits)),
            ("no signal", "ERROR", NoSignal(limits)),
            ("far from the reference", "WARN", KlBeyond(limits)),
            ("a component falls", "WARN", ComponentFell(limits)),
            ("margin without accuracy", "WARN", MarginAlone(limits, "", limits.steps)),
            ("goodput low", "WARN", GoodputLow(limits)),
        )
        self._evaluations: tuple[tuple[str, Level, Rule], ...] = (
            ("margin without accuracy, held out", "WARN", MarginAlone(limits, "eval/", 1)),
            ("held-out loss rose", "WARN", HeldOutLossRose(limits)),
        )

    def step(self, report: StepReport) -> tuple[Alert, ...]:
        return _alerts_of(self._steps, report)

    def evaluation(self, report: EvaluationReport) -> tuple[Alert, ...]:
        return _alerts_of(self._evaluations, report)

    def started(self, step: int, starts: Sequence[float]) -> tuple[Alert, ...]:
        """Alerts of a start. step: step that it resumes from; starts: times of all starts in s, this one
        last."""
        limits = self._limits

        def too_often(upto: int) -> bool:
            return sum(starts[upto] - s <= limits.restarts_s for s in starts[:upto]) >= limits.restarts

        last = len(starts) - 1
        if not too_often(last) or too_often(last - 1):  # else the start before has reported it
            return ()
        text = f"{limits.restarts} restarts within {limits.restarts_s / 60:.0f} minutes, {last} in all"
        return (_alert("repeated restarts", text, "ERROR", step),)


def _alerts_of(
    rules: Sequence[tuple[str, Level, Rule]], report: StepReport | EvaluationReport
) -> tuple[Alert, ...]:
    alerts: list[Alert] = []
    for title, level, rule in rules:  # every rule sees every report
        if (text := rule.check(report.metrics)) is not None:
            alerts.append(_alert(title, text, level, report.step))
    return tuple(alerts)


def _alert(title: str, text: str, level: Level, step: int) -> Alert:
    return Alert(title, f"{text}. {ADVICE[title]}", level, step)
