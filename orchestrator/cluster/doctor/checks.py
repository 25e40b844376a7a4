"""The judgement on a cluster: (ClusterFacts, Need) -> Finding(check, level, where, what, fix) …, by pure
functions."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import groupby
from statistics import median
from typing import Literal

from rich.table import Table
from rich.text import Text

from orchestrator.cluster.doctor.facts import ClusterFacts, ClusterRequirements, NodeCapacity, NodeFacts
from orchestrator.core.format import size
from orchestrator.core.resources import SLACK, WorkerGroup, times

Level = Literal["ok", "warning", "error"]

SHM_BYTES = 1_000_000_000
"""NVIDIA's NCCL guide starts containers with --shm-size=1g (Docker's own default is 64 MB)."""
OPEN_FILES = 8192
"""A learner of a tiny run on two nodes holds 67 files and sockets, the head's GCS 75 (ls /proc/PID/fd | wc
-l) and more with every process of the cluster; 1024, the default of many systems, does not last for a few
hundred. Ray's own guide sets 65536."""
CLOCK_S = 2.0
"""Seconds that a node's clock may be off before logs and metrics of several nodes cannot be read side by
side."""
SLOW_PAIR = 0.25
"""A pair below this share of the median pair is called slow; less is noise between busy hosts."""
MINIMUM_DRIVER = {"11": 450, "12": 525, "13": 580}
"""Major version of the driver that each CUDA needs at least, by NVIDIA's table of minor version compatibility
(docs.nvidia.com/deploy/cuda-compatibility); newer drivers run all older CUDAs."""
FEW = 4
"""Nodes that are named one by one."""
STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor. check: what was looked at; where: nodes or folder; fix: a command or a key,
    empty where all is well."""

    check: str
    level: Level
    where: str
    what: str
    fix: str = ""


def check_cluster(facts: ClusterFacts, need: ClusterRequirements) -> tuple[Finding, ...]:
    """All checks, each with at least one finding; nodes with the same trouble share one."""
    found = [finding for check in (CHECKS if facts.nodes else (_answers,)) for finding in check(facts, need)]
    groups = groupby(found, key=lambda f: (f.check, f.level, f.what, f.fix))
    return tuple(
        Finding(key[0], key[1], ", ".join(dict.fromkeys(f.where for f in same)), key[2], key[3])
        for key, same in groups
    )


def _answers(facts: ClusterFacts, _: ClusterRequirements) -> list[Finding]:
    if not facts.silent:
        names = [c.node for c in facts.capacities]
        return [Finding("nodes", "ok", _few(names), f"{_count(len(names), 'node')} answered")]
    fix = (
        "look at `ray status` and at the logs on that host; there: ray stop, then ray start again with "
        "the same options"
    )
    return [Finding("nodes", "error", s.node, s.why, fix) for s in facts.silent]


def _versions(facts: ClusterFacts, _: ClusterRequirements) -> list[Finding]:
    found = [
        Finding(
            "versions",
            "error",
            facts.nodes[0].name,
            f"{u.version} is installed, {u.wanted} is needed",
            f'pip install "{u.wanted}"',
        )
        for u in facts.unmet
    ]
    for library in facts.nodes[0].versions:
        by_node = {node.name: node.versions.get(library, "missing") for node in facts.nodes}
        usual = Counter(by_node.values()).most_common(1)[0][0]  # of equals the first, which is the driver's
        model = next(name for name, version in by_node.items() if version == usual)
        found += [
            _skew(library, name, version, usual, model)
            for name, version in by_node.items()
            if version != usual
        ]
    return found or [
        Finding(
            "versions", "ok", _all(facts), ", ".join(f"{k} {v}" for k, v in facts.nodes[0].versions.items())
        )
    ]


def _skew(library: str, node: str, version: str, usual: str, model: str) -> Finding:
    install = f"install Python {usual}" if library == "python" else f"pip install {library}=={usual}"
    if usual == "missing":
        install = f"pip uninstall {library}"
    fix = f"{install} for the Python that runs Ray there, then ray stop and ray start"
    return Finding("versions", "error", node, f"{library} is {version} here and {usual} on {model}", fix)


def _resources(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    has = [Finding("resources", "ok", _all(facts), f"{_supply(facts, 'CPUs')}, {_supply(facts, 'GPUs')}")]
    if not need.groups:
        return has
    short = [finding for unit in ("CPUs", "GPUs") for finding in _short_of(facts, need.groups, unit)]
    if short:
        return short
    narrow = [finding for group in need.groups for finding in _too_narrow(facts, group)]
    if narrow:
        return narrow
    asked = [unit for unit in ("CPUs", "GPUs") if any(_each(g, unit) for g in need.groups)]
    words = "; ".join(
        f"{_demand(need.groups, unit)}, the cluster has {_supply(facts, unit)}" for unit in asked
    )
    return [Finding("resources", "ok", _all(facts), words)]


def _short_of(facts: ClusterFacts, groups: Sequence[WorkerGroup], unit: str) -> list[Finding]:
    """Example: 8 learners x 1 = 8 GPUs, the cluster has 2 nodes x 2 = 4 GPUs."""
    asking = [g for g in groups if _each(g, unit)]
    total = sum(_of(c, unit) for c in facts.capacities)
    if total + SLACK >= sum(g.workers * _each(g, unit) for g in asking):
        return []
    others = sum(g.workers * _each(g, unit) for g in asking[1:])
    first, key = asking[0], "gpus_per_worker" if unit == "GPUs" else "cpus_per_worker"
    fits = times(total - others, _each(first, unit))
    if first.what.startswith("reward "):
        fixes = [f"lower `gpus` of {first.what} in rewards.functions"]
    else:
        fixes = [f"set {first.what}.workers={fits}"] if fits > 0 else []
        if unit == "CPUs" and total > others:
            fixes.append(f"set {first.what}.{key}={(total - others) / first.workers:.2g}")
        if not total:
            fixes.append(f"set {first.what}.{key}=0 to train on CPUs")
    fixes += [
        _uncounted(node, capacity)
        for node, capacity in _pairs(facts)
        if unit == "GPUs" and len(node.devices) > capacity.gpus
    ]
    fixes.append(f"add nodes (ray start --address=HEAD:6379 --num-{unit.lower()}=N)")
    what = f"{_demand(asking, unit)}, the cluster has {_supply(facts, unit)}"
    return [Finding("resources", "error", _all(facts), what, "; or ".join(fixes))]


def _uncounted(node: NodeFacts, capacity: NodeCapacity) -> str:
    return (
        f"on {node.name} nvidia-smi sees {len(node.devices)} GPUs and Ray counts {capacity.gpus:g}: "
        f"ray stop, then ray start with --num-gpus={len(node.devices)}"
    )


def _too_narrow(facts: ClusterFacts, group: WorkerGroup) -> list[Finding]:
    """A worker lives on one node: what is left over on each is lost."""
    fits = sum(group.fit(c.cpus, c.gpus) for c in facts.capacities)
    if fits >= group.workers:
        return []
    each = " and ".join(f"{_each(group, unit):g} {unit}" for unit in ("CPUs", "GPUs") if _each(group, unit))
    rooms = " + ".join(f"{group.fit(c.cpus, c.gpus)} on {c.node}" for c in facts.capacities)
    what = (
        f"each of {group.workers} {group.what} needs {each} on one node; there is room for {rooms} = {fits}"
    )
    fix = (
        f"set {group.what}.workers={fits}"
        if fits
        else f"set {group.what}.cpus_per_worker (or gpus_per_worker) to what one node has"
    )
    return [Finding("resources", "error", _all(facts), what, fix)]


def _devices(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    """Ranks wait for the slowest: other devices on other nodes are told, not refused."""
    kinds = {f"{gpu.name} {size(gpu.memory)}": node.name for node in facts.nodes for gpu in node.devices}
    if len(kinds) < 2 or not need.gpus:
        return []
    what = "GPUs differ: " + ", ".join(f"{kind} on {node}" for kind, node in kinds.items())
    fix = (
        "take nodes of one kind; else set batch.memory_limit_gb to the smallest, and every step waits for "
        "the slowest"
    )
    return [Finding("resources", "warning", _all(facts), what, fix)]


def _driver(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    """The driver decides which CUDA can run; torch falls back to the CPU, or fails at its first kernel."""
    looked = [(node, sorted({gpu.driver for gpu in node.devices if gpu.driver})) for node in facts.nodes]
    looked = [(node, drivers) for node, drivers in looked if drivers]
    if not looked or (need.groups and not need.gpus):
        return []
    level: Level = "error" if need.gpus else "warning"
    found = []
    for node, drivers in looked:
        needed = MINIMUM_DRIVER.get(node.cuda.partition(".")[0])
        older = [
            d
            for d in drivers
            if needed is not None and d.partition(".")[0].isdecimal() and int(d.partition(".")[0]) < needed
        ]
        if not node.cuda:
            what = f"there are {_count(len(node.devices), 'GPU')}, and torch there is built without CUDA"
            found.append(
                Finding(
                    "driver",
                    level,
                    node.name,
                    what,
                    "pip install torch --index-url https://download.pytorch.org/whl/cu130 there",
                )
            )
        elif older:
            what = f"driver {older[0]} is too old for torch's CUDA {node.cuda}, which needs {needed} or newer"
            fix = (
                f"install driver {needed} or newer; or a torch for this one: pip install torch "
                "--index-url https://download.pytorch.org/whl/cu128"
            )
            found.append(Finding("driver", level, node.name, what, fix))
    versions = sorted({d for _, drivers in looked for d in drivers})
    return found or [
        Finding(
            "driver", "ok", _all(facts), f"driver {', '.join(versions)}, torch for CUDA {looked[0][0].cuda}"
        )
    ]


def _kernels(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    tried = [(node, kernel) for node in facts.nodes for kernel in node.kernels]
    if need.groups and not need.gpus:
        return []
    level: Level = "error" if need.gpus else "warning"
    fix = (
        "look at nvidia-smi -q (ECC errors, retired pages) and at Xid in dmesg there; reset or replace "
        "the GPU, or start Ray without it"
    )
    found = [
        Finding("kernels", level, node.name, f"{kernel.device}: {kernel.trouble}", fix)
        for node, kernel in tried
        if kernel.trouble
    ]
    if found or not tried:
        return found
    return [
        Finding(
            "kernels",
            "ok",
            _all(facts),
            f"a product on each of {_count(len(tried), 'GPU')} is what the CPU makes of it",
        )
    ]


def _storage(facts: ClusterFacts, _: ClusterRequirements) -> list[Finding]:
    looked = [(node, node.storage) for node in facts.nodes if node.storage is not None]
    if not looked:
        return []
    share = (
        "mount the same shared folder (NFS, Lustre, a PVC) there on every node, or choose another --output"
    )
    found = [
        Finding(
            "storage",
            "error",
            node.name,
            f"{s.folder} cannot be written: {s.error}",
            f"make it writable for the user that runs Ray; or {share}",
        )
        for node, s in looked
        if s.error
    ]
    if found:
        return found
    found = [
        Finding(
            "storage",
            "error",
            node.name,
            f"{s.folder} is not the same folder here: what {_few(s.unseen)} wrote is not seen",
            share,
        )
        for node, s in looked
        if s.unseen
    ]
    seen = "written and seen by every node" if len(looked) > 1 else "can be written"
    return found or [Finding("storage", "ok", _all(facts), f"{looked[0][1].folder} {seen}")]


def _disk(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    usable = [node.storage for node in facts.nodes if node.storage is not None and not node.storage.error]
    if not usable:
        return []
    least = min(usable, key=lambda s: s.free)
    whole = need.checkpoint_bytes * (need.keep + 1)
    needed = max(0, whole - least.held)
    if not whole:
        return [Finding("disk", "ok", least.folder, f"{size(least.free)} free")]
    kept = (
        f"{need.keep + 1} checkpoints x {size(need.checkpoint_bytes)} = {size(whole)} "
        f"(checkpoint.keep={need.keep} and one being written)"
    )
    what = f"{kept}{f', {size(least.held)} there already' if least.held else ''}, {size(least.free)} free"
    if least.free >= needed:
        return [Finding("disk", "ok", least.folder, what)]
    fewer = f", set checkpoint.keep={need.keep - 1}" if need.keep > 1 else ""
    return [
        Finding(
            "disk",
            "error",
            least.folder,
            what,
            f"free {size(needed - least.free)} there{fewer}, or choose another --output",
        )
    ]


def _shm(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    if not any(node.shm_total for node in facts.nodes):
        return [Finding("shm", "ok", _all(facts), "this system has no /dev/shm")]
    found = []
    for node, capacity in _pairs(facts):
        fix = (
            "docker run --shm-size=16g; Kubernetes: an emptyDir with medium: Memory at /dev/shm; else "
            "mount -o remount,size=16G /dev/shm"
        )
        if capacity.object_store > node.shm_total:
            what = (
                f"/dev/shm has {size(node.shm_total)}, Ray's object store {size(capacity.object_store)}: "
                "it lies on disk instead"
            )
            found.append(
                Finding(
                    "shm",
                    "warning",
                    node.name,
                    what,
                    f"{fix}; or ray start with a smaller --object-store-memory",
                )
            )
        elif 0 < capacity.object_store < need.object_store:
            what = (
                f"Ray's object store has {size(capacity.object_store)}, published weights take "
                f"{size(need.object_store)}: through the disk"
            )
            fixed = f"ray start --object-store-memory={need.object_store}, or rollouts.transport=broadcast"
            found.append(Finding("shm", "warning", node.name, what, fixed))
        elif node.shm_free < SHM_BYTES:
            what = (
                f"/dev/shm has {size(node.shm_free)} free; NCCL and Ray's object store want "
                f"{size(SHM_BYTES)} or more"
            )
            found.append(Finding("shm", "warning", node.name, what, fix))
    return found or [
        Finding(
            "shm",
            "ok",
            _all(facts),
            f"/dev/shm has at least {size(min(n.shm_free for n in facts.nodes))} free",
        )
    ]


def _limits(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    found = []
    for node in facts.nodes:
        files, locked = node.limits.open_files, node.limits.locked_memory
        if files is not None and files < OPEN_FILES:
            what = f"at most {files} open files per process; a cluster wants {OPEN_FILES} or more"
            found.append(
                Finding(
                    "limits",
                    "warning",
                    node.name,
                    what,
                    "ulimit -n 65536 before ray start (systemd: LimitNOFILE=65536)",
                )
            )
        if locked is not None and node.rdma and need.gpus:
            what = f"at most {size(locked)} of locked memory; InfiniBand registers its buffers in it"
            found.append(
                Finding(
                    "limits",
                    "warning",
                    node.name,
                    what,
                    "ulimit -l unlimited before ray start (docker run --ulimit memlock=-1)",
                )
            )
    least = min((n.limits.open_files for n in facts.nodes if n.limits.open_files is not None), default=None)
    return found or [
        Finding(
            "limits",
            "ok",
            _all(facts),
            f"open files: {'no limit' if least is None else f'{least} per process'}",
        )
    ]


def _clock(facts: ClusterFacts, _: ClusterRequirements) -> list[Finding]:
    fix = "timedatectl set-ntp true there, or start chrony"
    return [
        Finding("clock", "warning", n.name, f"its clock is {n.clock_offset_s:+.1f} s off the driver's", fix)
        for n in facts.nodes
        if abs(n.clock_offset_s) > CLOCK_S
    ]


def _network(facts: ClusterFacts, _: ClusterRequirements) -> list[Finding]:
    ports = {node.name: node.ports for node in facts.nodes}
    addresses = {node.name: node.address for node in facts.nodes}
    found = [
        Finding(
            "network",
            "error",
            f"{node.name} -> {to.node}",
            f"{node.name} cannot reach {to.node} at {to.address} port {to.port}: {to.why}",
            f"let TCP ports {ports[to.node][0]}-{ports[to.node][1]} in on {to.node}, from which the master "
            "port, gloo and NCCL take theirs: "
            f"iptables -I INPUT -p tcp -s {addresses[node.name]} --dport "
            f"{ports[to.node][0]}:{ports[to.node][1]} -j ACCEPT",
        )
        for node in facts.nodes
        for to in node.unreachable
    ]
    if found or len(facts.nodes) < 2:
        return found
    return [
        Finding(
            "network",
            "ok",
            _all(facts),
            f"every node reaches every other ({len(facts.nodes) * (len(facts.nodes) - 1)} directions)",
        )
    ]


def _all_reduce(facts: ClusterFacts, _: ClusterRequirements) -> list[Finding]:
    result = facts.all_reduce
    if result is None:
        level: Level = "ok" if len(facts.capacities) == 1 else "warning"
        return [
            Finding(
                "all-reduce",
                level,
                _all(facts),
                f"not measured: {facts.skipped}",
                "" if level == "ok" else "mend the errors above first",
            )
        ]
    where = _few(result.nodes)
    if result.error is not None:
        variable = "NCCL_SOCKET_IFNAME" if result.backend == "nccl" else "GLOO_SOCKET_IFNAME"
        fixes = [
            f"on {n.name}: export {variable}={n.interface} before ray start"
            for n in facts.nodes
            if n.interface and n.name in result.nodes
        ]
        if result.backend == "nccl":
            fixes.append("NCCL_DEBUG=INFO shows more")
        return [Finding("all-reduce", "error", where, f"{result.backend}: {result.error}", "; ".join(fixes))]
    over = f" over {result.ranks} GPUs of each" if result.ranks > 1 else ""
    what = (
        f"{result.backend}{over}, {size(result.size)} in {result.seconds * 1e3:.1f} ms: {_rate(result.rate)}"
    )
    found = [Finding("all-reduce", "ok", where, what)]
    usual = median(p.rate for p in result.pairs) if len(result.pairs) > 1 else 0.0
    for pair in result.pairs:
        if pair.rate < SLOW_PAIR * usual:
            what = f"{_rate(pair.rate)} between them, {_rate(usual)} between most"
            fix = (
                f"look at the link of the two (ethtool on its interface, iperf3 -c {pair.other}), or "
                "leave the slower one out"
            )
            found.append(Finding("all-reduce", "warning", f"{pair.one} - {pair.other}", what, fix))
    return found


def _wandb(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    where = facts.nodes[0].name
    if need.wandb != "online":
        return [Finding("wandb", "ok", where, f"not needed: tracking.wandb={need.wandb}")]
    if facts.wandb is None:
        return [Finding("wandb", "ok", where, "its server answers and a key is there")]
    fix = (
        "wandb login (or export WANDB_API_KEY), HTTPS_PROXY or WANDB_BASE_URL as your network needs; or "
        "set tracking.wandb=offline"
    )
    return [Finding("wandb", "warning", where, f"{facts.wandb}; the run would be recorded offline", fix)]


def _models(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    found = []
    for node in facts.nodes:
        for absent in node.absent:
            hub = any(m.hub and m.path == absent.path for m in need.models)
            fix = (
                f"hf download {absent.path} there, or set HF_HOME to a shared folder"
                if hub
                else "put the folder on storage that every node mounts"
            )
            found.append(Finding("model", "error", node.name, f"{absent.path}: {absent.why}", fix))
    if found or not need.models:
        return found
    return [
        Finding(
            "model",
            "ok",
            _all(facts),
            ", ".join(dict.fromkeys(m.path for m in need.models)) + " can be loaded",
        )
    ]


def _auth(facts: ClusterFacts, _: ClusterRequirements) -> list[Finding]:
    addresses = [node.address for node in facts.nodes]
    if facts.auth:
        return [Finding("auth", "ok", _all(facts), "Ray asks for a token")]
    if all(address.startswith("127.") or address == "::1" for address in addresses):
        return [Finding("auth", "ok", _all(facts), "Ray listens on the loopback address only")]
    fix = (
        "ray get-auth-token --generate on the head; copy ~/.ray/auth_token (mode 600) to every node; "
        "export RAY_AUTH_MODE=token; then ray stop and ray start on every node"
    )
    unknown = "it cannot be told whether Ray asks for a token"
    what = (
        unknown if facts.auth is None else "Ray asks for no token: whoever reaches its ports runs code as you"
    )
    return [Finding("auth", "warning" if all(map(_private, addresses)) else "error", _all(facts), what, fix)]


CHECKS: tuple[Callable[[ClusterFacts, ClusterRequirements], Iterable[Finding]], ...] = (
    _answers, _versions, _resources, _devices, _driver, _kernels, _storage, _disk, _shm, _limits, _clock, _network, _all_reduce, _models,
    _wandb, _auth,
)  # fmt: skip


def render(findings: Sequence[Finding]) -> Table:
    """The findings as a table, each fix below its trouble."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        style = STYLES[finding.level]
        what = (
            Text(finding.what)
            if finding.level == "ok"
            else Text.assemble(finding.what, "\n", (f"fix: {finding.fix}", "bold"))
        )
        table.add_row(Text(finding.level, style=style), finding.check, Text(finding.where, style="dim"), what)
    return table


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s"


