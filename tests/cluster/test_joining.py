"""Which Ray a run uses: only one that it started or that RAY_ADDRESS names, whatever the machine is like."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.cluster import joining
from orchestrator.core.errors import ConfigError, DashboardUnreachable, Exit, OrchestratorError, OutputError
from tests.running import REPOSITORY, Sandbox, wait_until

ALONE = """
import json, os, signal, subprocess, sys, time
from orchestrator.cluster.joining import connect
before = signal.getsignal(signal.SIGTERM)
connect(100_000_000)
import psutil, ray
from orchestrator.cluster.actors import ActorResources, actor_class, outlive_sigterm
class Actor:
    def __init__(self): outlive_sigterm()
    def where(self): return os.getcwd()
    def child(self):
        sleeper = subprocess.Popen(["sleep", "60"])
        sleeper.terminate()
        return sleeper.wait(10)
actor = actor_class(Actor, ActorResources(1, 0)).remote()
folder = ray.get(actor.where.remote(), timeout=60)
signal.signal(signal.SIGTERM, lambda *_: None)
for process in psutil.Process().children(recursive=True):
    process.send_signal(signal.SIGTERM)
time.sleep(1.0)
again = actor_class(Actor, ActorResources(1, 0)).remote()
found = {
    "gcs": ray.get_runtime_context().gcs_address, "cpus": ray.cluster_resources()["CPU"], "folder": folder,
    "lives": ray.get([actor.where.remote(), again.where.remote()], timeout=60) == [folder, folder],
    "child": ray.get(actor.child.remote(), timeout=60), "handler": before == signal.SIG_DFL,
}
started = time.monotonic()
ray.shutdown()
print(json.dumps({**found, "shutdown": time.monotonic() - started}))
"""


def refusal(monkeypatch: pytest.MonkeyPatch, address: str) -> OrchestratorError:
    monkeypatch.setenv("RAY_ADDRESS", address)
    started = time.monotonic()
    with pytest.raises(OrchestratorError) as caught:
        joining.connect()
    assert time.monotonic() - started < 3 * joining.HEAD_ANSWER_S
    return caught.value


@contextmanager
def server_with(answer: bytes | None) -> Iterator[str]:
    """A server that answers every connection with `answer`, or not at all; its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connections = []
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connections.append(connection)
                if answer is not None:
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("address", "fix"),
    [
        ("http://127.0.0.1:8265", "unset it and use `orchestrator submit --address http://HOST:8265`"),
        ("ray://127.0.0.1:10001", "set RAY_ADDRESS=HOST:6379"),
        ("head", "e.g. 10.0.0.1:6379"),
        ("head:port", "e.g. 10.0.0.1:6379"),
    ],
)
def test_a_value_that_is_not_a_clusters_address_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str, fix: str
) -> None:
    error = refusal(monkeypatch, address)
    assert isinstance(error, ConfigError) and error.exit_code == Exit.CONFIG
    assert f"RAY_ADDRESS={address}" in error.what and fix in error.fix


def test_a_cluster_that_is_gone_is_reported_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for named in (address, "no-such-host.invalid:6379"):
        error = refusal(monkeypatch, named)
        assert isinstance(error, DashboardUnreachable) and error.exit_code == Exit.UNAVAILABLE
        assert (
            error.what == f"no Ray answers at RAY_ADDRESS={named}"
            and error.why
            and "unset RAY_ADDRESS" in error.fix
        )


@pytest.mark.parametrize(
    ("answer", "message"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not the head of a Ray cluster"), (None, "no Ray answers")],
)
def test_another_server_at_that_address_is_reported_in_seconds(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None, message: str
) -> None:
    monkeypatch.setattr(joining, "HEAD_ANSWER_S", 1.0)
    with server_with(answer) as address:
        error = refusal(monkeypatch, address)
    assert isinstance(error, DashboardUnreachable) and message in error.what


def test_a_long_temporary_folder_gives_ray_a_short_one_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert joining._short_folder() == "/tmp/ray"
    long = tmp_path / ("x" * 76)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    own = joining._short_folder()
    assert own == f"/tmp/ray-{os.getuid()}" and stat.S_IMODE(Path(own).stat().st_mode) == 0o700
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(OutputError, match="is too long: ") as caught:
        joining._short_folder()
    assert caught.value.exit_code == Exit.CANNOT_CREATE


def alone(
    sandbox: Sandbox, *, wrap: tuple[str, ...] = (), cwd: Path = REPOSITORY, **variables: str
) -> dict[str, object]:
    """The facts that a run on its own Ray prints."""
    environment = {**sandbox.environment(), "PYTHONPATH": str(REPOSITORY), **variables}
    done = subprocess.run(
        [*wrap, sys.executable, "-c", ALONE],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_ray_that_runs_or_ran_on_the_machine_is_not_joined(tmp_path: Path) -> None:
    """Beside a head, and beside the files of one that was killed; under `uv run`, with a HOME that cannot be
    written, and with SIGTERM to all processes."""
    sandbox = Sandbox(tmp_path)
    project = tmp_path / "project" / "below"
    project.mkdir(parents=True)
    (project / "run").write_text(
        "import subprocess, sys\nsys.exit(subprocess.run(sys.argv[1:]).returncode)\n"
    )
    (project.parent / "pyproject.toml").write_text("[project]\nname = 'p'\nversion = '1'\n")
    # stays as the parent, as uv does: its command line is `uv run …`
    as_uv = ("bash", "-c", f'exec -a uv {sys.executable} "$@"', "", "run")
    try:
        head = [
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--head",
            "--port=0",
            "--num-cpus=77",
            "--include-dashboard=false",
        ]
        started = subprocess.run(
            [*head, "--temp-dir", str(sandbox.ray_folder)],
            env=sandbox.environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert started.returncode == 0, started.stderr
        left = (sandbox.ray_folder / "ray_current_cluster").read_text()
        beside = alone(sandbox)
        assert beside["cpus"] != 77.0 and beside["gcs"] != left
        assert beside["lives"] and beside["child"] == -signal.SIGTERM and beside["handler"]
        assert float(str(beside["shutdown"])) < 4.0
        for pid in sandbox.living():
            os.kill(pid, signal.SIGKILL)
        assert (
            wait_until(lambda: not sandbox.living(), 30)
            and (sandbox.ray_folder / "ray_current_cluster").is_file()
        )
        after = alone(sandbox, wrap=as_uv, cwd=project, HOME="/proc/nohome", RAY_AUTH_MODE="token")
        assert after["cpus"] != 77.0 and after["gcs"] != left and after["lives"]
        assert after["folder"] == str(project), "uv's hook would have made a copy of the project"
    finally:
        sandbox.close()
