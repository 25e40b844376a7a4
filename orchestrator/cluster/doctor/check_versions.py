"""Checks of versions and devices: Python and libraries, drivers, and whether the GPUs compute."""

from collections import Counter

from orchestrator.cluster.doctor.facts import ClusterFacts, ClusterRequirements, NodeFacts
from orchestrator.cluster.doctor.findings import Finding, Level, all_nodes, counted
from orchestrator.core.format import size

MINIMUM_DRIVER = {"11": 450, "12": 525, "13": 580}
"""Major version of the driver that each CUDA needs at least, by NVIDIA's table of minor version compatibility
(docs.nvidia.com/deploy/cuda-compatibility). Newer drivers run all older CUDAs."""


def check_versions(facts: ClusterFacts, _: ClusterRequirements) -> list[Finding]:
    """All nodes need the same versions, and the driver's node those that this program requires."""
    driver = facts.nodes[0]
    findings = [
        Finding(
            "versions",
            "error",
            driver.name,
            f"{u.version} is installed, {u.wanted} is needed",
            f'pip install "{u.wanted}"',
        )
        for u in facts.unmet
    ]
    for library in driver.versions:
        by_node = {node.name: node.versions.get(library, "missing") for node in facts.nodes}
        usual = Counter(by_node.values()).most_common(1)[0][0]  # of equals the first, which is the driver's
        model = next(name for name, version in by_node.items() if version == usual)
        findings += [
            _skew(library, name, version, usual, model)
            for name, version in by_node.items()
            if version != usual
        ]
    versions = ", ".join(f"{library} {version}" for library, version in driver.versions.items())
    return findings or [Finding("versions", "ok", all_nodes(facts), versions)]


def _skew(library: str, node: str, version: str, usual: str, model: str) -> Finding:
    """A node whose version differs from the usual one. model: a node that has the usual one."""
    install = f"install Python {usual}" if library == "python" else f"pip install {library}=={usual}"
    if usual == "missing":
        install = f"pip uninstall {library}"
    fix = f"{install} for the Python that runs Ray there, then ray stop and ray start"
    return Finding("versions", "error", node, f"{library} is {version} here and {usual} on {model}", fix)


def check_devices(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    """A warning if nodes have different GPUs: ranks wait for the slowest."""
    kinds = {f"{gpu.name} {size(gpu.memory)}": node.name for node in facts.nodes for gpu in node.devices}
    if len(kinds) < 2 or not need.gpus:
        return []
    what = "GPUs differ: " + ", ".join(f"{kind} on {node}" for kind, node in kinds.items())
    fix = (
        "take nodes of one kind; else set batch.memory_limit_gb to the smallest, and every step waits for "
        "the slowest"
    )
    return [Finding("resources", "warning", all_nodes(facts), what, fix)]


def check_drivers(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    """The driver has to be new enough for torch's CUDA: else torch falls back to the CPU, or fails at its
    first kernel."""
    reported = [(node, sorted({gpu.driver for gpu in node.devices if gpu.driver})) for node in facts.nodes]
    reported = [(node, drivers) for node, drivers in reported if drivers]
    if not reported or (need.groups and not need.gpus):
        return []
    level: Level = "error" if need.gpus else "warning"
    findings = [finding for node, drivers in reported for finding in _driver(node, drivers, level)]
    versions = ", ".join(sorted({driver for _, drivers in reported for driver in drivers}))
    what = f"driver {versions}, torch for CUDA {reported[0][0].cuda}"
    return findings or [Finding("driver", "ok", all_nodes(facts), what)]


def _driver(node: NodeFacts, drivers: list[str], level: Level) -> list[Finding]:
    if not node.cuda:
        what = f"there are {counted(len(node.devices), 'GPU')}, and torch there is built without CUDA"
        fix = "pip install torch --index-url https://download.pytorch.org/whl/cu130 there"
        return [Finding("driver", level, node.name, what, fix)]
    needed = MINIMUM_DRIVER.get(node.cuda.partition(".")[0])
    older = [driver for driver in drivers if needed is not None and _is_older(driver, needed)]
    if not older:
        return []
    what = f"driver {older[0]} is too old for torch's CUDA {node.cuda}, which needs {needed} or newer"
    fix = (
        f"install driver {needed} or newer; or a torch for this one: pip install torch "
        "--index-url https://download.pytorch.org/whl/cu128"
    )
    return [Finding("driver", level, node.name, what, fix)]


def _is_older(driver: str, needed: int) -> bool:
    major = driver.partition(".")[0]
    return major.isdecimal() and int(major) < needed


def check_kernels(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    """A small product on every GPU has to be what the CPU computes."""
    kernels = [(node, kernel) for node in facts.nodes for kernel in node.kernels]
    if need.groups and not need.gpus:
        return []
    level: Level = "error" if need.gpus else "warning"
    fix = (
        "look at nvidia-smi -q (ECC errors, retired pages) and at Xid in dmesg there; reset or replace "
        "the GPU, or start Ray without it"
    )
    findings = [
        Finding("kernels", level, node.name, f"{kernel.device}: {kernel.problem}", fix)
        for node, kernel in kernels
        if kernel.problem
    ]
    if findings or not kernels:
        return findings
    what = f"a product on each of {counted(len(kernels), 'GPU')} is the same as on the CPU"
    return [Finding("kernels", "ok", all_nodes(facts), what)]
