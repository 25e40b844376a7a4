"""Hosts for tests of a cluster: network namespaces on a bridge, each with its own home, a real Ray node and a
token.

    host 0 (head)   host 1   host 2       10.77.N.1, .2, .3
        └──────────── bridge ────┘        10.77.N.254: this process (a wandb stand-in, say)

The hosts share a file system, as on a cluster with NFS, except for Ray's own folder. Needs root and iproute2.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.running import REPOSITORY, TAG, Finished, carriers, wait_until

NOTICED_S = 30.0
"""Time within which a dead host must be noticed, with the settings below."""
HEALTH = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass(slots=True)
class Hosts:
    """The running hosts."""

    root: Path
    """Folder on the shared file system."""
    count: int
    token: str | None
    """Token of the cluster; None without authentication."""
    ray_folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="o")))
    """Ray's folder on every host. Its path is short, as sockets lie below it."""
    tag: str = field(default_factory=lambda: uuid.uuid4().hex)
    net: int = field(default_factory=lambda: secrets.randbelow(250) + 1)

    def name(self, host: int) -> str:
        return f"o{self.net}h{host}"

    def address(self, host: int) -> str:
        return f"10.77.{self.net}.{host + 1}"

    @property
    def outside(self) -> str:
        """Address at which the hosts reach servers of this process."""
        return f"10.77.{self.net}.254"

    @property
    def dashboard(self) -> str:
        """Address of the Jobs API, on the head's loopback."""
        return "http://127.0.0.1:8265"

    def home(self, host: int) -> Path:
        return self.root / f"home-{host}"

    def _disk(self, host: int) -> Path:
        """What the host sees as `ray_folder`. Nodes that share the folder would remove each other's files."""
        return self.home(host) / "ray"

    def environment(self, host: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Variables of a process on a host, without this process's settings of Ray, wandb and this
        program."""
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_", "ORCHESTRATOR_"))
        }
        own = {
            "HOME": str(self.home(host)),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_TMPDIR": str(self.ray_folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "RAY_AUTH_MODE": "disabled" if self.token is None else "token",
            **HEALTH,
        }
        return inherited | own | dict(extra or {}) | {TAG: self.tag}

    def inside(
        self,
        host: int,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path = REPOSITORY,
        timeout: float = 240.0,
    ) -> Finished:
        """Runs a command on a host to its end."""
        with self.started(host, *command, env=env, cwd=cwd) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
                pytest.fail(
                    f"{' '.join(map(str, command))}: no end after {timeout:.0f} s; its "
                    f"output:\n{out[-3000:]}\n{err[-3000:]}"
                )
        return Finished(process.returncode, out, err)

    @contextmanager
    def started(
        self, host: int, *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path = REPOSITORY
    ) -> Iterator["subprocess.Popen[str]"]:
        """A command that runs on a host while the block does."""
        # in the mount namespace of `ip netns exec`
        own_disk = f'mount --bind {self._disk(host)} {self.ray_folder} && exec "$@"'
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name(host), "sh", "-c", own_disk, "sh", *map(str, command)],
            cwd=cwd,
            env=self.environment(host, env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def start_ray(
        self, host: int, *options: str, env: Mapping[str, str] | None = None, before: Sequence[str] = ()
    ) -> None:
        """Runs `ray start` on a host: the head on host 0, a worker on any other.

        before: a command that runs it, such as unshare.
        """
        where = ["--head", "--port=6379"] if host == 0 else [f"--address={self.address(0)}:6379"]
        common = [
            f"--node-ip-address={self.address(host)}",
            f"--object-store-memory={80 * 2**20}",
            "--disable-usage-stats",
        ]
        own = [f"--temp-dir={self.ray_folder}", "--dashboard-host=127.0.0.1"] if host == 0 else []
        done = self.inside(
            host,
            *before,
            "ray",
            "start",
            *where,
            *common,
            *own,
            *(options or ("--num-cpus=2",)),
            env=env,
            timeout=120.0,
        )
        assert done.code == 0, done.out + done.err

    def start_cluster(self, *options: str, env: Mapping[str, str] | None = None) -> None:
        """Starts Ray on every host, until the Jobs API answers and all nodes have joined.

        env: variables of Ray's processes, and so of the head's jobs.
        """
        for host in range(self.count):
            self.start_ray(host, *options, env=env)
        asking = ("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"{self.dashboard}/api/version")
        assert wait_until(lambda: self.inside(0, *asking).out in ("200", "401"), 60.0), (
            "the dashboard does not answer"
        )
        seen = (
            sys.executable,
            "-c",
            f"import ray; ray.init('{self.address(0)}:6379'); print(sum(n['Alive'] for n in ray.nodes()))",
        )
        assert wait_until(lambda: self.inside(0, *seen).out.strip() == str(self.count), 60.0), (
            "not every host has joined"
        )

    def cut(self, host: int) -> None:
        """Takes the host off the network; its processes continue."""
        _ip("link", "set", f"{self.name(host)}v", "down")

    def reconnect(self, host: int) -> None:
        _ip("link", "set", f"{self.name(host)}v", "up")

    def up(self) -> None:
        """Makes the hosts, without Ray."""
        bridge = f"o{self.net}br"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self.outside}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in range(self.count):
            name = self.name(host)
            _ip("netns", "add", name)
            _ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"{name}v", "master", bridge, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            # by this route a program finds out its own address
            _ip("-n", name, "route", "add", "default", "via", self.outside)
            (self.home(host) / ".ray").mkdir(parents=True)
            self._disk(host).mkdir()
            if self.token is not None:
                file = self.home(host) / ".ray" / "auth_token"
                file.touch(0o600)
                file.write_text(self.token)

    def down(self) -> None:
        """Ends every process of the hosts, then removes the hosts."""

        def kill() -> bool:
            for pid in carriers(self.tag):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not carriers(self.tag)

        ended = wait_until(kill, 30.0)
        for host in range(self.count):  # unchecked: `up` may not have made all of them
            # else it stays for a while
            subprocess.run(["ip", "link", "del", f"{self.name(host)}v"], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", self.name(host)], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", f"o{self.net}br"], check=False, capture_output=True)
        shutil.rmtree(self.ray_folder, ignore_errors=True)
        assert ended, f"still running: {carriers(self.tag)}"


@contextmanager
def hosts(root: Path, count: int = 3, *, authenticated: bool = True) -> Iterator[Hosts]:
    """Hosts without Ray; skips the test if namespaces cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    running = Hosts(root, count, secrets.token_hex(16) if authenticated else None)
    try:
        running.up()
        yield running
    except _NoNamespaces as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    finally:
        running.down()


class _NoNamespaces(Exception):
    pass


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30.0, check=False)
    if done.returncode != 0:
        if "not permitted" in done.stderr:
            raise _NoNamespaces(done.stderr.strip())
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr}")
