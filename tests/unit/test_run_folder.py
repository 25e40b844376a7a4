"""One run per folder, one process per run."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from orchestrator.errors import OutputError
from orchestrator.run_folder import open_run


def opened(root, fingerprint="f" * 64):
    return open_run(root, fingerprint, "run: {}\n", "{}")


def test_a_new_folder_says_what_the_run_is(tmp_path):
    root = tmp_path / "deep" / "run"
    with opened(root) as folder:
        assert json.loads((root / "run.json").read_text()) == {"fingerprint": "f" * 64}
        assert (root / "recipe.yaml").read_text() == "run: {}\n"
        assert (root / "plan.json").read_text() == "{}\n"
        assert folder.logs.is_dir()
        assert (folder.checkpoints, folder.export, folder.metrics) == (root / "checkpoints", root / "export", root / "metrics.jsonl")


def test_the_same_run_goes_on_in_its_folder(tmp_path):
    with opened(tmp_path / "run") as folder:
        folder.metrics.write_text("kept")
    with opened(tmp_path / "run") as folder:
        assert folder.metrics.read_text() == "kept"


def test_another_run_is_refused_and_nothing_changes(tmp_path):
    root = tmp_path / "run"
    with opened(root, "a" * 64):
        pass
    before = {p.name: p.stat().st_mtime_ns for p in root.iterdir()}
    with pytest.raises(OutputError, match="another run") as error, opened(root, "b" * 64):
        pass
    assert "aaaaaaaaaaaa" in error.value.why and "bbbbbbbbbbbb" in error.value.why
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
from orchestrator.run_folder import open_run
with open_run(Path(sys.argv[1]), "f" * 64, "", ""):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_went(tmp_path):
    root = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
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
from orchestrator.errors import OutputError
from orchestrator.run_folder import open_run
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)  # the superuser may write anywhere
try:
    with open_run(Path(sys.argv[1]), "f" * 64, "", ""):
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
    with pytest.raises(OutputError, match="working folder of a Ray job") as refused, opened(copy / "runs" / "x"):
        pass
    assert "absolute" in refused.value.fix and not copy.exists()
