"""Real runs of the launchers that need no scheduler: Ray on one machine, on hosts by `ssh`, and as
docker/compose.yaml starts it."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.hosts import Hosts, hosts
from tests.running import FEW, REPOSITORY, carriers, steps, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OVERRIDES = (
    "run.max_steps=4",
    f"data.train={FEW % 'preference'}",
    "data.eval=null",
    "batch.effective=16",
    "learners.cpus_per_worker=0.5",
)
ARGUMENTS = ("tiny/dpo", *OVERRIDES, "tracking.wandb=off")
RAY = "--object-store-memory=83886080"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Hosts]:
    """Three hosts without processes."""
    with hosts(tmp_path / "hosts", 3, authenticated=False) as three:
        yield three


def ended(cluster: Hosts) -> bool:
    """Whether all processes of the hosts have ended."""
    return wait_until(lambda: not carriers(cluster.tag), 30.0)


def test_local_trains_and_leaves_nothing_behind(cluster: Hosts, tmp_path: Path) -> None:
    options = {"RAY_START_OPTIONS": f"--num-cpus=2 {RAY}"}
    before = set(Path("/tmp").glob("ray-??????"))
    done = cluster.inside(
        0,
        REPOSITORY / "launch" / "local.sh",
        *ARGUMENTS,
        "--output",
        tmp_path / "run",
        env=options,
        timeout=300.0,
    )
    assert done.code == 0, done.out + done.err
    assert steps(tmp_path / "run") == [1, 2, 3, 4] and "dashboard  http://127.0.0.1:8265" in done.out
    wrong = cluster.inside(
        0, REPOSITORY / "launch" / "local.sh", "tiny/dpo", "no.such=key", env=options, timeout=300.0
    )
    assert wrong.code == 78, wrong.out + wrong.err
    assert ended(cluster), carriers(cluster.tag)
    assert set(Path("/tmp").glob("ray-??????")) <= before


def test_hosts_by_ssh_come_up_run_a_job_and_go_down(cluster: Hosts, tmp_path: Path) -> None:
    """`ssh` is `ip netns exec`, with the home of its host."""
    ssh = tmp_path / "ssh"
    homes = cluster.root
    lines = "\n".join(f"{cluster.name(n)}) export HOME={cluster.home(n)} ;;" for n in range(cluster.count))
    # Ray picks the names of its sockets in a /tmp that these hosts share: the nodes start one after the
    # other, else two take the same name
    alone = (
        'if [[ "$*" == *--address=* ]]; then timeout 90 sh -c "until grep -q started '
        '.orchestrator-cluster/$host.log; do sleep 0.2; done"; fi'
    )
    enter = f'cd "$HOME"\nip netns exec "$host" sh -c "$*" || exit\n{alone}\n'
    ssh.write_text(f"#!/bin/bash\nhost=$1; shift\ncase $host in\n{lines}\nesac\n{enter}")
    ssh.chmod(0o755)
    names = [
        f"{cluster.name(n)} {cluster.address(n)} --num-cpus={1 if n else 0} {RAY}"
        for n in range(cluster.count)
    ]
    (tmp_path / "hosts.txt").write_text("# the head has no CPU for workers\n" + "\n".join(names))

    def launch(verb: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [
            str(REPOSITORY / "launch" / "ray_cluster.sh"),
            verb,
            str(tmp_path / "hosts.txt"),
            *map(str, arguments),
        ]
        environment = cluster.environment(
            0, {"SSH": str(ssh), "WORKDIR": str(REPOSITORY), "START_TIMEOUT_S": "240"}
        )
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
        )

    try:
        up = launch("up")
        assert up.returncode == 0 and "3 nodes: " in up.stdout, up.stdout + up.stderr
        tokens = [home / ".orchestrator-cluster" / "token" for home in sorted(homes.glob("home-*"))]
        assert (
            len({token.read_text() for token in tokens}) == 1
            and [token.stat().st_mode & 0o777 for token in tokens] == [0o600] * 3
        )
        assert not any(
            tokens[0].read_bytes() in Path(f"/proc/{pid}/cmdline").read_bytes()
            for pid in carriers(cluster.tag)
        )
        assert launch("up").returncode == 73  # and what is up stays up
        assert wait_until(
            lambda: launch("status").stdout.count("node_") == 3, 60.0
        )  # Ray's table of nodes is a few seconds old
        refused = cluster.inside(
            0, "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"{cluster.dashboard}/api/jobs/"
        )
        assert refused.out == "401"
        done = launch("submit", *ARGUMENTS, "--output", tmp_path / "run")
        assert done.returncode == 0 and steps(tmp_path / "run") == [1, 2, 3, 4], done.stdout + done.stderr
    finally:
        down = launch("down")
    assert down.returncode == 0, down.stdout + down.stderr
    assert ended(cluster), carriers(cluster.tag)


def test_what_compose_starts_is_a_cluster_that_runs_the_job(cluster: Hosts, tmp_path: Path) -> None:
    """Each container is a host; its command and its health check run as written in the file."""
    services = yaml.safe_load((REPOSITORY / "docker" / "compose.yaml").read_text())["services"]
    token = tmp_path / "ray_token"
    token.write_text("f" * 64)
    places = {
        "/run/secrets/ray_token": str(token),
        "/runs/": f"{tmp_path}/runs/",
        "head:": f"{cluster.address(0)}:",
    }

    def placed(text: str) -> str:
        for container, here in places.items():
            text = text.replace(container, here)
        return text

    def variables(service: str, host: int) -> dict[str, str]:
        asked = {key: placed(value) for key, value in services[service]["environment"].items()}
        return asked | {"HOME": str(cluster.home(host))}

    with ExitStack() as running:
        for host, service in enumerate(("head", "worker-1", "worker-2")):
            command = [placed(word) for word in services[service]["command"]]
            node = running.enter_context(cluster.started(host, *command, RAY, env=variables(service, host)))
            check = [placed(word) for word in services[service]["healthcheck"]["test"][1:]]
            healthy = wait_until(
                lambda host=host, check=check, service=service: (
                    cluster.inside(host, *check, env=variables(service, host)).code == 0
                ),
                90.0,
            )
            if not healthy:
                node.kill()
                pytest.fail(f"{service} is not healthy: {node.communicate()}")
        assert wait_until(
            lambda: cluster.inside(0, "ray", "status", env=variables("head", 0)).out.count("node_") == 3, 60.0
        )
        assert cluster.inside(1, "ray", "health-check", env=variables("worker-1", 1)).code == 0, (
            "the image's own check, on a worker"
        )
        submit = [placed(word) for word in services["submit"]["command"]]
        arguments = (
            "run.max_steps=4 data.eval=null batch.effective=16 tracking.wandb=off "
            "learners.cpus_per_worker=0.5"
        )
        done = cluster.inside(1, *submit, env=variables("submit", 1) | {"ARGUMENTS": arguments}, timeout=400)
        assert done.code == 0, done.out + done.err
        assert steps(tmp_path / "runs" / "tiny-dpo") == [1, 2, 3, 4]
        stranger = cluster.inside(
            2,
            *submit,
            env=variables("submit", 2) | {"RAY_AUTH_TOKEN": "0" * 64, "RAY_AUTH_TOKEN_PATH": "/dev/null"},
        )
        assert stranger.code != 0 and "token" in (stranger.out + stranger.err).lower()
