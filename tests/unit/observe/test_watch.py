"""Records over all starts of a run: goodput, restarts, and alerts that are not repeated."""

import json
from pathlib import Path

import pytest

from orchestrator.core.errors import Diverged, Interrupted, WorkerLost
from orchestrator.core.files import read_lines
from orchestrator.core.reports import EvaluationReport, StepReport
from orchestrator.observe.goodput import StartLog
from orchestrator.observe.jsonl import JsonlSink
from orchestrator.observe.reporter import RunReporter
from orchestrator.observe.watch import Watch
from orchestrator.recipe.schema import Alerts

LIMITS = Alerts(steps=2)  # pyright: ignore[reportCallIssue]


class Clock:
    """Seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def started(folder: Path, resume_step: int, clock: Clock) -> RunReporter:
    watch = Watch(folder, LIMITS, resume_step, StartLog(folder, clock))
    return RunReporter([JsonlSink(folder, resume_step)], folder / "logs" / "driver.log", watch)


def step(reporter: RunReporter, number: int, clock: Clock, seconds: float, **metrics: float) -> None:
    clock.now += seconds
    reporter.step(StepReport(number, {"time/data": 1.0, "time/optim": seconds - 1.0, **metrics}))


def test_goodput_counts_over_all_starts(tmp_path: Path) -> None:
    clock = Clock()
    with started(tmp_path, 0, clock) as reporter:
        clock.now += 10  # starting
        for number in (1, 2, 3):
            step(reporter, number, clock, 10)
    clock.now += 20  # down; step 3 had no checkpoint
    with started(tmp_path, 2, clock) as reporter:
        step(reporter, 3, clock, 10)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["faults/restarts"] for line in lines] == [0, 0, 1]
    assert [line["perf/elapsed_s"] for line in lines] == [20, 30, 70]
    assert [line["perf/goodput"] for line in lines] == pytest.approx([10 / 20, 20 / 30, 30 / 70])
    assert [json.loads(x) for x in (tmp_path / "attempts.jsonl").read_text().splitlines()] == [
        {"started": 1000.0, "step": 0},
        {"started": 1060.0, "step": 2},
    ]


def test_an_online_step_has_its_own_duration(tmp_path: Path) -> None:
    starts = StartLog(tmp_path, clock := Clock())
    starts.begin(0)
    clock.now += 8
    assert starts.after({"time/step": 4.0, "time/generate": 3.0, "time/learn": 3.0})["perf/goodput"] == 0.5


def test_an_alert_is_noted_kept_and_not_repeated_after_a_resume(tmp_path: Path) -> None:
    clock = Clock()
    flat = {"reward/mean": 1.0, "reward/std": 0.0}
    with started(tmp_path, 0, clock) as reporter:
        for number in (1, 2, 3):
            step(reporter, number, clock, 2, **flat)
    with started(tmp_path, 3, clock) as reporter:
        for number in (4, 5, 6):
            step(reporter, number, clock, 2, **flat)
    (alert,) = read_lines(tmp_path / "alerts.jsonl")
    assert (alert["title"], alert["level"], alert["step"]) == ("rewards without spread", "WARN", 2)
    assert (tmp_path / "logs" / "driver.log").read_text().count("alert, WARN: rewards without spread") == 1


def test_alerts_of_steps_that_are_computed_again_are_removed_with_them(tmp_path: Path) -> None:
    clock = Clock()
    for resume in (0, 1):
        with started(tmp_path, resume, clock) as reporter:
            for number in range(resume + 1, 4):
                step(reporter, number, clock, 2, loss=float("nan") if number == 2 else 1.0)
    assert [line["step"] for line in read_lines(tmp_path / "alerts.jsonl")] == [2]


def test_held_out_alerts_and_restarts(tmp_path: Path) -> None:
    clock = Clock()
    for _ in range(4):
        with started(tmp_path, 0, clock) as reporter:
            reporter.evaluation(
                EvaluationReport(0, {"eval/rewards/margins": 0.0, "eval/rewards/accuracies": 0.5})
            )
            reporter.evaluation(
                EvaluationReport(1, {"eval/rewards/margins": 1.0, "eval/rewards/accuracies": 0.5})
            )
    titles = [line["title"] for line in read_lines(tmp_path / "alerts.jsonl")]
    assert titles == ["repeated restarts", "margin without accuracy, held out"]


@pytest.mark.parametrize(
    ("error", "texts"),
    [
        (Diverged("5 steps in a row had a non-finite loss"), ["5 steps in a row had a non-finite loss"]),
        (ValueError("boom"), ["ValueError: boom"]),
        (Interrupted("stopped"), []),
        (WorkerLost("learner-1 died"), []),
        (KeyboardInterrupt(), []),
    ],
)
def test_the_end_of_a_run_is_an_alert_unless_the_user_stopped_it_or_it_restarts(
    tmp_path: Path, error: BaseException, texts: list[str]
) -> None:
    with pytest.raises(type(error)), started(tmp_path, 0, Clock()):
        raise error
    alerts = tmp_path / "alerts.jsonl"
    assert [line["text"] for line in (read_lines(alerts) if alerts.is_file() else [])] == texts


def test_without_limits_there_are_no_alerts_but_goodput(tmp_path: Path) -> None:
    watch = Watch(tmp_path, None, 0)
    watch.begin()
    report, alerts = watch.step(StepReport(1, {"loss": float("nan")}))
    assert alerts == watch.ended(ValueError()) == ()
    assert report.metrics["faults/restarts"] == 0
