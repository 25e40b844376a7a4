"""launch/slurm.sbatch on a real Slurm: this machine's munge, slurmctld and slurmd in separate namespaces.

The process namespace is needed because `ray symmetric-run` refuses a machine that has a Ray and ends with
`ray stop`, which ends every Ray it sees; the network namespace keeps the ports apart.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.cluster.submit.schedulers import Launch, artefact
from tests.running import FEW, REPOSITORY, steps, wait_until

MISSING = [
    program
    for program in ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "ip")
    if shutil.which(program) is None
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(MISSING), reason=f"no {', '.join(MISSING)} here (apt-get install slurm-wlm iproute2)"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and slurmd need root"),
]

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthInfo=socket={root}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=10
NodeName=node1 NodeAddr=127.0.0.1 NodeHostname={host} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

DAEMONS = """
set -e
ip link set lo up
ip link add eth0 type veth peer name eth1
ip addr add 10.99.0.1/24 dev eth0
ip link set eth0 up && ip link set eth1 up && ip route add default dev eth0
cd "$1"
head -c 1024 /dev/urandom >munge.key && chmod 400 munge.key
munged --force --socket=munge.socket --key-file=munge.key --log-file=munge.log \\
    --pid-file=munge.pid --seed-file=munge.seed --num-threads=2
slurmctld -D & slurmd -D &
wait
"""


@dataclass(frozen=True, slots=True)
class Slurm:
    """A cluster of one node."""

    root: Path
    inside: int
    """Id of the first process in its namespaces."""

    def __call__(self, *command: str | Path, check: bool = True, stdin: str = "") -> str:
        """Runs a command in the namespaces, and returns what it prints."""
        enter = [
            "nsenter",
            f"--target={self.inside}",
            "--net",
            "--pid",
            "--mount",
            "--wdns=" + str(self.root),
            *map(str, command),
        ]
        done = subprocess.run(
            enter, input=stdin, env=_environment(self.root), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str) -> int:
        """Submits a script; the id of the job."""
        return int(re.findall(r"\d+", self("sbatch", stdin=script))[0])

    def field(self, job: int, name: str) -> str:
        """A field of the job, e.g. JobState."""
        found = re.search(rf"\b{name}=(\S*)", self("scontrol", "show", "job", str(job), "--oneliner"))
        assert found is not None
        return found[1]

    def wait_for(self, job: int, *states: str, timeout: float = 240.0) -> str:
        """Waits for one of these states; if none comes the test fails with the job's log."""
        arrived = wait_until(lambda: self.field(job, "JobState") in states, timeout, pause_s=1.0)
        state = self.field(job, "JobState")
        assert arrived, (
            f"job {job} is {state} after {timeout:.0f} s, not {states}; its log:\n{self.log(job)[-3000:]}"
        )
        return state

    def log(self, job: int) -> str:
        """What the job has printed so far."""
        path = self.root / f"tiny-dpo-{job}.log"
        return path.read_text() if path.exists() else ""


