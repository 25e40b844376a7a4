"""Check of the room for workers: whether the cluster has the CPUs and GPUs that the run asks for."""

from collections.abc import Sequence

from orchestrator.cluster.capacity import UNITS, Unit, asking, demand, fixes, is_short, per_worker
from orchestrator.cluster.doctor.facts import ClusterFacts, ClusterRequirements, NodeCapacity, NodeFacts
from orchestrator.cluster.doctor.findings import Finding, all_nodes, counted, with_capacity
from orchestrator.core.resources import WorkerGroup


def check_workers(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    """All worker groups have to fit, each worker on one node."""
    if not need.groups:
        supplies = ", ".join(_supply(facts, unit) for unit in UNITS)
        return [Finding("resources", "ok", all_nodes(facts), supplies)]
    short = [finding for unit in UNITS for finding in _too_few(facts, need.groups, unit)]
    if short:
        return short
    narrow = [finding for group in need.groups for finding in _too_narrow(facts, group)]
    if narrow:
        return narrow
    what = "; ".join(_compared(facts, need.groups, unit) for unit in UNITS if asking(need.groups, unit))
    return [Finding("resources", "ok", all_nodes(facts), what)]


def _too_few(facts: ClusterFacts, groups: Sequence[WorkerGroup], unit: Unit) -> list[Finding]:
    """Example: 8 learners x 1 = 8 GPUs, the cluster has 2 nodes x 2 = 4 GPUs."""
    total = sum(_amount(c, unit) for c in facts.capacities)
    if not is_short(groups, unit, total):
        return []
    uncounted = [
        _uncounted(node, capacity)
        for node, capacity in with_capacity(facts)
        if unit == "GPUs" and len(node.devices) > capacity.gpus
    ]
    added = f"add nodes (ray start --address=HEAD:6379 --num-{unit.lower()}=N)"
    fix = "; or ".join([*fixes(groups, unit, total), *uncounted, added])
    return [Finding("resources", "error", all_nodes(facts), _compared(facts, groups, unit), fix)]


def _uncounted(node: NodeFacts, capacity: NodeCapacity) -> str:
    return (
        f"on {node.name} nvidia-smi sees {len(node.devices)} GPUs and Ray counts {capacity.gpus:g}: "
        f"ray stop, then ray start with --num-gpus={len(node.devices)}"
    )


def _too_narrow(facts: ClusterFacts, group: WorkerGroup) -> list[Finding]:
    """A worker lives on one node, so the rest of each node cannot be added up."""
    fits = sum(group.fit(c.cpus, c.gpus) for c in facts.capacities)
    if fits >= group.workers:
        return []
    each = " and ".join(f"{per_worker(group, unit):g} {unit}" for unit in UNITS if per_worker(group, unit))
    rooms = " + ".join(f"{group.fit(c.cpus, c.gpus)} on {c.node}" for c in facts.capacities)
    what = (
        f"each of {group.workers} {group.what} needs {each} on one node; there is room for {rooms} = {fits}"
    )
    fix = (
        f"set {group.what}.workers={fits}"
        if fits
        else f"set {group.what}.cpus_per_worker (or gpus_per_worker) to what one node has"
    )
    return [Finding("resources", "error", all_nodes(facts), what, fix)]


def _compared(facts: ClusterFacts, groups: Sequence[WorkerGroup], unit: Unit) -> str:
    """Example: 2 learners x 1 = 2 GPUs, the cluster has 2 nodes x 2 = 4 GPUs."""
    return f"{demand(groups, unit)}, the cluster has {_supply(facts, unit)}"


def _supply(facts: ClusterFacts, unit: Unit) -> str:
    """Example: 2 nodes x 4 = 8 GPUs."""
    amounts = [_amount(c, unit) for c in facts.capacities]
    if not any(amounts):
        return f"no {unit}"
    if len(set(amounts)) == 1:
        terms = f"{counted(len(amounts), 'node')} x {amounts[0]:g}"
    else:
        terms = f"{counted(len(amounts), 'node')} with {' + '.join(f'{a:g}' for a in amounts)}"
    return f"{terms} = {sum(amounts):g} {unit}"


def _amount(capacity: NodeCapacity, unit: Unit) -> float:
    return capacity.cpus if unit == "CPUs" else capacity.gpus
