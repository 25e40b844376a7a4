"""Alert rules on streams made for them: when they fire, how often, and what leaves them silent."""

import math
from collections.abc import Mapping, Sequence

import pytest

from orchestrator.config import Alerts
from orchestrator.observe.alerts import AlertRules, Latch
from orchestrator.records import EvaluationReport, StepReport

LIMITS = Alerts(steps=3)  # pyright: ignore[reportCallIssue]


def fired(stream: Sequence[Mapping[str, float]], limits: Alerts = LIMITS) -> list[tuple[int, str]]:
    """(step, title) of every alert; steps count from 1."""
    rules = AlertRules(limits)
    return [(alert.step, alert.title) for i, metrics in enumerate(stream, 1) for alert in rules.step(StepReport(i, metrics))]


def rewards(*means: float, std: float = 0.2) -> list[dict[str, float]]:
    return [{"reward/mean": mean, "reward/std": std} for mean in means]


def test_a_latch_fires_once_per_cause() -> None:
    latch = Latch(2, 3)
    told = [latch(bad) for bad in (True, False, True, True, True, False, False, True, False, False, False, True, True)]
    assert [i for i, fires in enumerate(told) if fires] == [3, 12]


def test_healthy_runs_are_silent() -> None:
    learning = [
        {"loss": 0.69 - 0.01 * i, "grad_norm": 1.0, "skipped": 0, "rewards/margins": 0.1 * i, "rewards/accuracies": min(1.0, 0.5 + 0.03 * i)}
        for i in range(50)
    ]
    assert fired(learning) == []
    assert fired(rewards(*(0.2 + 0.015 * i for i in range(50)))) == []
    assert fired(rewards(*(0.5 + 0.1 * math.sin(i) for i in range(200)))) == [], "noise within one deviation"


def test_non_finite_steps() -> None:
    refused = [{"loss": 1.0, "skipped": skipped} for skipped in (0, 1, 2, 2, 2, 2, 3)]
    assert fired(refused) == [(2, "non-finite step"), (7, "non-finite step")], "the second one within three good steps is the same cause"
    assert fired([{"loss": 1.0}, {"loss": math.nan}, {"loss": math.inf}]) == [(2, "non-finite step")]
    assert fired([{"loss": 1.0, "grad_norm": math.inf}]) == [(1, "non-finite step")]


def test_reward_collapse_needs_a_fall_that_stays() -> None:
    up = (0.2, 0.4, 0.6, 0.8, 0.9, 0.9, 0.9)
    assert fired(rewards(*up, 0.1, 0.1, 0.9, 0.9)) == [], "two steps are not three"
    assert fired(rewards(*up, 0.1, 0.1, 0.1, 0.1, 0.1)) == [(10, "reward collapse")]
    assert fired(rewards(*up, 0.75, 0.75, 0.75, 0.75)) == [], "less than a deviation"


def test_rewards_without_spread() -> None:
    assert fired(rewards(0.5, 0.5) + rewards(1, 1, 1, 1, std=0.0)) == [(5, "rewards without spread")]
    assert fired(rewards(0, 0, 0, 0, std=0.0)) == [(3, "rewards without spread")], "a reward that is broken from the start"


def pairs(*values: tuple[float, float], prefix: str = "") -> list[dict[str, float]]:
    return [{f"{prefix}rewards/margins": margin, f"{prefix}rewards/accuracies": accuracy} for margin, accuracy in values]


def test_margin_without_accuracy() -> None:
    stuck = [(0.1 * i, 0.6) for i in range(20)]
    assert fired(pairs(*stuck)) == [(8, "margin without accuracy")], "0.5 since the mean of the first three"
    assert fired(pairs(*((0.1 * i, 0.95) for i in range(20)))) == [], "enough pairs are right"
    assert fired(pairs(*((0.1 * i, 0.5 + 0.004 * i) for i in range(20)))) == [], "accuracy creeps on"


def test_margin_without_accuracy_on_held_out_pairs() -> None:
    rules = AlertRules(LIMITS)
    stream = pairs((0.0, 0.5), (0.4, 0.7), (1.0, 0.69), (1.5, 0.68), prefix="eval/")
    found = [(alert.step, alert.title) for i, metrics in enumerate(stream) for alert in rules.evaluation(EvaluationReport(i, metrics))]
    assert found == [(2, "margin without accuracy, held out")]


def test_low_goodput() -> None:
    slow = [{"perf/goodput": 0.2, "perf/elapsed_s": seconds} for seconds in (60.0, 900.0, 1799.0, 1900.0, 2000.0, 2100.0, 2200.0)]
    assert fired(slow) == [(6, "goodput low")], "three steps in a row after half an hour"
    assert fired([{"perf/goodput": 0.8, "perf/elapsed_s": 4000.0}] * 9) == []


@pytest.mark.parametrize(
    ("starts", "fires"),
    [
        ((0.0,), False),
        ((0.0, 60.0, 120.0), False),
        ((0.0, 60.0, 120.0, 180.0), True),
        ((0.0, 60.0, 120.0, 180.0, 240.0), False),  # said at the start before
        ((0.0, 4000.0, 8000.0, 12000.0), False),
        ((0.0, 1.0, 2.0, 3.0, 9000.0, 9001.0, 9002.0, 9003.0), True),  # another cause
    ],
)
def test_repeated_restarts(starts: tuple[float, ...], fires: bool) -> None:
    assert [alert.title for alert in AlertRules(LIMITS).started(4, starts)] == ["repeated restarts"] * fires


def test_texts_name_the_numbers() -> None:
    rules = AlertRules(LIMITS)
    alerts = [a for i, m in enumerate(rewards(0.9, 0.9, 0.9, 0.1, 0.1, 0.1), 1) for a in rules.step(StepReport(i, m))]
    assert [(a.level, a.text) for a in alerts] == [("ERROR", "reward/mean 0.1, its best was 0.9; one reward's deviation 0.2")]
