"""Alert rules for learning that goes the wrong way: the held-out loss rises, the policy leaves its reference,
rewards give no signal, a reward component falls while the total rises.

Like the rules of alerts.py each gets every report, and reports a cause once, with its numbers.
"""

import math
from collections import deque
from collections.abc import Mapping

from orchestrator.observe.latch import Latch, RunningMean, mean
from orchestrator.observe.metric_names import components
from orchestrator.recipe.schema import Alerts

Metrics = Mapping[str, float]
AT_FIRST = 2
"""Steps without signal before a run that never had one gets an alert; also the steps in a row that a
divergence has to last."""


class HeldOutLossRose:
    """eval/loss is above its first value, by more than rounding."""

    def __init__(self, limits: Alerts) -> None:
        self._rise, self._latch = limits.loss_rise, Latch(1, 1)
        self._first: float | None = None

    def check(self, metrics: Metrics) -> str | None:
        loss = metrics.get("eval/loss", math.nan)
        if not math.isfinite(loss):
            return None
        if self._first is None:
            self._first = loss
        worse = loss > self._first + self._rise * abs(self._first)
        return (
            f"eval/loss is {loss:.4g}, at the first evaluation it was {self._first:.4g}"
            if self._latch(worse)
            else None
        )


class KlBeyond:
    """The KL from the reference, a mean over tokens, is too large. Online runs only: KTO's `kl` is an offset
    of whole sequences, not a distance."""

    def __init__(self, limits: Alerts) -> None:
        self._limit, self._latch = limits.kl, Latch(AT_FIRST, limits.steps)

    def check(self, metrics: Metrics) -> str | None:
        divergence = metrics.get("kl", math.nan)
        if "reward/mean" not in metrics or not math.isfinite(divergence):
            return None
        text = f"kl is {divergence:.3g} nat per token, the bound is {self._limit:g} (tracking.alerts.kl)"
        return text if self._latch(divergence > self._limit) else None


class NoSignal:
    """All rewards within each group are equal. It fires after AT_FIRST steps if no step had a signal yet,
    else after `steps`. PPO is left out: its advantages need no group."""

    def __init__(self, limits: Alerts) -> None:
        self._soon, self._later = (
            Latch(min(AT_FIRST, limits.steps), limits.steps),
            Latch(limits.steps, limits.steps),
        )
        self._ever = False

    def check(self, metrics: Metrics) -> str | None:
        ratio = metrics.get("reward/no_signal_ratio")
        if ratio is None or any(name.startswith("value/") for name in metrics):
            return None
        self._ever |= ratio < 1.0
        latch = self._later if self._ever else self._soon
        if not latch(ratio >= 1.0):
            return None
        return (
            "in all groups every answer earned the same, reward/mean "
            f"{metrics.get('reward/mean', math.nan):.4g}"
        )


class ComponentFell:
    """A reward component, positive at first, loses a share of its first value while the total rises. Values
    are means over `steps` steps."""

    def __init__(self, limits: Alerts) -> None:
        self._fall, self._window, self._steps = limits.component_fall, limits.steps, limits.steps
        self._recent: deque[Metrics] = deque(maxlen=limits.steps)
        self._first: dict[str, float] | None = None
        self._latches: dict[str, Latch] = {}
        self._deviation = RunningMean()

    def check(self, metrics: Metrics) -> str | None:
        names = components(metrics)
        if len(names) < 2 or not math.isfinite(metrics.get("reward/mean", math.nan)):
            return None
        typical = self._deviation.after(metrics.get("reward/std", 0.0))
        self._recent.append(metrics)
        if len(self._recent) < self._window:
            return None
        now = {name: mean([m.get(name, math.nan) for m in self._recent]) for name in ("reward/mean", *names)}
        if self._first is None:
            self._first = now
        first = self._first
        rose = now["reward/mean"] - first["reward/mean"] > 0.5 * typical
        changes = []
        for name in names:
            fell = rose and first.get(name, 0.0) > 0 and now[name] < (1.0 - self._fall) * first[name]
            if self._latches.setdefault(name, Latch(1, self._steps))(fell):
                changes.append(f"{name} fell from {first[name]:.3g} to {now[name]:.3g}")
        return (
            f"{', '.join(changes)} while reward/mean rose from {first['reward/mean']:.3g} to "
            f"{now['reward/mean']:.3g}"
            if changes
            else None
        )
