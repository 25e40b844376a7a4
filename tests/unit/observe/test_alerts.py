"""Alert rules on made-up streams: when they fire, how often, and when not."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from orchestrator.core.reports import EvaluationReport, StepReport
from orchestrator.observe.advice import ADVICE
from orchestrator.observe.alerts import AlertRules, Latch
from orchestrator.recipe.schema import Alerts

LIMITS = Alerts(steps=3)  # pyright: ignore[reportCallIssue]


def fired(stream: Sequence[Mapping[str, float]], limits: Alerts = LIMITS) -> list[tuple[int, str]]:
    """(step, title) of every alert; steps count from 1."""
    rules = AlertRules(limits)
    return [
        (alert.step, alert.title)
        for i, metrics in enumerate(stream, 1)
        for alert in rules.step(StepReport(i, metrics))
    ]


def rewards(*means: float, std: float = 0.2) -> list[dict[str, float]]:
    return [{"reward/mean": mean, "reward/std": std} for mean in means]


def test_a_latch_fires_once_per_cause() -> None:
    latch = Latch(2, 3)
    results = [
        latch(bad)
        for bad in (True, False, True, True, True, False, False, True, False, False, False, True, True)
    ]
    assert [i for i, fires in enumerate(results) if fires] == [3, 12]


def test_healthy_runs_are_silent() -> None:
    learning = [
        {
            "loss": 0.69 - 0.01 * i,
            "grad_norm": 1.0,
            "skipped": 0,
            "rewards/margins": 0.1 * i,
            "rewards/accuracies": min(1.0, 0.5 + 0.03 * i),
        }
        for i in range(50)
    ]
    assert fired(learning) == []
    assert fired(rewards(*(0.2 + 0.015 * i for i in range(50)))) == []
    assert fired(rewards(*(0.5 + 0.1 * math.sin(i) for i in range(200)))) == [], "noise within one deviation"


def test_non_finite_steps() -> None:
    refused = [{"loss": 1.0, "skipped": skipped} for skipped in (0, 1, 2, 2, 2, 2, 3)]
    assert fired(refused) == [(2, "non-finite step"), (7, "non-finite step")], (
        "the second one within three good steps is the same cause"
    )
    assert fired([{"loss": 1.0}, {"loss": math.nan}, {"loss": math.inf}]) == [(2, "non-finite step")]
    assert fired([{"loss": 1.0, "grad_norm": math.inf}]) == [(1, "non-finite step")]


def test_reward_collapse_needs_a_fall_that_stays() -> None:
    up = (0.2, 0.4, 0.6, 0.8, 0.9, 0.9, 0.9)
    assert fired(rewards(*up, 0.1, 0.1, 0.9, 0.9)) == [], "two steps are not three"
    assert fired(rewards(*up, 0.1, 0.1, 0.1, 0.1, 0.1)) == [(10, "reward collapse")]
    assert fired(rewards(*up, 0.75, 0.75, 0.75, 0.75)) == [], "less than a deviation"


def test_rewards_without_spread() -> None:
    assert fired(rewards(0.5, 0.5) + rewards(1, 1, 1, 1, std=0.0)) == [(5, "rewards without spread")]
    assert fired(rewards(0, 0, 0, 0, std=0.0)) == [(3, "rewards without spread")], (
        "a reward that is broken from the start"
    )


def pairs(*values: tuple[float, float], prefix: str = "") -> list[dict[str, float]]:
    return [
        {f"{prefix}rewards/margins": margin, f"{prefix}rewards/accuracies": accuracy}
        for margin, accuracy in values
    ]


def test_margin_without_accuracy() -> None:
    stuck = [(0.1 * i, 0.6) for i in range(20)]
    assert fired(pairs(*stuck)) == [(8, "margin without accuracy")], "0.5 since the mean of the first three"
    assert fired(pairs(*((0.1 * i, 0.95) for i in range(20)))) == [], "enough pairs are right"
    assert fired(pairs(*((0.1 * i, 0.5 + 0.004 * i) for i in range(20)))) == [], "accuracy creeps on"


def test_margin_without_accuracy_on_held_out_pairs() -> None:
    rules = AlertRules(LIMITS)
    stream = pairs((0.0, 0.5), (0.4, 0.7), (1.0, 0.69), (1.5, 0.68), prefix="eval/")
    alerts = [
        (alert.step, alert.title)
        for i, metrics in enumerate(stream)
        for alert in rules.evaluation(EvaluationReport(i, metrics))
    ]
    assert alerts == [(2, "margin without accuracy, held out")]


def test_a_start_at_the_reference_counts_as_half_right() -> None:
    rules = AlertRules(LIMITS)
    stream = pairs((0.0, math.nan), (1.0, 0.505), prefix="eval/")
    assert [a.title for i, m in enumerate(stream) for a in rules.evaluation(EvaluationReport(i, m))] == [
        "margin without accuracy, held out"
    ]


def test_low_goodput() -> None:
    slow = [
        {"perf/goodput": 0.2, "perf/elapsed_s": seconds}
        for seconds in (60.0, 900.0, 1799.0, 1900.0, 2000.0, 2100.0, 2200.0)
    ]
    assert fired(slow) == [(6, "goodput low")], "three steps in a row after half an hour"
    assert fired([{"perf/goodput": 0.8, "perf/elapsed_s": 4000.0}] * 9) == []


@pytest.mark.parametrize(
    ("starts", "fires"),
    [
        ((0.0,), False),
        ((0.0, 60.0, 120.0), False),
        ((0.0, 60.0, 120.0, 180.0), True),
        ((0.0, 60.0, 120.0, 180.0, 240.0), False),  # the start before reported it
        ((0.0, 4000.0, 8000.0, 12000.0), False),
        ((0.0, 1.0, 2.0, 3.0, 9000.0, 9001.0, 9002.0, 9003.0), True),  # another cause
    ],
)
def test_repeated_restarts(starts: tuple[float, ...], fires: bool) -> None:
    assert [alert.title for alert in AlertRules(LIMITS).started(4, starts)] == ["repeated restarts"] * fires


def test_texts_name_the_numbers() -> None:
    rules = AlertRules(LIMITS)
    alerts = [
        a
        for i, m in enumerate(rewards(0.9, 0.9, 0.9, 0.1, 0.1, 0.1), 1)
        for a in rules.step(StepReport(i, m))
    ]
    (alert,) = alerts
    assert alert.level == "ERROR" and alert.text.startswith(
        "reward/mean 0.1, its best was 0.9; one reward's deviation 0.2. "
    )


def test_every_alert_says_why_it_matters_and_a_fix() -> None:
    rules = AlertRules(LIMITS)
    titles = {title for title, *_ in (*rules._steps, *rules._evaluations)} | {"repeated restarts"}
    assert titles == ADVICE.keys()
    for advice in ADVICE.values():
        why, fix, what = advice.partition(" Fix: ")
        assert why.endswith(".") and fix and what and not what.endswith(".")


def test_every_alert_is_explained_in_the_docs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "watching.md").read_text()
    for title in ADVICE:
        assert f"\n| {title.removesuffix(', held out')} | " in page


def held_out(*losses: float, limits: Alerts = LIMITS) -> list[tuple[int, str]]:
    rules = AlertRules(limits)
    return [
        (a.step, a.title)
        for i, loss in enumerate(losses)
        for a in rules.evaluation(EvaluationReport(i, {"eval/loss": loss}))
    ]


def test_a_held_out_loss_above_its_first_value_fires_once_until_it_is_below_again() -> None:
    assert held_out(0.693, 0.695, 0.70, 0.71) == [(1, "held-out loss rose")], "the LoRA run that got worse"
    assert held_out(0.693, 0.68, 0.694, 0.68, 0.695) == [(2, "held-out loss rose"), (4, "held-out loss rose")]
    assert held_out(0.69315, 0.69316, 0.5, 0.6) == [], (
        "rounding, and worse than its best but not than its start"
    )
    assert held_out(-1.0, -0.9) == [(1, "held-out loss rose")], "a loss may be negative"
    assert held_out(0.693, 0.75, limits=Alerts(loss_rise=0.1)) == []  # pyright: ignore[reportCallIssue]
    assert held_out(math.nan, 0.7, 0.6) == []


def online(*rows: tuple[float, float], **more: float) -> list[dict[str, float]]:
    """One step for each (kl, share of groups without signal)."""
    return [
        {"reward/mean": 0.5, "reward/std": 0.2, "kl": kl, "reward/no_signal_ratio": ratio, **more}
        for kl, ratio in rows
    ]


def test_a_policy_far_from_its_reference() -> None:
    assert fired(online((0.1, 0), (1.9, 0), (0.2, 0), (1.5, 0), (5.9, 0), (5.8, 0))) == [
        (5, "far from the reference")
    ], "twice in a row"
    assert fired([{"kl": 9.0, "rewards/chosen": 1.0}] * 5) == [], "KTO's offset is of sequences"


def test_no_signal_fires_within_two_steps_if_there_never_was_one() -> None:
    assert fired(online((0, 1.0), (0, 1.0), (0, 1.0))) == [(2, "no signal")]
    assert fired(online((0, 0.5), (0, 1.0), (0, 1.0))) == [], "now and then is no cause"
    assert fired(online((0, 0.5), (0, 1.0), (0, 1.0), (0, 1.0))) == [(4, "no signal")]
    assert fired(online((0, 1.0), (0, 1.0), **{"value/loss": 1.0})) == [], "PPO compares with its critic"


def parts(*rows: tuple[float, float], std: float = 0.5) -> list[dict[str, float]]:
    return [
        {
            "reward/mean": a + b,
            "reward/std": std,
            "reward/no_signal_ratio": 0.0,
            "reward/brief": a,
            "reward/right": b,
        }
        for a, b in rows
    ]


def test_a_component_that_is_traded_for_the_total() -> None:
    hacked = [(0.3 + 0.1 * i, 0.19 - 0.02 * i) for i in range(9)]
    rules = AlertRules(LIMITS)
    alerts = [a for i, m in enumerate(parts(*hacked), 1) for a in rules.step(StepReport(i, m))]
    assert [(a.step, a.title) for a in alerts] == [(8, "a component falls")]
    assert alerts[0].text.startswith(
        "reward/right fell from 0.17 to 0.07 while reward/mean rose from 0.57 to 0.97. "
    )
    assert fired(parts(*((0.3 + 0.1 * i, 0.19) for i in range(9)))) == [], "it stays"
    assert fired(parts(*((0.3 - 0.02 * i, 0.19 - 0.02 * i) for i in range(9)))) == [], (
        "nothing is traded where all falls"
    )
    assert fired([{**m, "reward/right": -m["reward/right"]} for m in parts(*hacked)]) == [], (
        "a penalty that falls is no loss"
    )
