"""The checks of a cluster: (ClusterFacts, ClusterRequirements) -> findings, by pure functions.

check_versions.py   Python, libraries, drivers, GPUs
check_workers.py    room for the workers
check_storage.py    run folder, disk, /dev/shm, limits, models
check_network.py    clocks, connections, all-reduce, wandb, token
"""

from collections.abc import Callable, Iterable
from itertools import groupby

from orchestrator.cluster.doctor.check_network import (
    check_all_reduce,
    check_auth,
    check_clocks,
    check_connections,
    check_wandb,
)
from orchestrator.cluster.doctor.check_storage import (
    check_disk,
    check_limits,
    check_models,
    check_shm,
    check_storage,
)
from orchestrator.cluster.doctor.check_versions import (
    check_devices,
    check_drivers,
    check_kernels,
    check_versions,
)
from orchestrator.cluster.doctor.check_workers import check_workers
from orchestrator.cluster.doctor.facts import ClusterFacts, ClusterRequirements
from orchestrator.cluster.doctor.findings import Finding, counted, listed


def check_cluster(facts: ClusterFacts, need: ClusterRequirements) -> tuple[Finding, ...]:
    """Findings of all checks. Nodes with the same problem share one."""
    checks = CHECKS if facts.nodes else (check_answers,)
    findings = [finding for check in checks for finding in check(facts, need)]
    groups = groupby(findings, key=lambda f: (f.check, f.level, f.what, f.fix))
    return tuple(
        Finding(check, level, ", ".join(dict.fromkeys(f.where for f in same)), what, fix)
        for (check, level, what, fix), same in groups
    )


def check_answers(facts: ClusterFacts, _: ClusterRequirements) -> list[Finding]:
    """Every node that Ray counts as alive has to answer."""
    if not facts.silent:
        names = [c.node for c in facts.capacities]
        return [Finding("nodes", "ok", listed(names), f"{counted(len(names), 'node')} answered")]
    fix = (
        "look at `ray status` and at the logs on that host; there: ray stop, then ray start again with "
        "the same options"
    )
    return [Finding("nodes", "error", s.node, s.why, fix) for s in facts.silent]


CHECKS: tuple[Callable[[ClusterFacts, ClusterRequirements], Iterable[Finding]], ...] = (
    check_answers,
    check_versions,
    check_workers,
    check_devices,
    check_drivers,
    check_kernels,
    check_storage,
    check_disk,
    check_shm,
    check_limits,
    check_clocks,
    check_connections,
    check_all_reduce,
    check_models,
    check_wandb,
    check_auth,
)
"""All checks, in the order in which their findings are shown."""
