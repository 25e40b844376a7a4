"""Real wandb runs: offline ones read back from their file, and runs whose server cannot be reached."""

import json
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.reports import EvaluationReport, Sample, StepReport
from orchestrator.observe.alerts import Alert
from orchestrator.observe.jsonl import JsonlSink
from orchestrator.observe.wandb_sink import (
    STEP,
    WandbSink,
    apply_environment,
    failed_within,
    stable_run_id,
    without_credentials,
)
from orchestrator.recipe.schema import Tracking
from tests.wandb_server import WandbServer

SAMPLES = (
    Sample(2, "pair", "Q: 2+2?", chosen="4", rejected="5", scores={"margin": -1.5}),
    Sample(2, "generation", "Q: 1+1?", completion="3", answer="2", scores={"correct": 0.0}),
)
ROLLOUTS = tuple(
    Sample(
        2,
        "rollout",
        f"Q{i}",
        completion="4",
        scores={"reward": i / 100, "exact": 1.0},
        version=1,
        finish="stop",
    )
    for i in range(100)
)


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log of protobufs in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2 as protobuf

    content, block = path.read_bytes(), 32768
    assert content[:4] in (b":W&B", b"")
    at, parts = 7, b""
    while at + 7 <= len(content):
        remaining = block - at % block
        if remaining < 7:
            at += remaining
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if at + 7 + length > len(content):
            return  # still being written
        part = content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind == 0:  # zeros fill a block
            continue
        parts = part if kind in (1, 2) else parts + part
        if kind in (1, 4):
            record = protobuf.Record()
            record.ParseFromString(parts)
            yield record


def of_kind(folder: Path, kind: str) -> list[Any]:
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    return [getattr(r, kind) for r in finished(path) if r.WhichOneof("record_type") == kind]


