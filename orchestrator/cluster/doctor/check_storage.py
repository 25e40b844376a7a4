"""Checks of storage and limits: run folder, disk, /dev/shm, limits of processes, and the models."""

from orchestrator.cluster.doctor.facts import ClusterFacts, ClusterRequirements, NodeCapacity, NodeFacts
from orchestrator.cluster.doctor.findings import Finding, all_nodes, listed, with_capacity
from orchestrator.core.format import size

SHM_BYTES = 1_000_000_000
"""Free bytes of /dev/shm. NVIDIA's NCCL guide starts containers with --shm-size=1g (Docker's own default is
64 MB)."""
OPEN_FILES = 8192
"""Open files of a process. A learner of a tiny run on two nodes holds 67 files and sockets, the head's GCS 75
(ls /proc/PID/fd | wc -l), and more with every process of the cluster. 1024, the default of many systems, is
not enough for a few hundred processes. Ray's own guide sets 65536."""


def check_storage(facts: ClusterFacts, _: ClusterRequirements) -> list[Finding]:
    """Every node has to write to the run folder, and to see what the others wrote."""
    folders = [(node, node.storage) for node in facts.nodes if node.storage is not None]
    if not folders:
        return []
    share = (
        "mount the same shared folder (NFS, Lustre, a PVC) there on every node, or choose another --output"
    )
    writable = f"make it writable for the user that runs Ray; or {share}"
    findings = [
        Finding("storage", "error", node.name, f"{s.folder} cannot be written: {s.error}", writable)
        for node, s in folders
        if s.error
    ]
    if findings:
        return findings
    findings = [
        Finding(
            "storage",
            "error",
            node.name,
            f"{s.folder} is not the same folder here: what {listed(s.unseen)} wrote is not seen",
            share,
        )
        for node, s in folders
        if s.unseen
    ]
    seen = "written and seen by every node" if len(folders) > 1 else "can be written"
    return findings or [Finding("storage", "ok", all_nodes(facts), f"{folders[0][1].folder} {seen}")]


def check_disk(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    """The checkpoints that are kept, and one that is being written, have to fit."""
    usable = [node.storage for node in facts.nodes if node.storage is not None and not node.storage.error]
    if not usable:
        return []
    least = min(usable, key=lambda s: s.free)
    total = need.checkpoint_bytes * (need.keep + 1)
    needed = max(0, total - least.held)
    if not total:
        return [Finding("disk", "ok", least.folder, f"{size(least.free)} free")]
    kept = (
        f"{need.keep + 1} checkpoints x {size(need.checkpoint_bytes)} = {size(total)} "
        f"(checkpoint.keep={need.keep} and one being written)"
    )
    what = f"{kept}{f', {size(least.held)} there already' if least.held else ''}, {size(least.free)} free"
    if least.free >= needed:
        return [Finding("disk", "ok", least.folder, what)]
    fewer = f", set checkpoint.keep={need.keep - 1}" if need.keep > 1 else ""
    fix = f"free {size(needed - least.free)} there{fewer}, or choose another --output"
    return [Finding("disk", "error", least.folder, what, fix)]


def check_shm(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    """/dev/shm has to hold Ray's object store, and NCCL's buffers beside it."""
    if not any(node.shm_total for node in facts.nodes):
        return [Finding("shm", "ok", all_nodes(facts), "this system has no /dev/shm")]
    findings = [_shm(node, capacity, need) for node, capacity in with_capacity(facts)]
    least = size(min(n.shm_free for n in facts.nodes))
    ok = Finding("shm", "ok", all_nodes(facts), f"/dev/shm has at least {least} free")
    return [finding for finding in findings if finding is not None] or [ok]


def _shm(node: NodeFacts, capacity: NodeCapacity, need: ClusterRequirements) -> Finding | None:
    store = capacity.object_store
    fix = (
        "docker run --shm-size=16g; Kubernetes: an emptyDir with medium: Memory at /dev/shm; else "
        "mount -o remount,size=16G /dev/shm"
    )
    if store > node.shm_total:
        what = (
            f"/dev/shm has {size(node.shm_total)}, Ray's object store {size(store)}: it lies on disk instead"
        )
        fix += "; or ray start with a smaller --object-store-memory"
    elif 0 < store < need.object_store:
        what = (
            f"Ray's object store has {size(store)}, published weights take {size(need.object_store)}: they "
            "go through the disk"
        )
        fix = f"ray start --object-store-memory={need.object_store}, or rollouts.transport=broadcast"
    elif node.shm_free < SHM_BYTES:
        what = (
            f"/dev/shm has {size(node.shm_free)} free; NCCL and Ray's object store need "
            f"{size(SHM_BYTES)} or more"
        )
    else:
        return None
    return Finding("shm", "warning", node.name, what, fix)


def check_limits(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    """Limits of a process (ulimit) have to be high enough."""
    findings = []
    for node in facts.nodes:
        files, locked = node.limits.open_files, node.limits.locked_memory
        if files is not None and files < OPEN_FILES:
            what = f"at most {files} open files per process; a cluster needs {OPEN_FILES} or more"
            fix = "ulimit -n 65536 before ray start (systemd: LimitNOFILE=65536)"
            findings.append(Finding("limits", "warning", node.name, what, fix))
        if locked is not None and node.rdma and need.gpus:
            what = f"at most {size(locked)} of locked memory; InfiniBand registers its buffers in it"
            fix = "ulimit -l unlimited before ray start (docker run --ulimit memlock=-1)"
            findings.append(Finding("limits", "warning", node.name, what, fix))
    least = min((n.limits.open_files for n in facts.nodes if n.limits.open_files is not None), default=None)
    what = f"open files: {'no limit' if least is None else f'{least} per process'}"
    return findings or [Finding("limits", "ok", all_nodes(facts), what)]


def check_models(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    """Every node has to have the weights, or fetch them."""
    findings = []
    for node in facts.nodes:
        for absent in node.absent:
            hub = any(m.hub and m.path == absent.path for m in need.models)
            fix = (
                f"hf download {absent.path} there, or set HF_HOME to a shared folder"
                if hub
                else "put the folder on storage that every node mounts"
            )
            findings.append(Finding("model", "error", node.name, f"{absent.path}: {absent.why}", fix))
    if findings or not need.models:
        return findings
    paths = ", ".join(dict.fromkeys(m.path for m in need.models))
    return [Finding("model", "ok", all_nodes(facts), f"{paths} can be loaded")]
