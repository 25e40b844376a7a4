"""Whether a cluster has the CPUs and GPUs that worker groups ask for, and the one text that reports it if
not.

The check before a start (below), and the doctor's (doctor/check_workers.py), use the same arithmetic.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Literal

import ray

from orchestrator.cluster.joining import connect, named_cluster
from orchestrator.core.errors import NotEnoughResources
from orchestrator.core.resources import SLACK, WorkerGroup, times
from orchestrator.plan.hardware import visible_gpus

Unit = Literal["CPUs", "GPUs"]
UNITS: tuple[Unit, ...] = ("CPUs", "GPUs")
RAY_NAMES: dict[Unit, str] = {"CPUs": "CPU", "GPUs": "GPU"}


def check_capacity(groups: Sequence[WorkerGroup]) -> None:
    """NotEnoughResources if the cluster cannot hold the workers. If it is this machine, that is known before
    Ray starts."""
    if not ray.is_initialized() and named_cluster() is None:
        gpus = float(len(visible_gpus())) if any(g.gpus for g in groups) else 0.0
        check_totals(groups, {"CPU": float(os.cpu_count() or 1), "GPU": gpus})
        return
    connect()
    check_totals(groups, ray.cluster_resources())


def check_totals(groups: Sequence[WorkerGroup], total: Mapping[str, float]) -> None:
    """NotEnoughResources if the groups ask for more than `total`, by Ray's names CPU and GPU."""
    for unit in UNITS:
        has = total.get(RAY_NAMES[unit], 0.0)
        if is_short(groups, unit, has):
            what = f"{demand(groups, unit)}, the cluster has {has:g} {unit}"
            raise NotEnoughResources(what, fix="; or ".join(fixes(groups, unit, has)))


def is_short(groups: Sequence[WorkerGroup], unit: Unit, has: float) -> bool:
    """Whether the groups together ask for more than there is."""
    return has + SLACK < needed(groups, unit)


def fixes(groups: Sequence[WorkerGroup], unit: Unit, has: float) -> list[str]:
    """Edits of the recipe that make its first group fit beside the others."""
    first, *others = asking(groups, unit)
    if first.what.startswith("reward "):
        return [f"lower `gpus` of {first.what} in rewards.functions"]
    rest = has - needed(others, unit)
    workers = times(rest, per_worker(first, unit))
    per = "gpus_per_worker" if unit == "GPUs" else "cpus_per_worker"
    edits = [f"set {first.what}.workers={workers}"] if workers > 0 else []
    if unit == "CPUs" and rest > 0:
        edits.append(f"set {first.what}.{per}={rest / first.workers:.2g}")
    if not has:
        edits.append(f"set {first.what}.{per}=0 to train on CPUs")
    return edits or [f"set fewer workers, or a lower {per}, of {', '.join(g.what for g in (first, *others))}"]


def demand(groups: Sequence[WorkerGroup], unit: Unit) -> str:
    """Example: 8 learners x 1 + 2 rollouts x 1 = 10 GPUs."""
    terms = (f"{g.workers} {g.what} x {per_worker(g, unit):g}" for g in asking(groups, unit))
    return f"{' + '.join(terms)} = {needed(groups, unit):g} {unit}"


def asking(groups: Sequence[WorkerGroup], unit: Unit) -> list[WorkerGroup]:
    """The groups whose workers need some of the unit."""
    return [g for g in groups if per_worker(g, unit)]


def needed(groups: Sequence[WorkerGroup], unit: Unit) -> float:
    return sum(g.workers * per_worker(g, unit) for g in groups)


def per_worker(group: WorkerGroup, unit: Unit) -> float:
    return group.cpus if unit == "CPUs" else group.gpus