def finished(path: Path, deadline_s: float = 60.0) -> list[Any]:
    """All records. wandb's own process writes the last ones after `finish` has returned, so this waits."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        complete = list(records(path))
        if any(r.WhichOneof("record_type") == "exit" for r in complete):
            return complete
        time.sleep(0.1)
    pytest.fail(f"{path} has no exit record after {deadline_s:.0f} s")


def history(folder: Path) -> list[dict[str, Any]]:
    """Logged rows; the fields of a table as "name:field"."""
    return [
        {":".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item}
        for row in of_kind(folder, "history")
    ]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """One offline run: two steps and an evaluation."""
    folder, notes = tmp_path_factory.mktemp("run") / "deeper", []
    sink = WandbSink(
        folder, Tracking(project="p", group="g"), "a-run", {"algorithm": {"beta": 0.1}}, "id0123", "dpo"
    )
    sink.open(notes.append)
    sink.step(StepReport(1, {"loss": 0.75, "rewards/accuracies": 0.5}))
    sink.step(StepReport(2, {"loss": float("nan"), "rewards/accuracies": float("nan")}, ROLLOUTS))
    sink.evaluation(EvaluationReport(2, {"eval/loss": 0.25}, SAMPLES))
    sink.alert(Alert("reward collapse", "it fell: http://user:canary@rewards/score", "ERROR", 2))
    sink.close(failed=True)
    return folder, notes


def test_metrics_are_recorded_by_our_step(offline: tuple[Path, list[str]]) -> None:
    rows = history(offline[0])
    assert [row[STEP] for row in rows] == [1, 2, 2]
    assert (rows[0]["train/loss"], rows[0]["rewards/accuracies"], rows[2]["eval/loss"]) == (0.75, 0.5, 0.25)


def test_an_unknown_metric_is_not_logged_but_a_broken_loss_is(offline: tuple[Path, list[str]]) -> None:
    second = history(offline[0])[1]
    assert "rewards/accuracies" not in second and math.isnan(second["train/loss"])


def test_the_step_metric_is_defined_for_all_metrics(offline: tuple[Path, list[str]]) -> None:
    metrics = of_kind(offline[0], "metric")
    assert STEP in [m.name for m in metrics]
    assert ("*", STEP) in [(m.glob_name, m.step_metric) for m in metrics]


@pytest.mark.parametrize(
    ("name", "columns", "row"),
    [
        (
            "eval/most_wrong_pairs",
            ["step", "prompt", "chosen", "rejected", "margin"],
            [2, "Q: 2+2?", "4", "5", -1.5],
        ),
        (
            "eval/generations",
            ["step", "prompt", "completion", "answer", "correct"],
            [2, "Q: 1+1?", "3", "2", 0.0],
        ),
    ],
)
def test_tables_are_recorded(
    offline: tuple[Path, list[str]], name: str, columns: list[str], row: list[Any]
) -> None:
    entry = history(offline[0])[2]
    assert (entry[f"{name}:_type"], entry[f"{name}:nrows"], entry[STEP]) == ("table-file", 1, 2)
    (file,) = (offline[0] / "wandb").glob(f"offline-run-*/files/{entry[f'{name}:path']}")
    table = json.loads(file.read_text())
    assert (table["columns"], table["data"]) == (columns, [row])


def test_the_run_has_its_name_id_and_config(offline: tuple[Path, list[str]]) -> None:
    run = of_kind(offline[0], "run")[0]
    assert (run.run_id, run.display_name, run.project, run.run_group) == ("id0123", "a-run", "p", "g")
    assert {u.key: json.loads(u.value_json) for u in run.config.update}["algorithm"] == {"beta": 0.1}
    assert (run.job_type, list(run.tags)) == ("dpo", ["dpo"])


def test_a_failed_run_is_failed_in_wandb_too(offline: tuple[Path, list[str]]) -> None:
    assert of_kind(offline[0], "exit")[0].exit_code == 1
    (alert,) = of_kind(offline[0], "alert")
    assert (alert.title, alert.text, alert.level) == (
        "reward collapse",
        "it fell: http://rewards/score",
        "ERROR",
    )


def test_of_many_rollouts_the_worst_middle_and_best_are_shown(offline: tuple[Path, list[str]]) -> None:
    entry = history(offline[0])[2]
    (file,) = (offline[0] / "wandb").glob(f"offline-run-*/files/{entry['rollouts/worst_median_best:path']}")
    table = json.loads(file.read_text())
    assert table["columns"] == [
        "step",
        "prompt",
        "completion",
        "answer",
        "version",
        "finish",
        "reward",
        "exact",
    ]
    assert [row[6] for row in table["data"]] == [
        i / 100 for i in (*range(8), *range(46, 54), *range(92, 100))
    ]


def test_a_note_has_the_upload_command(offline: tuple[Path, list[str]]) -> None:
    (note,) = offline[1]
    (folder,) = (offline[0] / "wandb").glob("offline-run-*")
    assert f"wandb sync {folder}" in note


def test_the_same_run_can_start_again_in_one_process(tmp_path: Path) -> None:
    """A lost worker makes the driver start over, with the same run id."""
    for attempt in ("a", "b"):
        notes: list[str] = []
        sink = WandbSink(tmp_path / attempt, Tracking(), "r", {}, "again")
        sink.open(notes.append)
        sink.step(StepReport(1, {"loss": 0.5}))
        sink.close()
        assert len(notes) == 1
        assert [row["train/loss"] for row in history(tmp_path / attempt)] == [0.5]


def test_a_service_that_a_parent_named_is_not_asked(tmp_path: Path) -> None:
    """The variable outlives the process that it names, for example when a notebook is restarted."""
    environment = os.environ | {"WANDB_SERVICE": f"3-1-unix-{tmp_path}/gone.sock", "HOME": str(tmp_path)}
    with WandbServer() as server:
        command = [sys.executable, "-c", OUTAGE, str(tmp_path / "run")]
        done = subprocess.run(
            command, env=environment | server.environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["notes"] == []
        assert server.only_run.series("train/loss") == [0.5]


def test_each_offline_recording_is_the_whole_run(tmp_path: Path) -> None:
    """One `wandb sync` uploads it, whatever a crash left of earlier recordings."""
    ledger = JsonlSink(tmp_path, 0)
    ledger.open(lambda _: None)
    ledger.evaluation(EvaluationReport(0, {"eval/loss": 0.9}))
    ledger.step(StepReport(1, {"loss": 0.75}))
    ledger.step(StepReport(2, {"loss": float("nan")}))
    ledger.evaluation(EvaluationReport(2, {"eval/loss": 0.5}))
    ledger.close()
    sink = WandbSink(tmp_path, Tracking(), "r", {}, "whole")
    sink.open(lambda _: None)
    sink.step(StepReport(3, {"loss": 0.25}))
    sink.close()
    rows = history(tmp_path)
    assert [(row[STEP], row.get("train/loss"), row.get("eval/loss")) for row in rows] == [
        (0, None, 0.9), (1, 0.75, None), (2, rows[2]["train/loss"], None), (2, None, 0.5), (3, 0.25, None),
    ]  # fmt: skip
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    with WandbServer() as server:
        environment = os.environ | server.environment() | {"HOME": str(tmp_path / "home")}
        command = [str(Path(sys.executable).parent / "wandb"), "sync", str(folder)]
        synced = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert synced.returncode == 0, synced.stderr
        assert server.only_run.series(STEP) == [0, 1, 2, 2, 3]


def test_addresses_in_the_config_name_no_user() -> None:
    config = {
        "rewards": [{"url": "https://me:secret@host:1/score"}],
        "plan": {"beta": 0.1, "choices": ("a", "http://host/")},
    }
    assert without_credentials(config) == {
        "rewards": [{"url": "https://host:1/score"}],
        "plan": {"beta": 0.1, "choices": ["a", "http://host/"]},
    }


def dead_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


OUTAGE = """
import json, sys, time
from pathlib import Path
from orchestrator.recipe.schema import Tracking
from orchestrator.observe.wandb_sink import WandbSink
from orchestrator.core.reports import StepReport
notes, started = [], time.monotonic()
tracking = Tracking(wandb="online", init_timeout_s=2, finish_timeout_s=5)
sink = WandbSink(Path(sys.argv[1]), tracking, "r", {}, "outage")
sink.open(notes.append)
sink.step(StepReport(1, {"loss": 0.5}))
sink.close()
print(json.dumps({"notes": notes, "seconds": time.monotonic() - started}))
"""


@pytest.mark.parametrize("key", ["", "0123456789abcdef0123456789abcdef01234567"])
def test_without_a_server_the_run_is_recorded_offline(tmp_path: Path, key: str) -> None:
    """In a separate process: wandb keeps the address and the key of a process for all its runs."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path / "home"),
        "NETRC": str(tmp_path / "none"),
        "WANDB_BASE_URL": f"http://127.0.0.1:{dead_port()}",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    } | ({"WANDB_API_KEY": key} if key else {})
    command = [sys.executable, "-c", OUTAGE, str(tmp_path / "run")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    fallback, upload = result["notes"]
    assert "wandb online did not start" in fallback
    assert "recording offline instead" in fallback
    assert key or "no API key" in fallback
    assert "wandb sync" in upload
    assert result["seconds"] < 30
    assert [row["train/loss"] for row in history(tmp_path / "run")] == [0.5]
    printed = done.stdout + done.stderr
    recorded = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert not key or (key not in printed and key.encode() not in recorded)


def test_a_broken_tracker_is_noted_once_and_training_continues(tmp_path: Path) -> None:
    notes: list[str] = []
    sink = WandbSink(tmp_path, Tracking(), "r", {}, "broken")
    sink.open(notes.append)
    assert sink._run is not None
    sink._run.finish()  # from here on wandb refuses to log
    sink.step(StepReport(1, {"loss": 1.0}))
    sink.step(StepReport(2, {"loss": 1.0}))
    stopped = [n for n in notes if "stopped taking metrics" in n]
    assert len(stopped) == 1
    sink.close()


def test_finishing_is_bounded() -> None:
    release = threading.Event()
    started = time.monotonic()
    failure = failed_within(lambda: release.wait(30) and None, 0.2)
    assert isinstance(failure, TimeoutError)
    assert time.monotonic() - started < 5
    release.set()

    def fail() -> None:
        raise ConnectionError("gone")

    assert isinstance(failed_within(fail, 5), ConnectionError)
    assert failed_within(lambda: None, 5) is None


def test_the_run_id_is_stable_and_belongs_to_the_folder(tmp_path: Path) -> None:
    first = stable_run_id("f", tmp_path / "a")
    assert first == stable_run_id("f", tmp_path / "b" / ".." / "a")
    assert len({first, stable_run_id("g", tmp_path / "a"), stable_run_id("f", tmp_path / "b")}) == 3
    assert first.isalnum()


def test_importing_the_module_does_not_import_wandb() -> None:
    code = "import sys, orchestrator.observe.wandb_sink; print('wandb' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("recipe", "environment", "wandb", "project", "notes"),
    [
        ({}, {}, "offline", "orchestrator", 0),
        ({"wandb": "online"}, {"WANDB_MODE": "disabled"}, "off", "orchestrator", 1),
        ({}, {"WANDB_MODE": "disabled", "WANDB_PROJECT": "mine"}, "off", "orchestrator", 1),
        ({"wandb": "online"}, {"WANDB_MODE": "offline"}, "offline", "orchestrator", 1),
        ({}, {"WANDB_MODE": "online"}, "offline", "orchestrator", 1),
        ({}, {"WANDB_PROJECT": "mine"}, "offline", "mine", 1),
        ({"project": "ours"}, {"WANDB_PROJECT": "mine"}, "offline", "ours", 1),
        ({"project": "mine"}, {"WANDB_PROJECT": "mine"}, "offline", "mine", 0),
        ({}, {"WANDB_NAME": "x", "WANDB_RUN_ID": "y"}, "offline", "orchestrator", 2),
        ({"wandb": "off"}, {"WANDB_MODE": "online", "WANDB_PROJECT": "mine"}, "off", "orchestrator", 0),
    ],
)
def test_wandbs_own_variables_are_followed_or_noted(recipe, environment, wandb, project, notes):
    tracking, lines = apply_environment(Tracking(**recipe), environment)
    assert (tracking.wandb, tracking.project, len(lines)) == (wandb, project, notes)
    for name in environment if notes else ():
        assert any(name in line for line in lines) or (name == "WANDB_PROJECT" and wandb == "off")
