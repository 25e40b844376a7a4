"""Where workers live: one placement group for all worker groups of a run."""

import os
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

from orchestrator.cluster.actors import Share, made
from orchestrator.cluster.joining import connect, named_cluster
from orchestrator.core.errors import ConfigError, NotEnoughResources
from orchestrator.core.resources import SLACK, WorkerGroup, times
from orchestrator.plan.hardware import visible_gpus
from orchestrator.recipe.schema import Learners, Recipe, Rollouts

NAME_FREE_S = 60.0
"""Until a killed actor's name is free again; where its node is lost, Ray has to notice that first."""


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
        groups.append(
            WorkerGroup(
                "critic", recipe.critic.workers, recipe.critic.cpus_per_worker, recipe.critic.gpus_per_worker
            )
        )
    if rollouts and not together:
        groups.append(WorkerGroup("rollouts", actors.count, actors.cpus_per_worker, actors.gpus))
    return tuple(groups)


def learner_demand(learners: Learners, colocated: Rollouts | None = None) -> WorkerGroup:
    """The learners' own, with a rollout actor in each bundle where they are colocated."""
    cpus, gpus = (colocated.cpus_per_worker, colocated.gpus) if colocated else (0.0, 0.0)
    return WorkerGroup("learners", learners.count, learners.cpus_per_worker + cpus, learners.gpus + gpus)


@contextmanager
def reserved(groups: Sequence[WorkerGroup], timeout_s: float) -> Iterator[dict[str, "Placement"]]:
    """All worker groups of a run by name, all or nothing: of two runs that come at once on a cluster with
    room for one, one waits with nothing. NotEnoughResources after timeout_s seconds, or at once where the
    cluster cannot hold them."""
    whole = _reserve(groups, timeout_s)
    try:
        firsts = [sum(g.workers for g in groups[:i]) for i in range(len(groups))]
        yield {g.what: Placement(whole, first) for g, first in zip(groups, firsts, strict=True)}
    finally:
        remove_placement_group(whole)


def _reserve(groups: Sequence[WorkerGroup], timeout_s: float) -> PlacementGroup:
    connect()
    _check_capacity(groups, ray.cluster_resources())
    bundles = [_bundle(g) for g in groups for _ in range(g.workers)]
    whole = placement_group([dict(b) for b in bundles], strategy="PACK")
    try:
        if whole.wait(timeout_s):  # not ready(): that is a task, which needs a worker process of its own
            return whole
    except BaseException:
        remove_placement_group(whole)
        raise
    remove_placement_group(whole)
    wanted = " + ".join(f"{g.workers} {g.what} x {_words(_bundle(g))}" for g in groups)
    asked = {name: 0.0 for b in bundles for name in b}
    raise NotEnoughResources(
        f"{wanted} were not free {'together ' if len(groups) > 1 else ''}within {timeout_s:.0f} s",
        why=f"free now: {_words(_of_interest(ray.available_resources(), asked))}",
        fix=f"wait for the other jobs, ask for fewer {groups[0].what}.workers, or raise "
        "learners.start_timeout_s",
    )


@dataclass(frozen=True, slots=True)
class Placement:
    """The reserved resources of one worker group: a bundle per worker, from the bundle `first` on."""

    group: PlacementGroup
    first: int = 0

    @classmethod
    def reserve(cls, demand: WorkerGroup, timeout_s: float) -> "Placement":
        """Reserves a bundle per worker of one group; `release` gives them back. Raises as `reserved`."""
        return cls(_reserve([demand], timeout_s))

    def at(self, rank: int) -> PlacementGroupSchedulingStrategy:
        """The bundle of `rank`."""
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.first + rank)

    def start(self, kind: type, rank: int, *arguments: Any, name: str, share: Share) -> Any:
        """An actor in the bundle of `rank`, taking its part of it. name: role and rank, as Ray's dashboard
        shows it."""
        actor = made(kind, share, strategy=self.at(rank), name=name)
        return named(lambda: actor.remote(*arguments))

    def threads(self, rank: int, cpus: float, gpus: float) -> int:
        """With which a worker in the bundle of `rank` computes on the CPU: one per CPU of its own, and on a
        GPU its share of the node's, since a node with GPUs has idle CPUs beside them. Loading, hashing and
        offloaded AdamW wait for them."""
        own = max(1, int(cpus))
        if not gpus:
            return own
        node = placement_group_table(self.group)["bundles_to_node_id"][self.first + rank]
        (has,) = (n["Resources"] for n in ray.nodes() if n["NodeID"] == node)
        return max(own, int(has.get("CPU", 0.0) * gpus / has["GPU"]))

    def release(self) -> None:
        remove_placement_group(self.group)


def named(create: Callable[[], Any]) -> Any:
    """Makes an actor that has a name. Ray gives the name of a killed one free a moment later, so it may take
    a few tries."""
    deadline = time.monotonic() + NAME_FREE_S
    while True:
        try:
            return create()
        except ActorAlreadyExistsError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def check_capacity(groups: Sequence[WorkerGroup]) -> None:
    """NotEnoughResources where the cluster cannot hold the workers; told before Ray starts where that is this
    machine."""
    if not ray.is_initialized() and named_cluster() is None:
        gpus = any(g.gpus for g in groups)
        _check_capacity(
            groups, {"CPU": float(os.cpu_count() or 1), "GPU": float(len(visible_gpus())) if gpus else 0.0}
        )
        return
    connect()
    _check_capacity(groups, ray.cluster_resources())


def _check_capacity(groups: Sequence[WorkerGroup], total: Mapping[str, float]) -> None:
    for resource in ("CPU", "GPU"):
        asking = [g for g in groups if _bundle(g).get(resource)]
        needed, has = sum(g.workers * _bundle(g)[resource] for g in asking), total.get(resource, 0.0)
        if has + SLACK < needed:
            raise _too_few(asking, resource, needed, has)


def _too_few(groups: Sequence[WorkerGroup], resource: str, needed: float, has: float) -> NotEnoughResources:
    if len(groups) > 1:
        words = " + ".join(f"{g.workers} {g.what} x {_bundle(g)[resource]:g}" for g in groups)
        fix = (
            f"fewer workers, or a smaller {'cpus' if resource == 'CPU' else 'gpus'}_per_worker of "
            f"{', '.join(g.what for g in groups)}"
        )
        return NotEnoughResources(f"the cluster has {has:g} {resource}s, {words} need {needed:g}", fix=fix)
    (group,) = groups
    each = _bundle(group)[resource]
    fix = f"set {group.what}.workers to {times(has, each)} or fewer"
    if resource == "CPU" and has:
        fix += f", or {group.what}.cpus_per_worker={has / group.workers:.2g}"
    return NotEnoughResources(
        f"the cluster has {has:g} {resource}s, {group.workers} workers x {each:g} need {needed:g}", fix=fix
    )


def _bundle(group: WorkerGroup) -> dict[str, float]:
    """What one worker takes, in Ray's words."""
    return {name: amount for name, amount in (("CPU", group.cpus), ("GPU", group.gpus)) if amount}


def _of_interest(resources: Mapping[str, float], bundle: Mapping[str, float]) -> dict[str, float]:
    return {name: resources.get(name, 0.0) for name in bundle}


def _words(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
