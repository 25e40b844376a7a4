"""Forked workers are the processes that Ray would have started, in less time and memory; without a server
they start all the same."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cluster.forkserver import VARIABLE, forked_workers, py_executable
from tests.running import Sandbox, exported_hash, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")

PRINTS = """
import json, os, signal, sys
print(json.dumps({
    "argv": sys.argv,
    "own": os.environ.get("OWN"),
    "cwd": os.getcwd(),
    "ignored": signal.getsignal(signal.SIGHUP) == signal.SIG_IGN,
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "torch": "torch" in sys.modules,
    "name": __name__,
}))
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture(scope="module")
def server():
    with forked_workers():
        assert VARIABLE in os.environ
        yield


def worker(
    tmp_path: Path, script: str = PRINTS, before: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Starts a worker as Ray does: with `py_executable` in place of the interpreter, from a shell that has
    set the worker's signals and variables."""
    file = tmp_path / "worker.py"
    file.write_text(script)
    command = f"{before} exec {py_executable(os.environ)} {file} --a=b 'c d'"
    return subprocess.run(
        ["bash", "-c", command],
        env=os.environ | variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_forked_worker_is_the_process_that_was_asked_for(server, tmp_path):
    done = worker(tmp_path, OWN="1", before="trap '' HUP;")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["argv"] == [str(tmp_path / "worker.py"), "--a=b", "c d"] and printed["name"] == "__main__"
    assert (printed["own"], printed["cwd"], printed["torch"]) == ("1", str(tmp_path), True)
    assert printed["ignored"] and printed["blocked"] == []


def test_it_ends_as_it_would(server, tmp_path):
    assert worker(tmp_path, CODE="75").returncode == 75
    assert worker(tmp_path, "raise ValueError('broken')").returncode == 1
    assert "ValueError: broken" in worker(tmp_path, "raise ValueError('broken')").stderr
    assert worker(tmp_path, "import os; os.kill(os.getpid(), 9)").returncode == -signal.SIGKILL
    assert "last words" in worker(tmp_path, "import atexit; atexit.register(print, 'last words')").stdout


def test_each_has_its_own_randomness(server, tmp_path):
    drawn = {
        worker(tmp_path, "import random, tempfile; print(random.random(), tempfile.mktemp())").stdout
        for _ in range(3)
    }
    assert len(drawn) == 3


def test_without_its_server_a_worker_starts_as_usual(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tmp_path / "of-a-server-that-ended"))
        done = worker(tmp_path)
    assert done.returncode == 0 and not json.loads(done.stdout)["torch"]


@pytest.fixture
def sandbox(tmp_path):
    box = Sandbox(tmp_path)
    yield box
    box.close()


RUN = (
    "train",
    "tiny/dpo",
    "run.max_steps=2",
    "data.train=[{path: toy:preference, max_rows: 64}]",
    "evaluation.at_start=false",
    "data.eval=null",
)


def test_a_run_is_the_same_with_forked_workers_and_in_one_process(sandbox, tmp_path):
    forked = sandbox.run(*RUN, "learners.workers=1", "--output", tmp_path / "forked")
    local = sandbox.run(*RUN, "--in-process", "--output", tmp_path / "here")
    assert (forked.code, local.code) == (0, 0), forked.err + local.err
    assert exported_hash(tmp_path / "forked") == exported_hash(tmp_path / "here")
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("forked", "here")
    ]
    curves = [{(line["step"], line["loss"], line["grad_norm"]) for line in run} for run in lines]
    assert curves[0] == curves[1]
    assert "starting Ray" in forked.out and "Ray" not in local.out


def test_a_server_that_is_killed_costs_no_run(sandbox, tmp_path):
    command = sandbox.start(*RUN, "learners.workers=2", "--output", tmp_path / "run")
    assert wait_until(lambda: "planning" in command.out.read_text(), 60, 0.02)
    children = subprocess.run(
        ["pgrep", "-P", str(command.process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    servers = [int(pid) for pid in children if b"orchestrator" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(servers) == 1
    os.kill(servers[0], signal.SIGKILL)
    assert command.finish(200).code == 0


ROLLED = ("rollouts.prompts=8", "rollouts.samples=4", "batch.effective=32")
ONLINE = ("run.max_steps=3", "evaluation.every=3", "learners.workers=1", "optimizer.warmup_steps=0", *ROLLED)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["grpo", "ppo", "online_dpo", "grpo_tool"])
def test_an_online_run_is_the_same_in_one_process(sandbox, tmp_path, recipe):
    (tmp_path / "brief.py").write_text(
        "def brief(completions, **_):\n    return [-float(len(str(text))) for text in completions]\n"
    )
    reward = f"rewards.functions=[{{name: brief, function: {tmp_path}/brief.py:brief}}]"
    stage = "grpo" if recipe == "grpo_tool" else recipe
    changes = (
        *ONLINE,
        "rollouts.workers=1",
        reward,
        *(["batch.effective=8"] if recipe == "online_dpo" else []),
    )
    mine = (f"{stage}:{change}" for change in changes)
    few = ["sft:run.max_steps=2", "sft:learners.workers=1", *mine]
    ray = sandbox.run("train", f"tiny/{recipe}", *few, "--output", tmp_path / "ray")
    local = sandbox.run("train", f"tiny/{recipe}", *few, "--in-process", "--output", tmp_path / "here")
    assert (ray.code, local.code) == (0, 0), ray.err + local.err
    assert (
        exported_hash(tmp_path / "ray" / stage)
        == exported_hash(tmp_path / "here" / stage)
        != exported_hash(tmp_path / "here" / "sft")
    )
