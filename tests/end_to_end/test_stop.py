"""A run that is stopped by any signal in any phase ends with 75 and a checkpoint; the same command
continues it."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.core.stopping import ECHO_S, Stop, stop_signals
from tests.running import FEW, REPOSITORY, Command, Sandbox, steps

pytestmark = pytest.mark.timeout(600)

STEPS = 30


def test_sigterm_to_every_process_stops_after_the_step_and_the_next_run_continues(tmp_path: Path) -> None:
    """The run starts its own Ray, as a user's does.

    systemd, Slurm and containers signal Ray's daemons and the workers as well as the driver. No process is
    left after either run.
    """
    folder = tmp_path / "run"
    overrides = (
        f"run.max_steps={STEPS}",
        f"data.train={FEW % 'preference'}",
        "data.eval=null",
        "batch.effective=16",
        "learners.cpus_per_worker=0.5",
    )
    command = ("train", "tiny/dpo", *overrides, "tracking.wandb=off", "--output", folder)
    first = Sandbox(tmp_path / "first")
    try:
        running = first.start(*command)
        running.wait_for(f"step 2/{STEPS}")
        others = [pid for pid in first.living() if pid != running.process.pid]
        assert len(others) > 5, "Ray's daemons and the workers"
        for pid in (*others, running.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        stopped = running.finish(timeout=120)
    finally:
        first.close()
    done = steps(folder)[-1]
    assert stopped.code == 75, stopped.err
    assert 2 <= done < STEPS
    assert f"stopped by request after step {done} of {STEPS}; a checkpoint was written" in stopped.err
    assert "run the same command again" in stopped.err and "Traceback" not in stopped.err
    assert [p.name for p in folder.glob("checkpoints/step_*")] == [f"step_{done:08d}"]
    assert not (folder / "export").exists()

    second = Sandbox(tmp_path / "second")
    try:
        finished = second.run(*command)
    finally:
        second.close()
    assert finished.code == 0, finished.err
    assert f"step {done + 1}/{STEPS}" in finished.out and f"step {done}/{STEPS}" not in finished.out
    assert steps(folder) == list(range(1, STEPS + 1))
    assert (folder / "export" / "model.safetensors").is_file()
    assert str(folder / "report.html") in finished.out


# ---- every signal, to the driver and to its group, in every phase

SMALL = (
    f"data.train={FEW % 'preference'}",
    "batch.effective=16",
    "learners.cpus_per_worker=0.5",
    "tracking.wandb=off",
    "checkpoint.every=null",
)
PHASES: dict[str, tuple[Callable[[Command], None], str, tuple[str, ...]]] = {
    "first second": (
        lambda command: command.wait_for("loading torch"),
        "while starting",
        ("run.max_steps=4",),
    ),
    "start": (lambda command: time.sleep(6.0), "while starting", ("run.max_steps=4",)),
    "step": (
        lambda command: command.wait_for(f"step 2/{STEPS}"),
        "a checkpoint was written",
        (f"run.max_steps={STEPS}",),
    ),
    "export": (
        lambda command: command.wait_for("exporting to"),
        "while exporting the model",
        ("run.max_steps=2",),
    ),
}
"""How to wait for a phase, what the run then prints, and overrides."""
MATRIX = [
    (phase, name, group) for phase in PHASES for name in ("TERM", "INT", "HUP") for group in (False, True)
]
QUICK = (("first second", "INT", True), ("step", "HUP", True))


@pytest.mark.parametrize(
    ("phase", "name", "group"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX],
    ids=str,
)
def test_any_signal_in_any_phase_ends_with_75_and_nothing_left(
    tmp_path: Path, phase: str, name: str, group: bool
) -> None:
    """The signal comes twice in a row, as from `timeout` and a closing terminal."""
    wait, words, overrides = PHASES[phase]
    number, sandbox = signal.Signals[f"SIG{name}"], Sandbox(tmp_path / "sandbox")
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a run under nohup would ignore it
    try:
        running = sandbox.start("train", "tiny/dpo", *SMALL, *overrides, "--output", tmp_path / "run")
        wait(running)
        for _ in range(2):
            (os.killpg if group else os.kill)(running.process.pid, number)
        stopped = running.finish(timeout=120)
    finally:
        signal.signal(signal.SIGHUP, before)
        sandbox.close()
    assert stopped.code == 75, stopped.err
    assert (
        words in stopped.err
        and "run the same command again" in stopped.err
        and "Traceback" not in stopped.err
    )
    if phase in ("step", "export"):
        (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
        assert int(checkpoint.name[5:]) == steps(tmp_path / "run")[-1]


IGNORING = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup
from orchestrator.core.stopping import stop_signals
with stop_signals() as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    with stop.deferred("training"):
        os.kill(os.getpid(), signal.SIGTERM)
        print(stop.by.name, stop.asked_once)
"""


def test_a_signal_that_is_ignored_at_start_stays_ignored() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IGNORING],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["SIGTERM", "True"]


def test_only_a_later_signal_is_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, now = Stop(), [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with stop.deferred("training"):
        stop.handle(signal.SIGTERM)
        now[0] += ECHO_S / 2
        stop.handle(signal.SIGHUP)
        assert stop() and stop.asked_once
        now[0] += ECHO_S
        with pytest.raises(KeyboardInterrupt):
            stop.handle(signal.SIGTERM)
        assert not stop.asked_once and "a second SIGTERM while training" in str(stop.interrupted())


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before


PRINTING = """
import sys, time
from orchestrator.core.stopping import enduring_output
with enduring_output():
    for i in range(int(sys.argv[1])):
        print("line", i, flush=True)
        time.sleep(0.05)
    open(sys.argv[2], "w").write("to the end")
"""


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_closed_output_does_not_end_the_run(tmp_path: Path, kind: str) -> None:
    """As with `| head -1`, and with a closed terminal (here without its SIGHUP)."""
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTING, "20", str(tmp_path / "end")],
        cwd=REPOSITORY,
        stdout=writer,
        start_new_session=True,
    )
    os.close(writer)
    assert os.read(reader, 4)
    os.close(reader)
    assert process.wait(60) == 0 and (tmp_path / "end").read_text() == "to the end"
