"""The doctor on real Ray nodes: a healthy cluster is measured, and every planted fault is found with its fix.

The slow tests plant them on hosts that are network namespaces: another version, a read-only mount, a
firewall, no token.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from orchestrator.cluster.doctor import survey as probes
from orchestrator.cluster.doctor.checks import check_cluster
from orchestrator.cluster.doctor.facts import ClusterFacts, ClusterRequirements, NodeCapacity
from orchestrator.cluster.doctor.findings import Finding
from orchestrator.cluster.doctor.node import MARKER, shared_folder
from orchestrator.cluster.doctor.probe import round_robin_pairs
from orchestrator.cluster.doctor.survey import survey
from orchestrator.core.errors import NotEnoughResources
from orchestrator.core.resources import WorkerGroup
from orchestrator.run.preflight import require, this_machine
from tests.hosts import Hosts, hosts
from tests.running import Sandbox

pytestmark = pytest.mark.timeout(300)

LEARNERS = (WorkerGroup("learners", 3, 1, 0),)


@dataclass(frozen=True, slots=True)
class Surveyed:
    """Facts of a cluster of two nodes."""

    cluster: Cluster
    facts: ClusterFacts
    root: Path
    """Folder above that of the run, which does not exist."""

    def check(self, name: str, need: ClusterRequirements) -> Finding:
        (finding,) = [f for f in check_cluster(self.facts, need) if f.check == name]
        return finding


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surveyed]:
    """Two nodes of a real Ray on this machine."""
    root = tmp_path_factory.mktemp("shared")
    sandbox = Sandbox(root)
    with pytest.MonkeyPatch.context() as patch:
        home = {"HOME": str(Path.home())}  # see tests/running.py
        for name, value in (sandbox.environment() | home).items():
            patch.setenv(name, value)
        node = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            cluster.add_node(**node)
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield Surveyed(cluster, survey(root / "runs" / "new", (), (), gpus=True), root)
        finally:
            ray.shutdown()
            cluster.shutdown()
            sandbox.close()


def test_a_healthy_cluster_is_measured(surveyed: Surveyed) -> None:
    need = ClusterRequirements(LEARNERS, checkpoint_bytes=1_000_000, keep=2)
    findings = check_cluster(surveyed.facts, need)
    assert [f for f in findings if f.level == "error"] == []
    shown = {f.check: f.what for f in findings}
    assert shown["nodes"] == "2 nodes answered"
    assert shown["resources"] == "3 learners x 1 = 3 CPUs, the cluster has 2 nodes x 2 = 4 CPUs"
    assert shown["storage"] == f"{surveyed.root} written and seen by every node"
    assert shown["network"] == "every node reaches every other (2 directions)"
    assert shown["all-reduce"].startswith("gloo, 16.0 MB in ")
    assert surveyed.facts.all_reduce is not None and surveyed.facts.all_reduce.rate > 1e6  # bytes per second
    assert all(abs(node.clock_offset_s) < 1.0 for node in surveyed.facts.nodes)
    require(findings)


def test_a_survey_leaves_nothing_behind(surveyed: Surveyed) -> None:
    assert not (surveyed.root / "runs").exists()
    assert not list(surveyed.root.glob(f"{MARKER}*"))


def test_a_missing_gpu_is_reported_with_the_arithmetic(surveyed: Surveyed) -> None:
    need = ClusterRequirements((WorkerGroup("learners", 1, 1, 1),))
    finding = surveyed.check("resources", need)
    assert (finding.level, finding.what) == ("error", "1 learners x 1 = 1 GPUs, the cluster has no GPUs")
    assert (
        finding.fix
        == "set learners.gpus_per_worker=0 to train on CPUs; or add nodes (ray start --address=HEAD:6379 "
        "--num-gpus=N)"
    )
    with pytest.raises(NotEnoughResources, match="the cluster has no GPUs"):
        require(check_cluster(surveyed.facts, need))


def test_a_node_that_is_gone_before_its_probe_comes_up_is_a_finding(
    surveyed: Surveyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [*probes.alive_nodes(), probes.Node("ab" * 28, NodeCapacity("gone", 1.0, 0.0))]
    monkeypatch.setattr(probes, "alive_nodes", lambda: nodes)
    facts = survey(None, (), (), gpus=False)
    (silent,) = [f for f in check_cluster(facts, ClusterRequirements()) if f.check == "nodes"]
    assert (silent.level, silent.where) == ("error", "gone") and silent.what.startswith("`now` failed: ")


def test_this_machine_is_checked_without_an_actor(tmp_path: Path) -> None:
    need = ClusterRequirements((WorkerGroup("learners", 1, 1, 0),), checkpoint_bytes=10**18, keep=2)
    shown = {f.check: f for f in check_cluster(this_machine(need, tmp_path / "run"), need)}
    assert shown["storage"].level == shown["versions"].level == shown["resources"].level == "ok"
    assert shown["disk"].level == "error" and "set checkpoint.keep=1" in shown["disk"].fix
    assert "network" not in shown and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_several_processes_of_each_node_are_measured_together(surveyed: Surveyed) -> None:
    """As over several GPUs of each, but over gloo and on one node that takes the place of three: the pairs of
    processes are the same."""
    own = probes.alive_nodes()[0]
    actors = {f"{node} GPU {i}": probes.probe_on(own.id, 0).remote(node) for node in "abc" for i in range(2)}
    with closing(probes._Probes(actors)) as members:
        members.call_all("now", timeout_s=probes.START_S)
        result = probes._measure(members, ("a", "b", "c"), "gloo")
    assert result.error is None and result.ranks == 2 and result.nodes == ("a", "b", "c")
    assert {(p.one, p.other) for p in result.pairs} == {("a", "b"), ("a", "c"), ("b", "c")}
    assert all(p.rate > 1e5 for p in result.pairs)


@pytest.mark.slow
def test_a_node_that_hangs_is_a_finding_within_the_deadline(
    surveyed: Surveyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs last on this cluster: Ray gives the node up some seconds later."""
    monkeypatch.setattr(probes, "START_S", 8.0)
    own = ray.get_runtime_context().get_node_id()
    (node,) = [n for n in surveyed.cluster.list_all_nodes() if n.node_id != own]
    raylet = node.all_processes["raylet"][0].process.pid
    os.kill(raylet, signal.SIGSTOP)
    try:
        start = time.monotonic()
        facts = survey(None, (), (), gpus=False)
        assert time.monotonic() - start < 30.0
    finally:
        os.kill(raylet, signal.SIGCONT)
    hung = surveyed.facts.nodes[1].name
    (silent,) = [f for f in check_cluster(facts, ClusterRequirements()) if f.check == "nodes"]
    assert (silent.level, silent.where, silent.what) == ("error", hung, "no answer to `now` within 8 s")
    assert "ray stop, then ray start" in silent.fix


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8])
def test_every_node_meets_every_other_once(nodes: int) -> None:
    rounds = round_robin_pairs(nodes)
    met = [(i, j) for partners in rounds for i, j in enumerate(partners) if j is not None]
    assert sorted(met) == [(i, j) for i in range(nodes) for j in range(nodes) if i != j]
    assert all(partners[j] == i for partners in rounds for i, j in enumerate(partners) if j is not None)


