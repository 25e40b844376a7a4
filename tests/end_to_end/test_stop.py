"""A run that is asked to stop: SIGTERM ends it after its step, with a checkpoint, and the same command goes on."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.running import FEW, Sandbox, steps

pytestmark = pytest.mark.timeout(600)

STEPS = 30


def test_sigterm_to_every_process_stops_after_the_step_and_the_next_run_goes_on(tmp_path: Path) -> None:
    """With a Ray of its own, as a user runs it; systemd, Slurm and containers signal its daemons and workers as well as the driver. Nothing
    of it is left at either end."""
    folder = tmp_path / "run"
    overrides = (f"run.max_steps={STEPS}", f"data.train={FEW % 'preference'}", "data.eval=null", "batch.effective=16", "learners.cpus_per_worker=0.5")
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
