"""Commit, verify, fall back: a crash, a flipped bit or a full disk never costs more than the newest
checkpoint."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from orchestrator.core import faults
from orchestrator.core.errors import CheckpointError, Exit, OutputError, WorkerLost
from orchestrator.core.files import FileEntry, sha256, write_atomically
from orchestrator.core.reports import Progress
from orchestrator.run.checkpoints import CheckpointStore, verify

FILES = ("state-rank0000.safetensors", "state-rank0001.safetensors", "rng/rank0.json")
RUN = "0123456789abcdef"


def writer(value):
    """Writes tensor files as the learners do, one of them in a subfolder."""

    def write(folder):
        for name in FILES[:2]:
            save_file({"weight": np.full(4, value, np.float32)}, folder / name)
        (folder / "rng").mkdir()
        (folder / FILES[2]).write_text(json.dumps({"seed": value}))
        return [FileEntry.of(folder / name, folder) for name in FILES]

    return write


@pytest.fixture
def notes():
    return []


@pytest.fixture
def store(tmp_path, notes):
    return CheckpointStore(tmp_path / "out" / "checkpoints", run=RUN, keep=2, note=notes.append)


def save(store, *steps):
    return [store.save(Progress(step=s, examples=8 * s), {"seed": s}, writer(s)) for s in steps][-1]


def names(store):
    return sorted(p.name for p in store.root.iterdir())


def step(number):
    return f"step_{number:08d}"


def newest_step(store):
    saved = store.newest()
    return None if saved is None else saved.progress.step


def test_a_new_run_has_no_checkpoint(store):
    assert store.newest() is None


def test_what_was_saved_comes_back(store, notes):
    directory = store.save(Progress(3, 24, 100, 1), {"wandb": "abc", "lr": 1e-05, "list": (1, 2)}, writer(3))
    saved = store.newest()
    assert (saved.directory, saved.progress, saved.run) == (directory, Progress(3, 24, 100, 1), RUN)
    assert saved.extra_state == {"wandb": "abc", "lr": 1e-05, "list": [1, 2]}
    assert load_file(directory / FILES[0])["weight"].tolist() == [3.0] * 4
    assert (store.root / "LATEST").read_text() == step(3) + "\n"
    assert notes == []


def test_extra_state_with_integer_keys_verifies(store):
    store.save(Progress(1), {"by_rank": {2: "b", 10: "c", 1: "a"}}, writer(1))
    assert store.newest().extra_state == {"by_rank": {"1": "a", "2": "b", "10": "c"}}


def test_a_folder_holds_no_pickle_and_lists_every_file(store):
    directory = save(store, 1)
    files = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
    assert files == {*FILES, "MANIFEST.json"}
    listed = json.loads((directory / "MANIFEST.json").read_text())["manifest"]["files"]
    assert [(f["path"], f["size"], f["sha256"]) for f in listed] == [
        (name, (directory / name).stat().st_size, sha256(directory / name)) for name in sorted(FILES)
    ]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_last_ones_are_kept(store, keep):
    store.keep = keep
    save(store, 1, 2, 9, 10, 11)
    assert names(store) == ["LATEST", *(step(s) for s in [1, 2, 9, 10, 11][-keep:])]
    assert newest_step(store) == 11


def test_older_ones_are_removed_only_after_the_new_one_is_complete(store):
    store.keep = 1
    save(store, 1)

    def write(folder):
        assert step(1) in names(store)
        return writer(2)(folder)

    store.save(Progress(2), {}, write)
    assert names(store) == ["LATEST", step(2)]


def test_a_step_written_again_replaces_the_one_before(store):
    save(store, 1, 2)
    store.save(Progress(step=2, tokens=5), {}, writer(7))
    assert names(store) == ["LATEST", step(1), step(2)]
    assert store.newest().progress.tokens == 5
    assert load_file(store.root / step(2) / FILES[0])["weight"][0] == 7


def test_a_resume_from_an_older_one_leaves_the_damaged_newer_one_behind(store, notes):
    save(store, 1, 5)
    (store.root / step(5) / FILES[0]).unlink()
    assert newest_step(store) == 1
    save(store, 3)
    assert newest_step(store) == 3
    save(store, 5)
    assert newest_step(store) == 5
    assert len(notes) == 2


# Damage


def flip(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_of_a_file_is_refused_by_name(store, name):
    directory = save(store, 1)
    path = directory / name
    intact = path.read_bytes()
    for position in range(len(intact)):
        flip(path, position, position % 8)
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            verify(directory)
        path.write_bytes(intact)
    assert verify(directory).progress.step == 1


def test_any_flipped_bit_of_the_manifest_is_refused(store):
    directory = save(store, 1)
    path = directory / "MANIFEST.json"
    intact = path.read_bytes()
    for position in range(len(intact)):
        for bit in range(8):
            flip(path, position, bit)
            with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
                verify(directory)
            path.write_bytes(intact)
    assert verify(directory).progress.step == 1


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def first_bit(path):
    flip(path, 0, 0)


DAMAGE = [
    *((name, cut_short, "is truncated") for name in FILES),
    *((name, lengthen, "is truncated") for name in FILES),
    *((name, Path.unlink, "is missing") for name in FILES),
    *((name, first_bit, "is damaged") for name in FILES),
    ("MANIFEST.json", cut_short, "cannot be read"),
    ("MANIFEST.json", lambda path: path.write_text("[]"), "cannot be read"),
    ("MANIFEST.json", lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read"),
    ("MANIFEST.json", lambda path: path.write_text("{}"), "cannot be read"),
    ("MANIFEST.json", Path.unlink, "cannot be read"),
    (
        "MANIFEST.json",
        lambda path: path.write_text(path.read_text().replace('"step": 2', '"step": 3')),
        "is damaged",
    ),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(store, notes, name, damage, reason):
    save(store, 1, 2)
    damage(store.root / step(2) / name)
    saved = store.newest()
    assert (saved.progress, saved.directory.name, saved.extra_state) == (
        Progress(step=1, examples=8),
        step(1),
        {"seed": 1},
    )
    assert len(notes) == 1
    assert notes[0].startswith(f"checkpoint {step(2)} is not used: {name} {reason} (")


def test_when_all_are_damaged_each_is_named_and_none_used(store, notes):
    save(store, 1, 2)
    for number in (1, 2):
        first_bit(store.root / step(number) / FILES[0])
    assert store.newest() is None
    assert [note.split()[1] for note in notes] == [step(2), step(1)]


def test_a_lost_or_wrong_latest_file_changes_nothing(store):
    save(store, 1, 2)
    (store.root / "LATEST").write_text(step(1))
    assert newest_step(store) == 2
    (store.root / "LATEST").unlink()
    assert newest_step(store) == 2


def test_a_manifest_that_points_outside_is_refused(store):
    (store.root.parent).mkdir(parents=True)
    (store.root.parent / "secret").write_text("x")

    def write(_):
        return [FileEntry("../../secret", 1, sha256(store.root.parent / "secret"))]

    with pytest.raises(CheckpointError, match=r"\.\./\.\./secret leaves the checkpoint folder"):
        verify(store.save(Progress(1), {}, write))


def test_a_manifest_of_another_format_is_refused(store, monkeypatch):
    monkeypatch.setattr("orchestrator.run.checkpoints.FORMAT", 2)
    directory = save(store, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format does not match"):
        verify(directory)


def test_another_runs_folder_is_refused(store, notes):
    save(store, 1, 2)
    first_bit(store.root / step(2) / FILES[0])
    other = CheckpointStore(store.root, run="f" * 16, keep=2, note=notes.append)
    with pytest.raises(OutputError, match="holds another run's checkpoints") as failure:
        other.newest()
    assert failure.value.exit_code == Exit.CANNOT_CREATE == 73
    assert "0123456789ab" in failure.value.why and "ffffffffffff" in failure.value.why


# Crashes

SAVE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_checkpoints import RUN, writer
from orchestrator.run.checkpoints import CheckpointStore
from orchestrator.core.reports import Progress
store = CheckpointStore(Path(sys.argv[2]), run=RUN, keep=int(sys.argv[3]), note=print)
store.save(Progress(step=2, tokens=9), {}, writer(2))
"""


