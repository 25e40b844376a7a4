"""The JSONL ledger (each step once, whatever happened) and what the console prints."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.core.errors import DataError, OutputError
from orchestrator.core.files import read_lines
from orchestrator.core.format import duration, printable
from orchestrator.core.reports import EvaluationReport, Sample, StepReport
from orchestrator.observe.console import FIRST_LINES, ConsoleSink
from orchestrator.observe.jsonl import JsonlSink

NOTES: list[str] = []


def write(folder: Path, resume_step: int, steps: range, notes: list[str] | None = None) -> None:
    sink = JsonlSink(folder, resume_step)
    sink.open((notes if notes is not None else []).append)
    for step in steps:
        sink.step(StepReport(step, {"loss": 1.0 / step, "grad_norm": 2.0}))
        if step % 2 == 0:
            sink.evaluation(
                EvaluationReport(
                    step, {"eval/loss": 0.5}, (Sample(step, "pair", "p", chosen="a", rejected="b"),)
                )
            )
    sink.close()


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_one_flat_object_per_step_and_per_evaluation(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 3))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 1.0, "grad_norm": 2.0},
        {"step": 2, "loss": 0.5, "grad_norm": 2.0},
        {"step": 2, "eval/loss": 0.5},
    ]


def test_lines_are_on_disk_before_the_sink_is_closed(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path, 0)
    sink.open(NOTES.append)
    sink.step(StepReport(1, {"loss": 1.0}))
    assert steps_of(tmp_path / "metrics.jsonl") == [1]
    sink.close()


def test_a_sample_leaves_out_missing_fields(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path, 0)
    sink.open(NOTES.append)
    hostile = "line\u2028end \ud800 ünï"
    sink.evaluation(
        EvaluationReport(
            4, {"eval/x": 1.0}, (Sample(4, "generation", hostile, completion="c", scores={"correct": 1.0}),)
        )
    )
    sink.close()
    raw = (tmp_path / "samples.jsonl").read_bytes()
    assert raw.isascii()
    assert read_lines(tmp_path / "samples.jsonl") == [
        {"step": 4, "kind": "generation", "prompt": hostile, "completion": "c", "scores": {"correct": 1.0}}
    ]


def test_numbers_json_cannot_write_become_null(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path, 0)
    sink.open(NOTES.append)
    sink.step(StepReport(1, {"loss": float("nan"), "grad_norm": float("inf"), "ok": 1e-300}))
    sink.evaluation(
        EvaluationReport(
            1, {"eval/a": float("-inf")}, (Sample(1, "pair", "p", scores={"margin": float("nan")}),)
        )
    )
    sink.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    texts = ((tmp_path / "metrics.jsonl").read_text() + (tmp_path / "samples.jsonl").read_text()).splitlines()
    first, second, sample = (json.loads(line, parse_constant=refuse) for line in texts)
    assert first == {"step": 1, "loss": None, "grad_norm": None, "ok": 1e-300}
    assert second == {"step": 1, "eval/a": None}
    assert sample["scores"] == {"margin": None}


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', "\0" * 40, '{"step": 6, "loss": 1.0}'])
def test_a_resumed_run_has_each_step_once(tmp_path: Path, torn: str) -> None:
    write(tmp_path, 0, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)  # killed while it wrote
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "kind"')
    notes: list[str] = []
    write(tmp_path, 2, range(3, 7), notes)
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert steps_of(tmp_path / "samples.jsonl") == [2, 4, 6]
    assert any("metrics.jsonl" in n and "after step 2" in n for n in notes)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "a temporary file was left"


def test_a_run_that_starts_again_from_the_beginning_keeps_nothing(tmp_path: Path) -> None:
    """It evaluates before step 1 again, so the line of step 0 has to go."""
    sink = JsonlSink(tmp_path, 0)
    sink.open(NOTES.append)
    sink.evaluation(EvaluationReport(0, {"eval/loss": 0.5}))
    sink.close()
    write(tmp_path, 0, range(1, 2))
    assert steps_of(tmp_path / "metrics.jsonl") == [1]


def test_kept_lines_keep_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    odd = '{"step":1,   "loss": 0.50000}\n'
    path.write_text(odd + '{"step": 2, "loss": 1}\n')
    write(tmp_path, 1, range(0))
    assert path.read_text() == odd


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        write(tmp_path, 3, range(0))
    assert len(path.read_text().splitlines()) == 3, "nothing was removed"


def test_a_full_disk_is_an_error_the_user_can_act_on(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    sink = JsonlSink(tmp_path, 0)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    sink.open(NOTES.append)
    with pytest.raises(OutputError, match=r"metrics\.jsonl cannot be written"):
        sink.step(StepReport(1, {"loss": 1.0}))


class Ticks:
    """A clock that advances by two seconds each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 2.0
        return self.now


def report(step: int) -> StepReport:
    metrics = {
        "loss": 0.693147,
        "rewards/accuracies": 0.5,
        "grad_norm": 1.25,
        "learning_rate": 5e-6,
        "perf/tokens_per_s": 12345.6,
        "time/x": 3.0,
    }
    return StepReport(step, metrics)


