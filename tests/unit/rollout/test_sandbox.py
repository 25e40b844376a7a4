"""The process of a reward function: what it can see and use, and that it cannot outlive or delay its
supervisor."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.core.errors import ConfigError
from orchestrator.recipe.schema import Rewards
from orchestrator.rollout.rewards.component import Outcome, RewardCall, RewardFailure
from orchestrator.rollout.rewards.sandbox import Confinement, Sandbox
from tests.running import wait_until
from tests.unit.rollout.reward_cases import batch, function

SOURCE = """
import os, subprocess, sys, time

def length(completions): return [len(c) for c in completions]
async def later(completions): return [len(c) / 3 for c in completions]
def raises(completions): raise KeyError("no such thing")
def exits(completions): sys.exit(3)
def ends(completions): os._exit(9)
def aborts(completions): os.abort()
def sleeps(completions): time.sleep(600)
def spins(completions):
    while True: pass
def hoards(completions): return [len(bytearray(20 << 30)) for c in completions]
def nan(completions): return [float("nan") if c == "bad" else 1.0 for c in completions]
def few(completions): return [1.0]
def nothing(completions): return None
def reads(completions): return [len(sys.stdin.read()) for c in completions]
def starts_one(completions):
    child = subprocess.Popen(["sleep", "600"])
    print("child", child.pid)
    time.sleep(600)
def leaves_one(completions):
    if os.fork() == 0:
        time.sleep(600)
    os._exit(9)
def shows(completions):
    print("environ", dict(os.environ))
    print("proc", open("/proc/self/environ", "rb").read())
    print("started", subprocess.run(["env"], capture_output=True, text=True).stdout)
    return [1.0 for c in completions]
