"""Each planted fault gives exactly its finding, with its fix; a healthy cluster gives no warning or error."""

from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from orchestrator.cluster.doctor.checks import check_cluster
from orchestrator.cluster.doctor.facts import (
    AllReduce,
    BlockedPort,
    ClusterFacts,
    ClusterRequirements,
    Gpu,
    Kernel,
    Limits,
    MissingModel,
    ModelSource,
    NodeCapacity,
    NodeFacts,
    PairRate,
    SilentNode,
    Storage,
    UnmetRequirement,
)
from orchestrator.cluster.doctor.findings import Finding, render
from orchestrator.core.errors import (
    ConfigError,
    Exit,
    MissingInput,
    NotEnoughResources,
    OrchestratorError,
    OutputError,
)
from orchestrator.core.resources import WorkerGroup
from orchestrator.run.preflight import require

GB = 1_000_000_000
H100 = Gpu("NVIDIA H100", 80 * GB, "580.65.06")


def node(name: str, address: str) -> NodeFacts:
    return NodeFacts(
        name=name,
        address=address,
        versions={"python": "3.11.7", "torch": "2.13.0", "trl": "1.16.0"},
        devices=(H100, H100),
        ram=256 * GB,
        shm_total=128 * GB,
        shm_free=100 * GB,
        limits=Limits(65536, None, None),
        rdma=True,
        interface="eth0",
        ports=(32768, 60999),
        storage=Storage("/shared/runs", None, 100 * GB),
        cuda="13.0",
        kernels=(Kernel("GPU 0", None), Kernel("GPU 1", None)),
    )


def rates(*gigabytes: float) -> tuple[PairRate, ...]:
    """Rates between a and b, a and c, b and c."""
    return tuple(
        PairRate(one, other, rate * GB)
        for (one, other), rate in zip(("ab", "ac", "bc"), gigabytes, strict=True)
    )


A, B, C = node("a", "10.0.0.1"), node("b", "10.0.0.2"), node("c", "10.0.0.3")
HEALTHY = ClusterFacts(
    nodes=(A, B, C),
    capacities=tuple(NodeCapacity(n, 16, 2, 30 * GB) for n in "abc"),
    auth=True,
    all_reduce=AllReduce("nccl", ("a", "b", "c"), 256_000_000, 0.02, rates(9, 8, 10)),
)
NEED = ClusterRequirements(
    (WorkerGroup("learners", 6, 1, 1),),
    checkpoint_bytes=10 * GB,
    keep=2,
    wandb="online",
    models=(ModelSource("org/model", "abc", True),),
)


def changed(name: str, **changes: object) -> ClusterFacts:
    """The healthy cluster with one node that is different."""
    return replace(
        HEALTHY, nodes=tuple(replace(n, **changes) if n.name == name else n for n in HEALTHY.nodes)
    )


def asking(*groups: WorkerGroup) -> ClusterRequirements:
    return replace(NEED, groups=groups)


def problems(facts: ClusterFacts, need: ClusterRequirements = NEED) -> list[Finding]:
    return [f for f in check_cluster(facts, need) if f.level != "ok"]


def test_a_healthy_cluster_passes_every_check_and_reports_what_was_measured() -> None:
    findings = check_cluster(HEALTHY, NEED)
    assert {f.level for f in findings} == {"ok"}
    shown = {f.check: f.what for f in findings}
    assert (
        " ".join(shown)
        == "nodes versions resources driver kernels storage disk shm limits network all-reduce model wandb "
        "auth"
    )
    cpus, gpus = shown["resources"].split("; ")
    assert cpus == "6 learners x 1 = 6 CPUs, the cluster has 3 nodes x 16 = 48 CPUs"
    assert gpus == "6 learners x 1 = 6 GPUs, the cluster has 3 nodes x 2 = 6 GPUs"
    assert (
        shown["disk"]
        == "3 checkpoints x 10.00 GB = 30.00 GB (checkpoint.keep=2 and one being written), 100.00 GB free"
    )
    assert shown["driver"] == "driver 580.65.06, torch for CUDA 13.0"
    assert shown["kernels"] == "a product on each of 6 GPUs is the same as on the CPU"
    assert shown["all-reduce"] == "nccl, 256.0 MB in 20.0 ms: 17.07 GB/s"  # 2 * 2/3 * 256 MB / 20 ms
    require(findings)


