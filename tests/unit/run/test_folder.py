"""One run per folder, one process per run."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.core.errors import OutputError
from orchestrator.recipe.fingerprint import TOKENS, Identity
from orchestrator.recipe.schema import Optimizer
from orchestrator.run.folder import End, open_run


def opened(root, seed=0, watched=None, notes=None):
    identity = Identity({"run.seed": seed}, watched or {})
    return open_run(root, identity, "run: {}\n", "{}", notes.append if notes is not None else print)


def test_a_new_folder_records_what_the_run_is(tmp_path):
    root = tmp_path / "deep" / "run"
    with opened(root) as folder:
        record = json.loads((root / "run.json").read_text())
        assert record == {
            "fingerprint": Identity({"run.seed": 0}).fingerprint,
            "deciding": {"run.seed": 0},
            "watched": {},
            "changes": [],
        }
        assert (root / "recipe.yaml").read_text() == "run: {}\n"
        assert (root / "plan.json").read_text() == "{}\n"
        assert folder.logs.is_dir()
        assert (folder.checkpoints, folder.export, folder.metrics) == (
            root / "checkpoints",
            root / "export",
            root / "metrics.jsonl",
        )


def test_the_same_run_resumes_in_its_folder(tmp_path):
    with opened(tmp_path / "run") as folder:
        folder.metrics.write_text("kept")
    with opened(tmp_path / "run") as folder:
        assert folder.metrics.read_text() == "kept"


def test_another_run_is_refused_and_nothing_changes(tmp_path):
    root = tmp_path / "run"
    with opened(root, 1):
        pass
    before = {p.name: p.stat().st_mtime_ns for p in root.iterdir()}
    with pytest.raises(OutputError, match="another run") as error, opened(root, 2):
        pass
    assert error.value.why == "run.seed: 1 -> 2"
    assert {p.name: p.stat().st_mtime_ns for p in root.iterdir()} == before


def test_a_folder_of_something_else_is_refused_and_stays_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not empty"), opened(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"), opened(tmp_path / "run"):
        pass
    assert (tmp_path / "run").read_text() == "a file"


def test_a_damaged_identity_is_refused_with_a_message(tmp_path):
    root = tmp_path / "run"
    with opened(root):
        pass
    (root / "run.json").write_text("{")
    with pytest.raises(OutputError, match=r"run\.json"), opened(root):
        pass


def test_an_empty_folder_is_fine(tmp_path):
    with opened(tmp_path) as folder:
        assert folder.root == tmp_path


HOLD = """
import sys
from pathlib import Path
from orchestrator.recipe.fingerprint import Identity
from orchestrator.run.folder import open_run
with open_run(Path(sys.argv[1]), Identity({"run.seed": 0}), "", ""):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_has_ended_in_whatever_way(tmp_path):
    root = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(OutputError, match="in use by another process"), opened(root):
            pass
        holder.kill()
        holder.wait()
    with opened(root):
        pass


def test_the_lock_ends_with_the_run_also_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), opened(tmp_path / "run"):
        raise ZeroDivisionError
    with opened(tmp_path / "run"):
        pass


OPEN = """
import os, sys
from pathlib import Path
from orchestrator.recipe.schema import Optimizer
from orchestrator.core.errors import OutputError
from orchestrator.recipe.fingerprint import Identity
from orchestrator.run.folder import open_run
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)  # the superuser may write anywhere
try:
    with open_run(Path(sys.argv[1]), Identity({"run.seed": 0}), "", ""):
        pass
except OutputError as error:
    print(error)
    sys.exit(int(error.exit_code))
"""