"""
SECRET = "geheim-7d1f"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def confinement(log: Path | None = None, **options) -> Confinement:
    return Confinement.of(Rewards(**options), os.environ, log)


def ask(sandbox: Sandbox, *texts: str, timeout_s: float = 10.0) -> list[Outcome]:
    return sandbox.score(RewardCall.of(batch(texts)), timeout_s)


@pytest.fixture
def made(file: Path, tmp_path: Path) -> Iterator:
    """Makes started sandboxes of functions of `file`, logging to log.txt."""
    sandboxes = []

    def make(name: str) -> Sandbox:
        sandboxes.append(Sandbox(function("f", f"{file}:{name}"), confinement(tmp_path / "log.txt")))
        sandboxes[-1].start()
        return sandboxes[-1]

    yield make
    for sandbox in sandboxes:
        sandbox.close()


def test_rewards_come_back_exactly(made) -> None:
    assert ask(made("length"), "", "a", "äöü") == [0.0, 1.0, 3.0]
    assert ask(made("later"), "a", "bb") == [1 / 3, 2 / 3]
    assert ask(made("reads"), "a") == [0.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "KeyError at mine.py:6: 'no such thing'"),
        ("exits", "sys.exit(3)"),
        ("ends", "exit code 9"),
        ("aborts", "killed by signal SIGABRT"),
        ("hoards", "MemoryError at mine.py:13: the limit is rewards.memory_limit_gb"),
        ("few", "1 rewards for 2"),
        ("nothing", "None, not a list"),
        ("leaves_one", "exit code 9"),
    ],
)
def test_a_function_that_fails_is_an_error_and_can_be_called_again(made, name: str, words: str) -> None:
    sandbox = made(name)
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(RewardFailure) as caught:
            ask(sandbox, "a", "b")
        assert words in caught.value.reason and "reward f" in caught.value.reason
        assert time.monotonic() - started < 8


def test_a_nan_is_a_failure_of_its_sample_alone(made) -> None:
    right, wrong = ask(made("nan"), "good", "bad")
    assert right == 1.0 and isinstance(wrong, RewardFailure) and "q.jsonl:1, sample 1 is nan" in wrong.reason


@pytest.mark.parametrize("name", ["sleeps", "spins"])
def test_a_function_that_is_late_is_killed_in_time(made, name: str) -> None:
    sandbox = made(name)
    pid = sandbox.process.pid
    started = time.monotonic()
    with pytest.raises(RewardFailure, match=r"did not answer within 0\.3 s"):
        ask(sandbox, "a", timeout_s=0.3)
    assert time.monotonic() - started < 3 and not alive(pid)


def test_a_process_that_does_not_read_cannot_hold_up_its_supervisor(made) -> None:
    sandbox = made("length")
    os.kill(sandbox.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(RewardFailure, match="did not answer"):
        ask(sandbox, "x" * 8_000_000, timeout_s=0.5)
    assert time.monotonic() - started < 4
    assert ask(sandbox, "x" * 8_000_000) == [8_000_000.0]


def test_no_secret_of_the_driver_can_be_seen(file, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MY_API_KEY", SECRET)
    monkeypatch.setenv("ALLOWED", "to-be-seen")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    log = tmp_path / "log.txt"
    with Sandbox(
        function("f", f"{file}:shows"), confinement(log, environment=["ALLOWED", "NOT_SET"])
    ) as sandbox:
        assert ask(sandbox, "a") == [1.0]
        environ = Path(f"/proc/{sandbox.process.pid}/environ").read_text()
    shown = log.read_text()
    assert "proc" in shown and "started" in shown and SECRET not in shown + environ
    assert shown.count("to-be-seen") == 3
    names = {entry.partition("=")[0] for entry in environ.split("\0") if entry}
    no_gpu = {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"}
    assert names <= {
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "TZ",
        "PYTHONPATH",
        "OMP_NUM_THREADS",
        "ALLOWED",
        *no_gpu,
    }


def test_what_a_function_starts_ends_with_it(made, tmp_path: Path) -> None:
    with pytest.raises(RewardFailure, match="did not answer"):
        ask(made("starts_one"), "a", timeout_s=1.0)
    child = int((tmp_path / "log.txt").read_text().split()[1])
    assert wait_until(lambda: not alive(child), 5)


def test_the_process_ends_with_its_supervisor(file: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(file), str(log)], cwd=Path(__file__).parents[3]
    )
    assert wait_until(lambda: log.exists() and "child" in log.read_text(), 20)
    child = int(log.read_text().split()[1])
    process = parent(child)
    assert alive(process)
    supervisor.kill()
    supervisor.wait()
    assert wait_until(lambda: not alive(process) and not alive(child), 5)


SUPERVISOR = """
import os, sys
from pathlib import Path
from tests.unit.rollout.reward_cases import batch, function, rewards
from orchestrator.rollout.rewards.component import RewardCall
from orchestrator.rollout.rewards.sandbox import Confinement, Sandbox
confinement = Confinement.of(rewards(), os.environ, Path(sys.argv[2]))
with Sandbox(function("f", sys.argv[1] + ":starts_one"), confinement) as sandbox:
    sandbox.score(RewardCall.of(batch(["a"])), 600)
"""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_package\ndef f(completions): ...", "ModuleNotFoundError at broken.py:1"),
        ("import sys\nsys.exit(2)", "sys.exit(2)"),
        ("import os\nos._exit(2)", "exit code 2"),
        ("hoard = bytearray(20 << 30)", "MemoryError"),
        ("", "has no attribute 'f'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_a_config_error(tmp_path: Path, source: str, words: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    sandbox = Sandbox(function("f", f"{path}:f"), confinement(tmp_path / "log.txt"))
    with pytest.raises(ConfigError) as caught:
        sandbox.start()
    assert words in str(caught.value) and "reward f" in str(caught.value)
    assert sandbox.process is None


def test_a_column_that_is_not_json_is_named(made) -> None:
    call = RewardCall(["p"], ["c"], [[1]], ["s"], {"when": [object()]})
    with pytest.raises(RewardFailure, match="the column when"):
        made("length").score(call, 5.0)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0] != "Z"
    except OSError:
        return False


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
