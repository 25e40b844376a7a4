"""`status` shows where a run stands as a table, as lines and as JSON, with nothing cut off.

A stopped run has its exit code and last step.
"""

import io
import json
from dataclasses import asdict, replace

from rich.console import Console

from orchestrator.cli.status import StatusRow, reason, status_lines, status_table
from orchestrator.cluster.submit.ray_jobs import JobAttempt

NOW = 1_800_000_000.0
JOB = JobAttempt(
    "llama-dpo-a-long-name.2",
    "llama-dpo-a-long-name",
    2,
    "train",
    "FAILED",
    "Job failed: " + "x" * 200,
    NOW - 90_000,
    NOW - 89_928,
    69,
)
LOG = "reference 64/64\nstep 11/300  loss 0.6000  eta 1m\nstep 12/300  loss 0.5312  eta 1m\nerror: no room\n"
FAILED = StatusRow.of(JOB, LOG, NOW)
RUNNING = StatusRow.of(
    JobAttempt("tiny", "tiny", 1, "train", "RUNNING", "", NOW - 2, None, None), "starting\n", NOW
)
SAVED = (
    "step 401/5000  loss 0.1  eta 1m\nerror: stopped by request after step 402 of 5000; a checkpoint "
    "was written\n  fix: run the same command\n"
)


def test_a_row_holds_values_and_json_has_them_all() -> None:
    assert (FAILED.step, FAILED.total, FAILED.loss, FAILED.exit_code, FAILED.age_s, FAILED.took_s) == (
        12,
        300,
        "0.5312",
        69,
        90_000,
        72,
    )
    assert RUNNING.step is None and RUNNING.exit_code is None and RUNNING.took_s == RUNNING.age_s == 2
    assert json.loads(json.dumps(asdict(FAILED)))["message"] == JOB.message


def test_a_stopped_run_shows_75_if_its_log_reports_a_checkpoint() -> None:
    """Ray keeps no exit code of a job that it stopped."""
    stopped = replace(JOB, status="STOPPED", message="", exit_code=None)
    assert StatusRow.of(stopped, SAVED, NOW).exit_code == 75 and StatusRow.of(stopped, SAVED, NOW).step == 401
    assert StatusRow.of(stopped, SAVED.partition("\n")[2], NOW).step == 402
    killed = StatusRow.of(stopped, LOG, NOW)
    assert killed.exit_code is None and killed.step == 12
    assert StatusRow.of(replace(JOB, status="SUCCEEDED", exit_code=None), "", NOW).exit_code == 0


def test_the_drivers_error_replaces_the_log_that_ray_repeats() -> None:
    again = ", last available logs (truncated to 20,000 chars):\nRunning …\n"
    assert (
        reason(f"it failed with exit code 78{again}error: no data file x\n  fix: y\n")
        == "it failed with exit code 78: no data file x"
    )
    assert reason(f"it failed with exit code 1{again}Traceback") == "it failed with exit code 1"
    assert reason("Unexpected error\n occurred") == "Unexpected error occurred"


def test_status_is_readable_at_80_columns() -> None:
    screen = io.StringIO()
    console = Console(
        file=screen,
        width=80,
        force_terminal=True,
        color_system=None,
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    console.print(status_table([FAILED, RUNNING]), soft_wrap=False)
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == [
        "llama-dpo-a-long-name.2",
        "FAILED",
        "69",
        "25h00m",
        "1m12s",
        "12/300",
        "0.5312",
    ]
    assert lines[2].split()[:2] == ["tiny", "RUNNING"] and lines[3].startswith(
        "llama-dpo-a-long-name.2: Job failed: xxx"
    )


def test_status_in_a_pipe_is_one_uncut_line_for_each_attempt() -> None:
    first, second = status_lines([FAILED, RUNNING]).splitlines()
    assert first.split("\t") == [
        JOB.run,
        JOB.id,
        "FAILED",
        "69",
        "25h00m",
        "1m12s",
        "12/300",
        "0.5312",
        JOB.message,
    ]
    assert second.split("\t")[:3] == ["tiny", "tiny", "RUNNING"]