FAULTS: dict[str, tuple[ClusterFacts, ClusterRequirements, Finding]] = {
    "a silent node": (
        replace(HEALTHY, silent=(SilentNode("d", "no answer to `now` within 90 s"),)),
        NEED,
        Finding(
            "nodes",
            "error",
            "d",
            "no answer to `now` within 90 s",
            "look at `ray status` and at the logs on that host",
        ),
    ),
    "version skew": (
        changed("b", versions=dict(A.versions, trl="0.0.1")),
        NEED,
        Finding(
            "versions",
            "error",
            "b",
            "trl is 0.0.1 here and 1.16.0 on a",
            "pip install trl==1.16.0 for the Python that runs Ray there",
        ),
    ),
    "another Python": (
        changed("a", versions=dict(A.versions, python="3.12.1")),
        NEED,
        Finding(
            "versions", "error", "a", "python is 3.12.1 here and 3.11.7 on b", "install Python 3.11.7 for"
        ),
    ),
    "a library that is not there": (
        changed("c", versions={"python": "3.11.7", "torch": "2.13.0"}),
        NEED,
        Finding("versions", "error", "c", "trl is missing here and 1.16.0 on a", "pip install trl==1.16.0"),
    ),
    "a library that is too old everywhere": (
        replace(HEALTHY, unmet=(UnmetRequirement("ray 2.50.0", "ray>=2.60"),)),
        NEED,
        Finding(
            "versions",
            "error",
            "a",
            "ray 2.50.0 is installed, ray>=2.60 is needed",
            'pip install "ray>=2.60"',
        ),
    ),
    "too few GPUs": (
        HEALTHY,
        asking(WorkerGroup("learners", 8, 1, 1)),
        Finding(
            "resources",
            "error",
            "all 3 nodes",
            "8 learners x 1 = 8 GPUs, the cluster has 3 nodes x 2 = 6 GPUs",
            "set learners.workers=6; or",
        ),
    ),
    "too few GPUs for two groups": (
        HEALTHY,
        asking(WorkerGroup("learners", 4, 1, 1), WorkerGroup("rollouts", 3, 1, 1)),
        Finding(
            "resources",
            "error",
            "all 3 nodes",
            "4 learners x 1 + 3 rollouts x 1 = 7 GPUs, the cluster has 3 nodes x 2 = 6 GPUs",
            "set learners.workers=3; or",
        ),
    ),
    "no GPU at all": (
        replace(
            HEALTHY,
            capacities=tuple(NodeCapacity(n, 16, 0) for n in "abc"),
            nodes=tuple(replace(n, devices=()) for n in HEALTHY.nodes),
        ),
        NEED,
        Finding(
            "resources",
            "error",
            "all 3 nodes",
            "6 learners x 1 = 6 GPUs, the cluster has no GPUs",
            "set learners.gpus_per_worker=0 to train on CPUs; or add nodes (ray start --address=HEAD:6379 "
            "--num-gpus=N)",
        ),
    ),
    "GPUs that Ray does not count": (
        replace(
            HEALTHY, capacities=(NodeCapacity("a", 16, 2), NodeCapacity("b", 16, 0), NodeCapacity("c", 16, 2))
        ),
        NEED,
        Finding(
            "resources",
            "error",
            "all 3 nodes",
            "6 learners x 1 = 6 GPUs, the cluster has 3 nodes with 2 + 0 + 2 = 4 GPUs",
            "set learners.workers=4; or on b nvidia-smi sees 2 GPUs and Ray counts 0: ray stop, then ray "
            "start with --num-gpus=2",
        ),
    ),
    "too few CPUs": (
        HEALTHY,
        asking(WorkerGroup("learners", 6, 10, 0)),
        Finding(
            "resources",
            "error",
            "all 3 nodes",
            "6 learners x 10 = 60 CPUs, the cluster has 3 nodes x 16 = 48 CPUs",
            "set learners.workers=4",
        ),
    ),
    "enough in sum, but a worker needs one node": (
        HEALTHY,
        asking(WorkerGroup("learners", 4, 10, 0)),
        Finding(
            "resources",
            "error",
            "all 3 nodes",
            "each of 4 learners needs 10 CPUs on one node; there is room for 1 on a + 1 on b + 1 on c = 3",
            "set learners.workers=3",
        ),
    ),
    "a worker larger than any node": (
        HEALTHY,
        asking(WorkerGroup("learners", 1, 1, 4)),
        Finding(
            "resources",
            "error",
            "all 3 nodes",
            "each of 1 learners needs 1 CPUs and 4 GPUs on one node; there is room for 0 on a + 0 on b + 0 "
            "on c = 0",
            "set learners.cpus_per_worker (or gpus_per_worker) to what one node has",
        ),
    ),
    "other GPUs on one node": (
        changed("c", devices=(Gpu("NVIDIA A100", 40 * GB, "580.65.06"),) * 2),
        NEED,
        Finding(
            "resources",
            "warning",
            "all 3 nodes",
            "GPUs differ: NVIDIA H100 80.00 GB on b, NVIDIA A100 40.00 GB on c",
            "take nodes of one kind; else set batch.memory_limit_gb",
        ),
    ),
    "a driver that is too old": (
        changed("b", devices=(replace(H100, driver="550.54.15"),) * 2),
        NEED,
        Finding(
            "driver",
            "error",
            "b",
            "driver 550.54.15 is too old for torch's CUDA 13.0, which needs 580 or newer",
            "install driver 580 or",
        ),
    ),
    "a torch without CUDA": (
        changed("c", cuda=""),
        NEED,
        Finding(
            "driver",
            "error",
            "c",
            "there are 2 GPUs, and torch there is built without CUDA",
            "pip install torch --index-url",
        ),
    ),
    "a GPU that computes wrongly": (
        changed(
            "b", kernels=(Kernel("GPU 0", None), Kernel("GPU 1", "3 of 65536 numbers of a product are wrong"))
        ),
        NEED,
        Finding(
            "kernels",
            "error",
            "b",
            "GPU 1: 3 of 65536 numbers of a product are wrong",
            "look at nvidia-smi -q",
        ),
    ),
    "read-only storage": (
        changed("b", storage=Storage("/shared/runs", "Read-only file system", 0)),
        NEED,
        Finding(
            "storage",
            "error",
            "b",
            "/shared/runs cannot be written: Read-only file system",
            "make it writable for the user that runs Ray",
        ),
    ),
    "storage that is not shared": (
        changed("b", storage=Storage("/shared/runs", None, 100 * GB, unseen=("a", "c"))),
        NEED,
        Finding(
            "storage",
            "error",
            "b",
            "/shared/runs is not the same folder here: what a, c wrote is not seen",
            "mount the same shared folder (NFS, Lustre, a PVC) there on every node, or choose another "
            "--output",
        ),
    ),
    "a full disk": (
        changed("c", storage=Storage("/shared/runs", None, 5 * GB, held=20 * GB)),
        NEED,
        Finding(
            "disk",
            "error",
            "/shared/runs",
            "3 checkpoints x 10.00 GB = 30.00 GB (checkpoint.keep=2 and one being written), 20.00 GB there "
            "already, 5.00 GB free",
            "free 5.00 GB there, set checkpoint.keep=1, or choose another --output",
        ),
    ),
    "Docker's /dev/shm": (
        changed("a", shm_total=64_000_000, shm_free=64_000_000),
        NEED,
        Finding(
            "shm",
            "warning",
            "a",
            "/dev/shm has 64.0 MB, Ray's object store 30.00 GB: it lies on disk instead",
            "docker run --shm-size=16g",
        ),
    ),
    "a full /dev/shm": (
        changed("a", shm_free=500_000_000),
        NEED,
        Finding(
            "shm",
            "warning",
            "a",
            "/dev/shm has 500.0 MB free; NCCL and Ray's object store need 1.00 GB or more",
            "docker run --shm-size=16g",
        ),
    ),
    "an object store that does not hold the weights": (
        HEALTHY,
        replace(NEED, object_store=48 * GB),
        Finding(
            "shm",
            "warning",
            "a, b, c",
            "Ray's object store has 30.00 GB, published weights take 48.00 GB: they go through the disk",
            "ray start --object-store-memory=48000000000, or rollouts.transport=broadcast",
        ),
    ),
    "few open files": (
        changed("b", limits=Limits(1024, None, None)),
        NEED,
        Finding(
            "limits",
            "warning",
            "b",
            "at most 1024 open files per process; a cluster needs 8192 or more",
            "ulimit -n 65536 before ray start",
        ),
    ),
    "little locked memory beside InfiniBand": (
        changed("b", limits=Limits(65536, None, 8_388_608)),
        NEED,
        Finding(
            "limits",
            "warning",
            "b",
            "at most 8.4 MB of locked memory; InfiniBand registers its buffers in it",
            "ulimit -l unlimited",
        ),
    ),
    "a wrong clock": (
        changed("c", clock_offset_s=-31.0),
        NEED,
        Finding("clock", "warning", "c", "its clock is -31.0 s off the driver's", "timedatectl set-ntp true"),
    ),
    "a blocked port": (
        changed("a", unreachable=(BlockedPort("b", "10.0.0.2", 41234, "no answer within 3 s"),)),
        NEED,
        Finding(
            "network",
            "error",
            "a -> b",
            "a cannot reach b at 10.0.0.2 port 41234: no answer within 3 s",
            "let TCP ports 32768-60999 in on b, from which the master port, gloo and NCCL take theirs: "
            "iptables -I INPUT -p tcp -s 10.0.0.1 --dport 32768:60999 -j ACCEPT",
        ),
    ),
    "an all-reduce that hangs": (
        replace(
            HEALTHY,
            all_reduce=AllReduce("gloo", ("a", "b"), 16_000_000, error="b: no answer to `join` within 70 s"),
        ),
        NEED,
        Finding(
            "all-reduce",
            "error",
            "a, b",
            "gloo: b: no answer to `join` within 70 s",
            "on a: export GLOO_SOCKET_IFNAME=eth0 before ray start; on b: export GLOO_SOCKET_IFNAME=eth0 "
            "before ray start",
        ),
    ),
    "an all-reduce that was not tried": (
        replace(HEALTHY, all_reduce=None, skipped="some nodes cannot reach others"),
        NEED,
        Finding(
            "all-reduce",
            "warning",
            "all 3 nodes",
            "not measured: some nodes cannot reach others",
            "fix the errors above first",
        ),
    ),
    "a slow link": (
        replace(HEALTHY, all_reduce=AllReduce("gloo", ("a", "b", "c"), 16_000_000, 0.02, rates(1, 1, 0.125))),
        NEED,
        Finding(
            "all-reduce",
            "warning",
            "b - c",
            "0.12 GB/s between them, 1.00 GB/s between most",
            "look at the link of the two (ethtool",
        ),
    ),
    "a model that one node cannot get": (
        changed(
            "c",
            absent=(
                MissingModel(
                    "org/model", "not in this node's cache, and huggingface.co does not answer: timed out"
                ),
            ),
        ),
        NEED,
        Finding(
            "model",
            "error",
            "c",
            "org/model: not in this node's cache, and huggingface.co does not answer: timed out",
            "hf download org/model there, or set HF_HOME to a shared folder",
        ),
    ),
    "a model folder that one node does not have": (
        changed("c", absent=(MissingModel("/models/x", "no such folder here"),)),
        replace(NEED, models=(ModelSource("/models/x", None, False),)),
        Finding(
            "model",
            "error",
            "c",
            "/models/x: no such folder here",
            "put the folder on storage that every node mounts",
        ),
    ),
    "wandb out of reach": (
        replace(HEALTHY, wandb="api.wandb.ai does not answer: timed out"),
        NEED,
        Finding(
            "wandb",
            "warning",
            "a",
            "api.wandb.ai does not answer: timed out; the run would be recorded offline",
            "wandb login (or",
        ),
    ),
    "no token": (
        replace(HEALTHY, auth=False),
        NEED,
        Finding(
            "auth",
            "warning",
            "all 3 nodes",
            "Ray asks for no token: whoever reaches its ports runs code as you",
            "ray get-auth-token --generate on the head; copy ~/.ray/auth_token (mode 600) to every node; "
            "export RAY_AUTH_MODE=token;",
        ),
    ),
    "no token on a public address": (
        replace(changed("a", address="8.8.8.8"), auth=False),
        NEED,
        Finding(
            "auth",
            "error",
            "all 3 nodes",
            "Ray asks for no token: whoever reaches its ports runs code as you",
            "ray get-auth-token --generate",
        ),
    ),
    "a token that may or may not be asked for": (
        replace(HEALTHY, auth=None),
        NEED,
        Finding(
            "auth",
            "warning",
            "all 3 nodes",
            "it is unknown whether Ray asks for a token",
            "ray get-auth-token --generate",
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_gives_its_finding_and_no_other(fault: str) -> None:
    facts, need, expected = FAULTS[fault]
    (finding,) = problems(facts, need)
    assert replace(finding, fix="") == replace(expected, fix="")
    assert expected.fix and finding.fix.startswith(expected.fix)


def test_gpus_that_a_run_does_not_use_are_not_checked() -> None:
    old = changed(
        "b", devices=(replace(H100, driver="550.54.15"),) * 2, kernels=(Kernel("GPU 0", "no kernel runs"),)
    )
    assert problems(old, asking(WorkerGroup("learners", 6, 1, 0))) == []
    assert {(f.check, f.level) for f in problems(old, ClusterRequirements())} == {
        ("driver", "warning"),
        ("kernels", "warning"),
    }


@pytest.mark.parametrize(
    ("cuda", "driver"),
    [("12.8", "525.60.13"), ("12.8", "580.65.06"), ("13.0", "610.43.02"), ("14.0", "580.65.06")],
)
def test_a_driver_is_new_enough_for_every_cuda_of_its_family_and_for_all_before(
    cuda: str, driver: str
) -> None:
    facts = replace(
        HEALTHY,
        nodes=tuple(
            replace(n, cuda=cuda, devices=(replace(H100, driver=driver),) * 2) for n in HEALTHY.nodes
        ),
    )
    assert problems(facts) == []


def test_a_node_sends_through_all_its_cards() -> None:
    facts = replace(
        HEALTHY, all_reduce=AllReduce("nccl", ("a", "b", "c"), 256_000_000, 0.02, rates(9, 8, 10), ranks=8)
    )
    shown = {f.check: f.what for f in check_cluster(facts, NEED)}
    assert shown["all-reduce"] == "nccl over 8 GPUs of each, 256.0 MB in 20.0 ms: 17.07 GB/s"


def test_nodes_with_the_same_problem_share_a_finding() -> None:
    facts = replace(HEALTHY, nodes=(A, *(replace(n, limits=Limits(1024, None, None)) for n in (B, C))))
    (finding,) = problems(facts)
    assert (finding.check, finding.where) == ("limits", "b, c")


def test_both_directions_of_a_blocked_link_are_reported() -> None:
    blocked = {
        "a": BlockedPort("b", "10.0.0.2", 4000, "refused"),
        "b": BlockedPort("a", "10.0.0.1", 5000, "refused"),
    }
    facts = replace(HEALTHY, nodes=(*(replace(n, unreachable=(blocked[n.name],)) for n in (A, B)), C))
    assert [f.where for f in problems(facts)] == ["a -> b", "b -> a"]


def test_a_cluster_where_no_node_answers_is_one_finding() -> None:
    facts = ClusterFacts((), (NodeCapacity("a", 16, 2),), silent=(SilentNode("a", "no answer"),))
    assert [f.check for f in check_cluster(facts, NEED)] == ["nodes"]


def test_one_node_needs_no_network_and_no_shared_storage() -> None:
    alone = ClusterFacts(
        (replace(A, address="127.0.0.1"),),
        (NodeCapacity("a", 16, 6),),
        auth=False,
        skipped="there is one node",
    )
    shown = {f.check: (f.level, f.what) for f in check_cluster(alone, NEED)}
    assert shown["all-reduce"] == ("ok", "not measured: there is one node")
    assert shown["auth"] == ("ok", "Ray listens on the loopback address only")
    assert shown["storage"] == ("ok", "/shared/runs can be written")
    assert "network" not in shown


def test_without_a_recipe_the_cluster_is_described() -> None:
    shown = {f.check: f.what for f in check_cluster(HEALTHY, ClusterRequirements())}
    assert shown["resources"] == "3 nodes x 16 = 48 CPUs, 3 nodes x 2 = 6 GPUs"
    assert shown["disk"] == "100.00 GB free"
    assert shown["wandb"] == "not needed: tracking.wandb=off"


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [
        ("version skew", ConfigError, Exit.CONFIG),
        ("too few GPUs", NotEnoughResources, Exit.UNAVAILABLE),
        ("a blocked port", NotEnoughResources, Exit.UNAVAILABLE),
        ("read-only storage", OutputError, Exit.CANNOT_CREATE),
        ("a full disk", OutputError, Exit.CANNOT_CREATE),
        ("a model that one node cannot get", MissingInput, Exit.NO_INPUT),
        ("no token on a public address", ConfigError, Exit.CONFIG),
    ],
)
def test_an_error_ends_the_run_with_the_exit_code_of_its_kind(
    fault: str, kind: type[OrchestratorError], code: Exit
) -> None:
    facts, need, expected = FAULTS[fault]
    with pytest.raises(kind) as caught:
        require(check_cluster(facts, need))
    assert caught.value.exit_code == code
    assert expected.what in str(caught.value) and expected.fix in str(caught.value)


def test_warnings_do_not_end_a_run() -> None:
    require(check_cluster(replace(HEALTHY, auth=False, wandb="no key"), NEED))


def test_several_errors_are_reported_together_each_with_its_fix() -> None:
    facts = replace(
        changed("b", versions=dict(A.versions, trl="0.0.1")), silent=(SilentNode("d", "no answer"),)
    )
    with pytest.raises(NotEnoughResources, match="2 errors") as caught:
        require(check_cluster(facts, NEED))
    for part in ("d: no answer", "ray status", "trl is 0.0.1 here", "pip install trl==1.16.0"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "make", [lambda: check_cluster(*FAULTS["a blocked port"][:2]), lambda: check_cluster(HEALTHY, NEED)]
)
def test_the_table_shows_every_finding_and_fix(make: Callable[[], tuple[Finding, ...]]) -> None:
    findings, console = make(), Console(width=400)
    with console.capture() as capture:
        console.print(render(findings))
    output = capture.get()
    assert all(f.what in output and f.fix in output for f in findings)
    assert all(set(asdict(f)) == {"check", "level", "where", "what", "fix"} for f in findings)