def save_in_process(store, *planned):
    environment = {**os.environ, faults.VARIABLE: json.dumps(planned)}
    command = [sys.executable, "-c", SAVE, str(Path(__file__).parent), str(store.root), str(store.keep)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("site", "survivor"),
    [
        ("checkpoint.written", 1),
        ("checkpoint.manifest", 1),
        ("checkpoint.renamed", 2),
        ("checkpoint.replaced", 1),
    ],
)
@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_while_saving_leaves_a_loadable_state(store, notes, site, survivor, keep):
    store.keep = keep
    save(store, 1)
    if site == "checkpoint.replaced":  # passed only when the step is there already
        save(store, 2)
        survivor = 2
    killed = save_in_process(store, {"site": site, "action": "kill", "step": 2})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = store.newest()
    assert saved.progress.step == survivor
    assert load_file(saved.directory / FILES[0])["weight"].tolist() == [survivor] * 4
    assert notes == []
    assert save_in_process(store).returncode == 0
    assert store.newest().progress == Progress(step=2, tokens=9)
    left = [step(1), step(2)] if keep == 2 else [step(2)]
    assert names(store) == ["LATEST", *left]


def test_a_kill_before_the_first_checkpoint_leaves_none(store):
    killed = save_in_process(store, {"site": "checkpoint.manifest", "action": "kill"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert store.newest() is None
    assert newest_step(store) is None and save(store, 3).is_dir()
    assert names(store) == ["LATEST", step(3)]


# Full disks and other places that cannot be written


@pytest.mark.parametrize(
    ("site", "survivor"),
    [
        ("checkpoint.written", 1),
        ("checkpoint.manifest", 1),
        ("checkpoint.renamed", 2),
        ("checkpoint.replaced", 2),
    ],
)
def test_a_full_disk_is_an_output_error_and_leaves_nothing_behind(store, monkeypatch, site, survivor):
    save(store, 1, *([2] if site == "checkpoint.replaced" else []))
    monkeypatch.setenv(faults.VARIABLE, json.dumps([{"site": site, "action": "disk_full", "step": 2}]))
    with pytest.raises(
        OutputError, match=r"checkpoint of step 2 could not be written[\s\S]*No space left on device"
    ) as failure:
        save(store, 2)
    assert failure.value.exit_code == 73
    assert newest_step(store) == survivor
    assert not [name for name in names(store) if name.startswith(".")]
    monkeypatch.delenv(faults.VARIABLE)
    save(store, 2)
    assert names(store) == ["LATEST", step(1), step(2)]


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop()), resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize("limit", [10, 200])
def test_files_that_cannot_grow_leave_the_one_before(store, limit):
    """The kernel refuses to write: the tensors with a limit of 10 bytes, the manifest with 200."""
    save(store, 1)
    command = [
        sys.executable,
        "-c",
        LIMITED + SAVE,
        str(Path(__file__).parent),
        str(store.root),
        "2",
        str(limit),
    ]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert failed.returncode == 1
    assert "OutputError: checkpoint of step 2 could not be written" in failed.stderr
    assert names(store) == ["LATEST", step(1)]
    assert newest_step(store) == 1


def test_a_tensor_file_that_cannot_be_written_is_an_output_error(store):
    def write(folder):
        save_file({"w": np.zeros(1)}, folder / "nowhere" / "state.safetensors")
        return []

    with pytest.raises(OutputError, match="could not be written"):
        store.save(Progress(1), {}, write)
    assert names(store) == []


def test_a_worker_lost_while_saving_is_reported_as_such(store):
    save(store, 1)

    def write(folder):
        writer(2)(folder)
        raise WorkerLost("rank 1 is gone")

    with pytest.raises(WorkerLost):
        store.save(Progress(2), {}, write)
    assert newest_step(store) == 1
    save(store, 2)
    assert names(store) == ["LATEST", step(1), step(2)]


def test_an_output_that_is_a_file_is_an_output_error(tmp_path, notes):
    (tmp_path / "out").write_text("not a folder")
    with pytest.raises(OutputError, match=r"could not be written[\s\S]*Not a directory"):
        save(CheckpointStore(tmp_path / "out" / "checkpoints", run=RUN, keep=1, note=notes.append), 1)


def test_an_atomic_write_that_fails_leaves_the_old_text(tmp_path):
    path = tmp_path / "plan.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("plan.json", "new")]