def _all(facts: ClusterFacts) -> str:
    return facts.nodes[0].name if len(facts.nodes) == 1 else f"all {len(facts.nodes)} nodes"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= FEW else f"{', '.join(names[:FEW])} and {len(names) - FEW} more"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _pairs(facts: ClusterFacts) -> list[tuple[NodeFacts, NodeCapacity]]:
    """Nodes that answered, with what Ray gives out on them."""
    by_name = {capacity.node: capacity for capacity in facts.capacities}
    return [(node, by_name[node.name]) for node in facts.nodes]


def _each(group: WorkerGroup, unit: str) -> float:
    return group.cpus if unit == "CPUs" else group.gpus


def _of(capacity: NodeCapacity, unit: str) -> float:
    return capacity.cpus if unit == "CPUs" else capacity.gpus


def _demand(groups: Sequence[WorkerGroup], unit: str) -> str:
    """Example: 8 learners x 1 + 2 rollouts x 1 = 10 GPUs."""
    asking = [g for g in groups if _each(g, unit)]
    words = " + ".join(f"{g.workers} {g.what} x {_each(g, unit):g}" for g in asking)
    return f"{words} = {sum(g.workers * _each(g, unit) for g in asking):g} {unit}"


def _supply(facts: ClusterFacts, unit: str) -> str:
    """Example: 2 nodes x 4 = 8 GPUs."""
    amounts = [_of(c, unit) for c in facts.capacities]
    if not any(amounts):
        return f"no {unit}"
    if len(set(amounts)) == 1:
        words = f"{_count(len(amounts), 'node')} x {amounts[0]:g}"
    else:
        words = f"{_count(len(amounts), 'node')} with {' + '.join(f'{a:g}' for a in amounts)}"
    return f"{words} = {sum(amounts):g} {unit}"


def _private(address: str) -> bool:
    return ip_address(address).is_private