def test_plain_output_is_one_line_per_step() -> None:
    out = io.StringIO()
    sink = ConsoleSink(100, Console(file=out, width=40), clock=Ticks())
    sink.open(NOTES.append)
    sink.step(report(1))
    sink.step(report(2))
    sink.note("[bold]not markup[/bold] \x1b]0;title\x07")
    sink.evaluation(EvaluationReport(2, {"eval/loss": 0.25, "eval/exact_match": 0.75}))
    sink.close()
    assert out.getvalue().splitlines() == [
        "step 1/100  loss 0.6931  acc 0.5  grad 1.25  lr 5e-06  tok/s 12,346  eta 4m57s",
        "step 2/100  loss 0.6931  acc 0.5  grad 1.25  lr 5e-06  tok/s 12,346  eta 3m16s",
        r"[bold]not markup[/bold] \x1b]0;title\x07",
        "evaluation at step 2  loss 0.25  exact_match 0.75",
    ]


class Fast(Ticks):
    """A clock of steps that take 10 ms each."""

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def test_thousands_of_steps_are_not_thousands_of_lines_in_a_pipe() -> None:
    out = io.StringIO()
    sink = ConsoleSink(4000, Console(file=out), clock=Fast())
    for step in range(1, 4001):
        sink.step(report(step))
        if step == 1233:
            sink.evaluation(EvaluationReport(step, {"eval/loss": 0.25}))
    sink.close()
    lines = out.getvalue().splitlines()
    steps = [int(line.split()[1].partition("/")[0]) for line in lines if line.startswith("step")]
    assert steps[:FIRST_LINES] == list(range(1, FIRST_LINES + 1)) and steps == sorted(set(steps))
    assert len(lines) <= FIRST_LINES + 100 + 40 / 5 + 2
    assert {1233, 4000} <= set(steps), "the step before an evaluation, and the last one"
    assert lines[lines.index("evaluation at step 1233  loss 0.25") - 1].startswith("step 1233/4000")


def test_slow_steps_are_all_printed() -> None:
    out = io.StringIO()
    sink = ConsoleSink(4000, Console(file=out), clock=iter(range(0, 6000, 6)).__next__)
    for step in range(1, 101):
        sink.step(report(step))
    assert len(out.getvalue().splitlines()) == 100


def test_a_run_that_ends_early_prints_its_last_step() -> None:
    out = io.StringIO()
    sink = ConsoleSink(4000, Console(file=out), clock=Fast())
    for step in range(101, 134):
        sink.step(report(step))
    sink.close(failed=True)
    assert out.getvalue().splitlines()[-1].startswith("step 133/4000")


def test_reward_components_stand_beside_the_reward() -> None:
    out = io.StringIO()
    sink = ConsoleSink(9, Console(file=out, width=40), clock=Ticks())
    rewards = {
        "reward/mean": 1.13,
        "reward/std": 0.4,
        "reward/brief": 1.09,
        "reward/kl": 0.04,
        "reward/no_signal_ratio": 0.1,
    }
    sink.step(StepReport(1, {"loss": 0.0, **rewards, "kl": 0.5}))
    sink.step(StepReport(2, {"loss": 0.0, "reward/mean": 1.0, "reward/only": 1.0}))
    assert out.getvalue().splitlines() == [
        "step 1/9  loss 0  reward 1.13  brief 1.09  reward/kl 0.04  kl 0.5  eta 0s",
        "step 2/9  loss 0  reward 1  eta 14s",
    ]


def test_an_unknown_metric_is_a_dash() -> None:
    out = io.StringIO()
    sink = ConsoleSink(9, Console(file=out, width=40), clock=Ticks())
    sink.evaluation(EvaluationReport(0, {"eval/loss": 0.7, "eval/rewards/accuracies": math.nan}))
    sink.step(StepReport(1, {"loss": math.nan, "rewards/accuracies": math.nan, "rewards/margins": 1e-8}))
    first, second = out.getvalue().splitlines()
    assert first == "evaluation at step 0  loss 0.7  rewards/accuracies –"
    assert second.startswith("step 1/9  loss nan  acc –  margin 1e-08")


def test_an_sft_line_has_no_empty_columns() -> None:
    out = io.StringIO()
    sink = ConsoleSink(2, Console(file=out), clock=Ticks())
    sink.step(StepReport(1, {"loss": float("nan"), "learning_rate": 1.0}))
    assert out.getvalue() == "step 1/2  loss nan  lr 1  eta 0s\n"


def test_a_terminal_gets_a_live_table_of_the_last_steps() -> None:
    out = io.StringIO()
    sink = ConsoleSink(
        20,
        Console(file=out, force_terminal=True, width=100, color_system=None, _environ={"TERM": "xterm"}),
        clock=Ticks(),
    )
    for step in range(1, 13):
        sink.step(report(step))
    sink.note("checkpoint written")
    sink.close()
    assert "checkpoint written" in out.getvalue()
    last = out.getvalue().rpartition("tok/s")[2]
    rows = [int(line.split()[0]) for line in last.splitlines() if line.strip()[:1].isdigit()]
    assert rows == list(range(5, 13))
    assert "12/20 steps, 16s left" in last


def test_durations_and_control_characters() -> None:
    assert [duration(s) for s in (0.2, 59.6, 192, 7500, float("nan"))] == [
        "0s",
        "1m00s",
        "3m12s",
        "2h05m",
        "?",
    ]
    assert printable("a\x1b[31m\u202eb\n\tü") == "a\\x1b[31m\\u202eb\n\tü"