@pytest.fixture
def open_to_all():
    """A folder that another user can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.glob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("existing", [False, True], ids=["new", "of this run"])
def test_a_folder_that_cannot_be_written_is_refused(open_to_all, existing):
    root = open_to_all / "run"
    if existing:
        with opened(root):
            pass
    for path in (*root.glob("*"), root, open_to_all):
        if path.exists():
            path.chmod(0o555 if path.is_dir() else 0o444)
    done = subprocess.run([sys.executable, "-c", OPEN, str(root)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 73, done.stderr
    assert "cannot be written" in done.stdout
    assert root.exists() == existing


def test_a_start_that_was_cut_short_does_not_block_the_next(tmp_path):
    (tmp_path / "run.lock").touch()
    (tmp_path / ".run.json.12345678").write_text("{")
    with opened(tmp_path):
        pass


def test_the_working_folder_of_a_ray_job_is_refused(tmp_path):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    with (
        pytest.raises(OutputError, match="working folder of a Ray job") as refused,
        opened(copy / "runs" / "x"),
    ):
        pass
    assert "absolute" in refused.value.fix and not copy.exists()


def without_locks(number: int) -> Callable[..., None]:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_without_locks_a_file_names_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("fcntl.flock", without_locks(number))
    root = tmp_path / "run"
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    ).stdout

    with opened(root):
        owner = json.loads((root / "run.owner").read_text())
        assert owner == {"host": socket.gethostname(), "pid": os.getpid()}
        with (
            pytest.raises(
                OutputError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"
            ) as caught,
            opened(root),
        ):
            pass
        assert (
            "flock" in caught.value.why
            and str(root / "run.owner") in caught.value.fix
            and caught.value.exit_code == 73
        )
    assert not (root / "run.owner").exists()
    (root / "run.owner").write_text(json.dumps({"host": socket.gethostname(), "pid": int(ended)}))
    with opened(root):
        assert json.loads((root / "run.owner").read_text())["pid"] == os.getpid(), (
            "the file of a killed process is replaced"
        )
    for content in (json.dumps({"host": "another", "pid": 1}), "half a"):
        (root / "run.owner").write_text(content)
        with pytest.raises(OutputError, match="in use by process"), opened(root):
            pass


def test_another_failure_of_the_lock_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", without_locks(errno.EIO))
    with pytest.raises(OutputError, match=f"{tmp_path / 'run'} cannot be written"), opened(tmp_path / "run"):
        pass


# ---- what is watched


def test_a_refusal_names_the_keys_that_differ(tmp_path: Path) -> None:
    one = Identity({"optimizer.learning_rate": 1e-4, "run.seed": 0, "rows": "a" * 64})
    with open_run(tmp_path / "run", one, "", ""):
        pass
    other = Identity(
        {"optimizer.learning_rate": 2e-4, "run.seed": 0, "rows": "b" * 64, "algorithm.beta": 0.1}
    )
    with (
        pytest.raises(OutputError, match="differs in 3 keys") as caught,
        open_run(tmp_path / "run", other, "", ""),
    ):
        pass
    assert (
        "algorithm.beta: nothing -> 0.1\n" in caught.value.why
        and "optimizer.learning_rate: 0.0001 -> 0.0002" in caught.value.why
    )
    assert "run.seed" not in caught.value.why and "rows: " in caught.value.why


def test_the_end_of_a_schedule_moves_only_with_extend(tmp_path: Path) -> None:
    identity, notes = Identity({"run.seed": 0}), []
    constant, cosine = (
        Optimizer.model_validate({"learning_rate": 1e-3, "schedule": schedule})
        for schedule in ("constant", "cosine")
    )

    def resume(root: Path, optimizer: Optimizer, steps: int, allowed: bool = False) -> None:
        with open_run(
            root, identity, "", "", notes.append, end=End(optimizer, steps, allowed=allowed)
        ) as folder:
            (folder.checkpoints / "step_00000040").mkdir(parents=True, exist_ok=True)

    for steps in (80, 90):
        resume(tmp_path / "constant", constant, steps)
    assert len(notes) == 1 and "80 -> 90" in notes[0] and "learning rate" not in notes[0]
    resume(tmp_path / "cosine", cosine, 80)
    with pytest.raises(OutputError, match=r"80 optimizer steps.* 90") as caught:
        resume(tmp_path / "cosine", cosine, 90)
    assert (
        "optimizer.schedule=cosine" in caught.value.why
        and "39 of the 40" in caught.value.why
        and "--extend" in caught.value.fix
    )
    resume(tmp_path / "cosine", cosine, 90, allowed=True)
    assert "39 of the 40" in notes[1] and "learning rate" in notes[1]
    resume(tmp_path / "cosine", cosine, 90)  # noted once, and kept
    assert len(notes) == 2
    record = json.loads((tmp_path / "cosine" / "run.json").read_text())
    assert record["schedule_steps"] == 90 and [c["what"] for c in record["changes"]] == [
        "optimizer steps of the run"
    ]


def test_a_change_of_a_watched_file_is_noted_once_and_kept(tmp_path: Path) -> None:
    root, notes = tmp_path / "run", []
    for reward, tokens, expected in (
        ("a", "t", 0),
        ("a", "t", 0),
        ("b", "t", 1),
        ("b", "t", 1),
        ("b", "u", 2),
    ):
        with opened(
            root, 0, {"the file of rewards.functions, mine (judge.py)": reward * 64, TOKENS: tokens}, notes
        ):
            pass
        assert len(notes) == expected
    assert "the file of rewards.functions, mine (judge.py)" in notes[0]
    assert "aaaaaaaaaaaa then" in notes[0] and "bbbbbbbbbbbb now" in notes[0]
    assert all(line.startswith("warning:") for line in notes) and "tokens" in notes[1]
    record = json.loads((root / "run.json").read_text())
    assert [c["what"] for c in record["changes"]] == [
        "the file of rewards.functions, mine (judge.py)",
        TOKENS,
    ]
    assert record["watched"][TOKENS] == "u"