def test_a_new_run_folder_is_checked_at_its_nearest_parent(tmp_path: Path) -> None:
    assert shared_folder(tmp_path / "not" / "yet") == tmp_path
    assert shared_folder(tmp_path) == tmp_path


SCRIPT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from orchestrator.cluster.doctor.checks import check_cluster
from orchestrator.cluster.doctor.facts import ClusterRequirements
from orchestrator.core.resources import WorkerGroup
from orchestrator.run.preflight import cluster_facts
need = ClusterRequirements((WorkerGroup("learners", 3, 1, 0),), checkpoint_bytes=1_000_000, keep=2)
print(json.dumps([asdict(f) for f in check_cluster(cluster_facts(need, Path(sys.argv[1])), need)]))
"""
NEEDS_IPTABLES = pytest.mark.skipif(
    shutil.which("iptables") is None, reason="the firewall between two hosts needs iptables"
)


def doctor(cluster: Hosts, root: Path) -> list[Finding]:
    """Findings of the doctor on the head."""
    done = cluster.inside(
        0, sys.executable, "-c", SCRIPT, root, env={"RAY_ADDRESS": f"{cluster.address(0)}:6379"}
    )
    assert done.code == 0, done.out + done.err
    return [Finding(**fields) for fields in json.loads(done.out.splitlines()[-1])]


def label(cluster: Hosts, host: int, findings: list[Finding]) -> str:
    """The name that the doctor gives to a host."""
    (nodes,) = [f.where for f in findings if f.check == "nodes"]
    (name,) = [name for name in nodes.split(", ") if f"({cluster.address(host)})" in name]
    return name


@pytest.mark.slow
def test_three_hosts_with_a_token_are_healthy(tmp_path: Path) -> None:
    with hosts(tmp_path, authenticated=True) as cluster:
        cluster.start_cluster()
        findings = doctor(cluster, tmp_path / "runs")
        assert [asdict(f) for f in findings if f.level != "ok"] == []
        shown = {f.check: f.what for f in findings}
        assert shown["auth"] == "Ray asks for a token"
        assert shown["network"] == "every node reaches every other (6 directions)"
        print(shown["all-reduce"])


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hosts, Path]]:
    """No host has a token; host 1 has another trl, host 2 mounts the shared folder read-only."""
    root = tmp_path_factory.mktemp("faulty")
    shared, fake = root / "shared", root / "fake"
    shared.mkdir()
    (fake / "trl-0.0.1.dist-info").mkdir(parents=True)
    (fake / "trl-0.0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: trl\nVersion: 0.0.1\n"
    )
    read_only = f'mount --bind {shared} {shared} && mount -o remount,ro,bind {shared} && exec "$@"'
    with hosts(root, authenticated=False) as cluster:
        cluster.start_ray(0)
        cluster.start_ray(1, env={"PYTHONPATH": str(fake)})
        cluster.start_ray(2, before=("unshare", "-m", "sh", "-c", read_only, "sh"))
        yield cluster, shared


@pytest.mark.slow
def test_version_skew_read_only_storage_and_no_token_are_found(faulty: tuple[Hosts, Path]) -> None:
    cluster, shared = faulty
    findings = doctor(cluster, shared / "run")
    problems = {f.check: f for f in findings if f.level != "ok"}
    assert set(problems) == {"versions", "storage", "auth"}, findings
    one, two = (label(cluster, host, findings) for host in (1, 2))

    skew = problems["versions"]
    assert (skew.level, skew.where) == ("error", one)
    assert skew.what.startswith("trl is 0.0.1 here and 1.")
    assert skew.fix.startswith("pip install trl==1.") and skew.fix.endswith(
        "for the Python that runs Ray there, then ray stop and ray start"
    )

    storage = problems["storage"]
    assert (storage.level, storage.where, storage.what) == (
        "error",
        two,
        f"{shared} cannot be written: Read-only file system",
    )
    assert "mount the same shared folder" in storage.fix

    assert (problems["auth"].level, problems["auth"].where) == ("warning", "all 3 nodes")
    assert problems["auth"].fix.startswith(
        "ray get-auth-token --generate on the head; copy ~/.ray/auth_token"
    )
    assert list(shared.iterdir()) == []


@pytest.mark.slow
@NEEDS_IPTABLES
def test_a_blocked_port_is_found_in_the_direction_in_which_it_is_blocked(faulty: tuple[Hosts, Path]) -> None:
    cluster, _ = faulty
    rule = ["INPUT", "-s", cluster.address(1), "-p", "tcp", "--syn", "--dport", "32768:60999", "-j", "DROP"]
    firewall = cluster.inside(2, "iptables", "-A", *rule)
    if firewall.code != 0:
        pytest.skip(f"iptables does not work here: {firewall.err}")
    try:
        findings = doctor(cluster, cluster.root)
    finally:
        cluster.inside(2, "iptables", "-D", *rule)
    one, two = (label(cluster, host, findings) for host in (1, 2))
    (blocked,) = [f for f in findings if f.check == "network"]
    assert (blocked.level, blocked.where) == ("error", f"{one} -> {two}")
    assert f"cannot reach {two} at {cluster.address(2)} port " in blocked.what and blocked.what.endswith(
        "no answer within 3 s"
    )
    assert blocked.fix.endswith(
        f"iptables -I INPUT -p tcp -s {cluster.address(1)} --dport 32768:60999 -j ACCEPT"
    )
    (skipped,) = [f for f in findings if f.check == "all-reduce"]
    assert (skipped.level, skipped.what) == ("warning", "not measured: some nodes cannot reach others")

    # the fix itself, as it is printed, in front of the rule that blocks
    fix = blocked.fix[blocked.fix.index("iptables") :].split()
    cluster.inside(2, "iptables", "-A", *rule)
    assert cluster.inside(2, *fix).code == 0
    assert {f.check: f.level for f in doctor(cluster, cluster.root)}["network"] == "ok"
