"""Where workers live: one placement group for all worker groups of a run.

A placement group of Ray is a list of bundles, each a set of resources on one node. Every worker has its own
bundle; all bundles of a run are reserved together.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.cluster.actors import ActorResources, actor_class
from orchestrator.cluster.capacity import check_totals
from orchestrator.cluster.deadlines import NAME_FREE_S
from orchestrator.cluster.joining import connect
from orchestrator.core.errors import ConfigError, NotEnoughResources
from orchestrator.core.resources import WorkerGroup
from orchestrator.recipe.schema import Learners, Recipe, Rollouts


def demands(recipe: Recipe, *, critic: bool, rollouts: bool) -> tuple[WorkerGroup, ...]:
    """All worker groups of a run. Colocated rollout actors are part of the learners' bundles."""
    learners, actors = recipe.learners, recipe.rollouts
    together = rollouts and actors.placement == "colocated"
    if together and actors.count != learners.count:
        raise ConfigError(
            f"rollouts.placement=colocated needs as many rollouts.workers ({actors.count}) as "
            f"learners.workers ({learners.count})",
            why="actor i shares the bundle of learner worker i",
            fix=f"set rollouts.workers={learners.count}, or rollouts.placement=separate",
        )
    groups = [learner_demand(learners, actors if together else None)]
    if critic:
        own = recipe.critic
        groups.append(WorkerGroup("critic", own.workers, own.cpus_per_worker, own.gpus_per_worker))
    if rollouts and not together:
        groups.append(WorkerGroup("rollouts", actors.count, actors.cpus_per_worker, actors.gpus))
    return tuple(groups)


def learner_demand(learners: Learners, colocated: Rollouts | None = None) -> WorkerGroup:
    """The learners' group, with room for a rollout actor in each bundle if they are colocated."""
    cpus, gpus = (colocated.cpus_per_worker, colocated.gpus) if colocated else (0.0, 0.0)
    return WorkerGroup("learners", learners.count, learners.cpus_per_worker + cpus, learners.gpus + gpus)


@contextmanager
def reserved(groups: Sequence[WorkerGroup], timeout_s: float) -> Iterator[dict[str, "Reservation"]]:
    """Reservations of all worker groups of a run by name, all or nothing.

    So of two runs that come at the same time to a cluster with room for one, the second waits and holds
    nothing. NotEnoughResources after timeout_s seconds, or immediately if the cluster cannot hold them.
    """
    bundles = _reserve(groups, timeout_s)
    try:
        firsts = [sum(g.workers for g in groups[:i]) for i in range(len(groups))]
        yield {g.what: Reservation(bundles, first) for g, first in zip(groups, firsts, strict=True)}
    finally:
        remove_placement_group(bundles)


def _reserve(groups: Sequence[WorkerGroup], timeout_s: float) -> PlacementGroup:
    connect()
    check_totals(groups, ray.cluster_resources())
    resources = [_bundle(g) for g in groups for _ in range(g.workers)]
    bundles = placement_group([dict(b) for b in resources], strategy="PACK")
    try:
        if bundles.wait(timeout_s):  # not ready(): that is a task, which needs its own worker process
            return bundles
    except BaseException:
        remove_placement_group(bundles)
        raise
    remove_placement_group(bundles)
    wanted = " + ".join(f"{g.workers} {g.what} x {_described(_bundle(g))}" for g in groups)
    available = ray.available_resources()
    free = {name: available.get(name, 0.0) for b in resources for name in b}
    raise NotEnoughResources(
        f"{wanted} were not free {'together ' if len(groups) > 1 else ''}within {timeout_s:.0f} s",
        why=f"free now: {_described(free)}",
        fix=f"wait for the other jobs, ask for fewer {groups[0].what}.workers, or raise "
        "learners.start_timeout_s",
    )


@dataclass(frozen=True, slots=True)
class Reservation:
    """The reserved resources of one worker group, a bundle per worker."""

    group: PlacementGroup
    """The bundles of all groups that were reserved together."""
    first: int = 0
    """Index of this group's first bundle."""

    @classmethod
    def reserve(cls, demand: WorkerGroup, timeout_s: float) -> "Reservation":
        """Reserves a bundle per worker of one group; `release` gives them back. Raises as `reserved`."""
        return cls(_reserve([demand], timeout_s))

    def at(self, rank: int) -> PlacementGroupSchedulingStrategy:
        """Ray's strategy that places an actor in the bundle of `rank`."""
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.first + rank)

    def start(self, kind: type, rank: int, *arguments: Any, name: str, resources: ActorResources) -> Any:
        """Starts an actor in the bundle of `rank`, of which it takes `resources`.

        name: role and rank, as Ray's dashboard shows it.
        """
        actor = actor_class(kind, resources, strategy=self.at(rank), name=name)
        return create_named(lambda: actor.remote(*arguments))

    def threads(self, rank: int, cpus: float, gpus: float) -> int:
        """Threads with which a worker in the bundle of `rank` computes on the CPU.

        One per CPU of its own. A worker on a GPU gets its GPU's share of the node's CPUs, since a node with
        GPUs has idle CPUs beside them; loading, hashing and offloaded AdamW wait for them.
        """
        own = max(1, int(cpus))
        if not gpus:
            return own
        node = placement_group_table(self.group)["bundles_to_node_id"][self.first + rank]
        (has,) = (n["Resources"] for n in ray.nodes() if n["NodeID"] == node)
        return max(own, int(has.get("CPU", 0.0) * gpus / has["GPU"]))

    def release(self) -> None:
        remove_placement_group(self.group)


def create_named(create: Callable[[], Any]) -> Any:
    """Makes an actor that has a name.

    Ray frees the name of a killed actor a moment later, so this may take a few attempts.
    """
    deadline = time.monotonic() + NAME_FREE_S
    while True:
        try:
            return create()
        except ActorAlreadyExistsError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _bundle(group: WorkerGroup) -> dict[str, float]:
    """Resources of one worker, by Ray's names."""
    return {name: amount for name, amount in (("CPU", group.cpus), ("GPU", group.gpus)) if amount}


def _described(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
