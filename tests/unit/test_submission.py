"""Submitting is safe to repeat: it follows, goes on, or refuses; and the driver's command is what the user would type."""

import io
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.cluster.jobs import Attempt, exit_code, find_token
from orchestrator.cluster_commands import LogView
from orchestrator.errors import ConfigError, OutputError
from orchestrator.submission import decide, entrypoint, environment, there


def attempt(number: int, status: str, command: str = "train", code: int | None = None) -> Attempt:
    return Attempt(f"run.{number}", "run", number, command, status, "", None, None, code)


@pytest.mark.parametrize(
    ("attempts", "start"),
    [
        ([], 1),
        ([attempt(1, "RUNNING")], None),
        ([attempt(1, "PENDING")], None),
        ([attempt(1, "SUCCEEDED")], None),
        ([attempt(1, "FAILED", code=75)], 2),
        ([attempt(1, "FAILED"), attempt(2, "STOPPED")], 3),
        ([attempt(10, "FAILED"), attempt(9, "FAILED")], 11),
        ([attempt(1, "FAILED"), attempt(2, "RUNNING")], None),
        ([attempt(1, "FAILED", "train batch.efective=1")], 2),  # corrected and tried again
    ],
)
def test_the_same_submission_follows_or_goes_on(attempts: list[Attempt], start: int | None) -> None:
    assert decide(attempts, "train").number == start


@pytest.mark.parametrize("status", ["RUNNING", "SUCCEEDED"])
def test_another_run_of_that_name_is_refused(status: str) -> None:
    with pytest.raises(OutputError, match="is another one") as refused:
        decide([attempt(1, status, "train other")], "train")
    assert "train other" in refused.value.why and "run.name" in refused.value.fix


def test_the_command_is_quoted_and_its_paths_hold_on_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dpo.yaml").touch()
    monkeypatch.chdir(tmp_path / "mine")
    override = "data.train=[{path: it's.jsonl, max_rows: 4}]"
    words = shlex.split(entrypoint("dpo.yaml", [override], Path("runs/x"), tmp_path))
    assert words == ["python", "-m", "orchestrator", "train", "mine/dpo.yaml", override, "--output", str(tmp_path / "mine" / "runs" / "x")]
    assert there("tiny/dpo", tmp_path) == "tiny/dpo"
    with pytest.raises(ConfigError, match="lies outside"):
        there("/etc/recipe.yaml", tmp_path)


def test_a_stopped_job_gets_time_to_save_and_no_secret_goes_along() -> None:
    assert environment(300) == {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": "300"}


@pytest.mark.parametrize(
    ("ended", "code"),
    [(attempt(1, "SUCCEEDED", code=0), 0), (attempt(1, "STOPPED"), 75), (attempt(1, "FAILED", code=75), 75), (attempt(1, "FAILED"), 70)],
)
def test_a_follower_ends_as_the_driver_did(ended: Attempt, code: int) -> None:
    assert exit_code(ended) == code


def test_the_token_is_looked_for_where_ray_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of-home\n")
    assert find_token() == "of-home"
    (tmp_path / "other").write_text("of-path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert find_token() == "of-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-environment")
    assert find_token() == "of-environment"


def test_a_followed_log_becomes_the_live_table_on_a_terminal_only() -> None:
    log = "starting [a/b]\nstep 1/2  loss 0.5  eta 1s\nstep 2/2  lo"
    plain, terminal = io.StringIO(), io.StringIO()
    for said, console in ((plain, Console(file=plain, highlight=False)), (terminal, Console(file=terminal, highlight=False, force_terminal=True))):
        view = LogView(console)
        view.write(log)
        view.write("ss 0.25  eta 0s\ndone")
        view.close()
        assert "starting [a/b]" in said.getvalue() and "done" in said.getvalue()
    assert "step 2/2  loss 0.25" in plain.getvalue()
    assert "2/2 steps, 0s left" in terminal.getvalue() and "step 2/2  loss" not in terminal.getvalue()