def _environment(root: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "SBATCH_"))}
    own = {
        "SLURM_CONF": str(root / "slurm.conf"),
        "HOME": str(root / "home"),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    return inherited | own | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with _slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@contextmanager
def _slurm(root: Path) -> Iterator[Slurm]:
    root.chmod(0o755)
    for folder in ("state", "spool", "home"):
        (root / folder).mkdir()
    host = subprocess.run(["hostname", "-s"], capture_output=True, text=True, check=True).stdout.strip()
    (root / "slurm.conf").write_text(CONFIGURATION.format(root=root, host=host))
    with (root / "daemons.log").open("wb") as log:
        isolate = [
            "unshare",
            "--fork",
            "--pid",
            "--mount-proc",
            "--net",
            "--kill-child",
            "bash",
            "-c",
            DAEMONS,
            "daemons",
            str(root),
        ]
        outer = subprocess.Popen(
            isolate, env=_environment(root), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        assert wait_until(lambda: bool(children.read_text().split()), 10.0)
        cluster = Slurm(root, int(children.read_text().split()[0]))
        up = wait_until(
            lambda: "idle" in cluster("sinfo", "--noheader", "--format=%T", check=False), 60.0, pause_s=0.5
        )
        assert up, (root / "daemons.log").read_text()[-3000:]
        yield cluster
    finally:
        outer.send_signal(signal.SIGKILL)  # --kill-child: with it everything in the namespaces
        outer.wait()


def _script(slurm: Slurm, folder: str, max_steps: int) -> str:
    overrides = (
        f"run.max_steps={max_steps}",
        f"data.train={FEW % 'preference'}",
        "data.eval=null",
        "batch.effective=16",
    )
    small = (
        "learners.cpus_per_worker=0.5",
        "tracking.wandb=off",
        f"reference.cache_dir={slurm.root / 'reference'}",
    )
    return artefact(
        "slurm",
        Launch("tiny/dpo", (*overrides, *small), "tiny-dpo", 1, 0, 2, str(slurm.root / "runs" / folder), ""),
    )


def test_a_job_trains_to_its_end(slurm: Slurm) -> None:
    job = slurm.submit(_script(slurm, "plain", 4))
    slurm.wait_for(job, "COMPLETED")
    assert slurm.field(job, "ExitCode") == "0:0" and slurm.field(job, "Restarts") == "0"
    assert "slurm: exit code 0 after 0 requeues" in slurm.log(job)
    folder = slurm.root / "runs" / "plain"
    assert steps(folder) == [1, 2, 3, 4] and (folder / "export" / "model.safetensors").is_file()
    assert not list(folder.parent.glob(".slurm-*")), "the token was left behind"
    assert not list(Path("/tmp").glob(f"ray-{job}")), "Ray's files were left behind"


def test_usr1_writes_a_checkpoint_and_the_requeued_job_continues(slurm: Slurm) -> None:
    length = 60
    job = slurm.submit(_script(slurm, "requeued", length))
    assert wait_until(lambda: f"step 3/{length}" in slurm.log(job), 240.0), slurm.log(job)[-3000:]
    slurm("scancel", "--signal=USR1", "--batch", str(job))
    assert wait_until(lambda: slurm.field(job, "Restarts") == "1", 120.0), slurm.log(job)[-3000:]
    first = slurm.log(job)
    assert "stopped by request after step" in first and "slurm: exit code 75 after 0 requeues" in first
    done = steps(slurm.root / "runs" / "requeued")[-1]
    assert 3 <= done < length
    slurm.wait_for(job, "COMPLETED")
    again = slurm.log(job).removeprefix(first)
    assert f"step {done + 1}/{length}" in again and f"step {done}/{length}" not in again
    assert "slurm: exit code 0 after 1 requeues" in again
    assert steps(slurm.root / "runs" / "requeued") == list(range(1, length + 1))


def test_a_cancelled_job_stays_cancelled(slurm: Slurm) -> None:
    job = slurm.submit(_script(slurm, "cancelled", 500))
    assert wait_until(lambda: "step 2/500" in slurm.log(job), 240.0), slurm.log(job)[-3000:]
    slurm("scancel", str(job))
    slurm.wait_for(job, "CANCELLED")
    assert wait_until(lambda: slurm("sinfo", "--noheader", "--format=%T").strip() == "idle", 60.0)
    assert slurm.field(job, "JobState") == "CANCELLED" and slurm.field(job, "Restarts") == "0"


def test_a_recipe_that_cannot_be_run_fails_and_is_not_queued_again(slurm: Slurm) -> None:
    wrong = Launch(
        "tiny/dpo", ("batch.effectve=16",), "tiny-dpo", 1, 0, 2, str(slurm.root / "runs" / "wrong"), ""
    )
    job = slurm.submit(artefact("slurm", wrong))
    slurm.wait_for(job, "FAILED")
    assert slurm.field(job, "ExitCode") == "78:0" and slurm.field(job, "Restarts") == "0"
    assert "did you mean" in slurm.log(job) or "effectve" in slurm.log(job)
