"""A submission can safely be repeated: it follows the run, resumes it, or refuses. The driver's command is
what a user would type."""

import io
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.cli.cluster import LogView
from orchestrator.cluster.submit.ray_jobs import JobAttempt, exit_code, find_token
from orchestrator.cluster.submit.submission import (
    FIND_PYTHON,
    check_paths,
    decide,
    entrypoint,
    environment,
    path_in_upload,
)
from orchestrator.cluster.submit.upload import collect
from orchestrator.core.errors import ConfigError, MissingInput, OrchestratorError, OutputError
from orchestrator.recipe.loading import load
from tests.running import REPOSITORY


def attempt(number: int, status: str, command: str = "train", code: int | None = None) -> JobAttempt:
    return JobAttempt(f"run.{number}", "run", number, command, status, "", None, None, code)


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
def test_the_same_submission_follows_or_resumes(attempts: list[JobAttempt], start: int | None) -> None:
    assert decide(attempts, "train").number == start


@pytest.mark.parametrize("status", ["RUNNING", "SUCCEEDED"])
def test_another_run_of_that_name_is_refused(status: str) -> None:
    with pytest.raises(OutputError, match="another run") as refused:
        decide([attempt(1, status, "train other")], "train")
    assert "train other" in refused.value.why and "run.name" in refused.value.fix


def test_the_command_is_quoted_and_its_paths_are_valid_on_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dpo.yaml").touch()
    monkeypatch.chdir(tmp_path / "mine")
    override = "data.train=[{path: it's.jsonl, max_rows: 4}]"
    words = shlex.split(entrypoint("dpo.yaml", [override], Path("runs/x"), tmp_path))
    assert words == [
        "sh",
        "orchestrator-run.sh",
        "train",
        "mine/dpo.yaml",
        override,
        "--output",
        str(tmp_path / "mine" / "runs" / "x"),
    ]
    assert path_in_upload("tiny/dpo", tmp_path) == "tiny/dpo"
    with pytest.raises(ConfigError, match="lies outside"):
        path_in_upload("/etc/recipe.yaml", tmp_path)


def test_a_stopped_job_has_time_to_save_and_no_secret_is_passed_on() -> None:
    assert environment(300) == {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": "300"}


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (attempt(1, "SUCCEEDED", code=0), 0),
        (attempt(1, "STOPPED"), 75),
        (attempt(1, "FAILED", code=75), 75),
        (attempt(1, "FAILED"), 70),
    ],
)
def test_a_follower_ends_as_the_driver_did(ended: JobAttempt, code: int) -> None:
    assert exit_code(ended) == code


def test_the_token_is_read_from_where_ray_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    for output, console in (
        (plain, Console(file=plain, highlight=False)),
        (terminal, Console(file=terminal, highlight=False, force_terminal=True)),
    ):
        view = LogView(console)
        view.write(log)
        view.write("ss 0.25  eta 0s\ndone")
        view.close()
        assert "starting [a/b]" in output.getvalue() and "done" in output.getvalue()
    assert "step 2/2  loss 0.25" in plain.getvalue()
    assert "2/2 steps, 0s left" in terminal.getvalue() and "step 2/2  loss" not in terminal.getvalue()


def launched(tmp_path: Path, ancestor: Sequence[str], path: str) -> subprocess.CompletedProcess[str]:
    """Runs the script as a job would: below a process with the command line `ancestor`, with PATH `path`."""
    (tmp_path / "run.sh").write_text(FIND_PYTHON)
    words = ["/bin/sh", "-c", f"sh {tmp_path}/run.sh --help; exit $?"]
    below = (
        f"import subprocess, sys; sys.exit(subprocess.run({words!r}, env={{'PATH': {path!r}}}).returncode)"
    )
    return subprocess.run(
        [sys.executable, "-c", below, *ancestor], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )


def test_a_job_runs_with_the_interpreter_that_ray_runs(tmp_path: Path) -> None:
    """Whatever PATH is: without a python on it, and with one that lacks the program."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "tr", "sed"):
        os.symlink(f"/usr/bin/{name}" if Path(f"/usr/bin/{name}").exists() else f"/bin/{name}", tools / name)
    raylet = [f"--python_worker_command={sys.executable} /x/default_worker.py --node-ip-address=1.2.3.4"]
    done = launched(tmp_path, raylet, str(tools))
    assert done.returncode == 0 and "Usage: python -m orchestrator" in done.stdout
    (tools / "python").write_text("#!/bin/sh\nexit 1\n")
    (tools / "python").chmod(0o755)
    lacking = launched(tmp_path, ["--python_worker_command=/no/such/python x"], str(tools))
    assert (
        lacking.returncode == 78
        and "tried /no/such/python, python, python3" in lacking.stderr
        and "every node" in lacking.stderr
    )
    os.remove(tools / "python")
    os.symlink(sys.executable, tools / "python3")
    assert launched(tmp_path, [], f"{Path(sys.executable).parent}:{tools}").returncode == 0


RECIPE = """
model: {path: models/start, chat_template: chat.jinja}
data: {train: data/rows.jsonl}
algorithm: {name: grpo}
optimizer: {learning_rate: 1e-4}
rollouts: {environment: "world.py:World"}
rewards: {functions: [{name: mine, function: "judge.py:f"}]}
"""


def test_relative_paths_are_checked_against_the_uploaded_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    names = ("models/start/config.json", "chat.jinja", "data/rows.jsonl", "world.py", "judge.py")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(root)

    def refused(*overrides: str) -> OrchestratorError:
        with pytest.raises((ConfigError, MissingInput)) as caught:
            check_paths("r.yaml", load("r.yaml", overrides).stages, collect(root))
        return caught.value

    check_paths("r.yaml", load("r.yaml").stages, collect(root))
    check_paths(
        "r.yaml", load("r.yaml", ["data.train=org/rows", "model.path=org/name"]).stages, collect(root)
    )
    check_paths("tiny/grpo", load("tiny/grpo").stages, collect(root))
    for name in names:
        (root / ".gitignore").write_text(f"/{name}\n")
        error = refused()
        assert (
            isinstance(error, ConfigError)
            and name.removesuffix("/config.json") in error.what
            and ".gitignore" in error.why
        )
    (root / ".gitignore").write_text("")
    assert isinstance(refused("data.train=data/typo.jsonl"), MissingInput)
    (tmp_path / "out.jsonl").write_text("x")
    outside = refused("data.train=../out.jsonl")
    assert "lies outside of" in outside.why and "absolute path" in outside.fix
    for name in ("run.json", "checkpoints/x", "export/config.json"):
        (root / "runs/sft" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "runs/sft" / name).write_text("x")
    for path in ("runs/sft", "runs/sft/export"):
        assert "runs/sft is the folder of a run" in refused(f"model.path={path}").why
    (root / "r.yaml").write_text(f"extends: ../base.yaml\n{RECIPE}")
    (tmp_path / "base.yaml").write_text("run: {seed: 3}\n")
    assert "base.yaml" in refused().what
