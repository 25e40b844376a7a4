"""roles.Scorer on a cluster: all components of the reward at the same time, each isolated from the run.

function   RewardActor -> its own clean process (rollout/rewards/sandbox.py), on the driver's node
model      RewardModelActor with the GPUs it is given
url        threads of the driver (rollout/rewards/http.py)

groups --a thread per component: score_with_retries--> {name: ComponentRewards}
       --sum_components--> BatchRewards
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.actors import ActorResources, actor_class, outlive_sigterm, own_device
from orchestrator.cluster.deadlines import REWARD_GRACE_S, REWARD_LOAD_S
from orchestrator.cluster.joining import connect
from orchestrator.cluster.placement import Reservation, create_named
from orchestrator.cluster.scorer import ComponentScorer
from orchestrator.core.errors import NotEnoughResources, OrchestratorError, RewardsFailed
from orchestrator.core.rollouts import RolloutGroup
from orchestrator.recipe.schema import Model, RewardFunction, Rewards
from orchestrator.rollout.rewards.combine import ComponentRewards, score_with_retries
from orchestrator.rollout.rewards.component import Component, Outcome, RewardCall, RewardFailure
from orchestrator.rollout.rewards.lookup import check_rewards
from orchestrator.rollout.rewards.sandbox import START_TIMEOUT_S, Confinement, Sandbox


class RewardActor:
    """Supervises the process of one reward function; it runs no user code itself."""

    def __init__(self, function: RewardFunction, confinement: Confinement) -> None:
        outlive_sigterm()
        self.sandbox = Sandbox(function, confinement)

    def ready(self) -> None:
        self.sandbox.start()

    def score(self, groups: Sequence[RolloutGroup], timeout_s: float) -> list[Outcome]:
        return self.sandbox.score(RewardCall.of(groups), timeout_s)

    def close(self) -> None:
        self.sandbox.close()


class RewardModelActor:
    """Holds one reward model, on the GPU that Ray gave it, else on the CPU."""

    def __init__(self, function: RewardFunction, policy: Model | None, batch_size: int) -> None:
        outlive_sigterm()
        self.function, self.policy, self.batch_size = function, policy, batch_size
        self.model: Any = None

    def ready(self) -> None:
        from orchestrator.rollout.rewards.reward_model import RewardModel

        self.model = RewardModel(
            self.function, policy=self.policy, batch_size=self.batch_size, device=own_device()
        )

    def score(self, groups: Sequence[RolloutGroup], timeout_s: float) -> list[Outcome]:
        return self.model.score(groups, timeout_s)

    def close(self) -> None:
        self.model = None


@dataclass(frozen=True, slots=True)
class _Limits:
    """Time limits of one component's actor."""

    start: float
    """Seconds from the request for an actor until it is ready."""
    margin: float
    """Seconds that a call may take beyond its timeout."""


class ActorComponent:
    """A component (rewards.Component) behind a Ray actor, which is killed when it is late and started again
    when it is gone."""

    def __init__(self, name: str, make: Callable[[], Any], limits: _Limits) -> None:
        self.name, self.make, self.limits = name, make, limits
        self.actor: Any = None

    def start(self) -> Any:
        """Requests an actor without waiting for it; the reference of its `ready`."""
        self.actor = self.make()
        return self.actor.ready.remote()

    def await_ready(self, ready: Any) -> None:
        """NotEnoughResources if the actor was not placed or did not start in time; else the error that it
        raised."""
        try:
            ray.get(ready, timeout=self.limits.start)
        except GetTimeoutError:
            self.close()
            raise NotEnoughResources(
                f"reward {self.name} was not ready within {self.limits.start:.0f} s",
                why="its actor found no free place, or its model takes longer to load",
                fix="free resources for it, or look at the Ray logs of its node",
            ) from None
        except RayTaskError as error:
            self.close()
            raise _cause(self.name, error) from error
        except RayActorError as error:
            self.close()
            why = str(error).strip().splitlines()[0]
            raise RewardFailure(f"reward {self.name}: its actor died at start", why=why) from error

    def score(self, groups: Sequence[RolloutGroup], timeout_s: float) -> list[Outcome]:
        limit = timeout_s + self.limits.margin
        try:
            return ray.get(self._running().score.remote(groups, timeout_s), timeout=limit)
        except GetTimeoutError:
            why = f"it did not answer within {limit:g} s and was ended"
        except RayTaskError as error:
            raise _cause(self.name, error) from error
        except RayActorError as error:
            why = f"its actor died: {str(error).strip().splitlines()[0]}"
        self.close(grace_s=0)
        raise RewardFailure(f"reward {self.name} failed", why=why)

    def _running(self) -> Any:
        """The actor, started again if it was ended."""
        if self.actor is None:
            try:
                self.await_ready(self.start())
            except OrchestratorError as error:  # it did start before, so this call failed, not the run
                what = f"reward {self.name} could not be started again"
                raise RewardFailure(what, why=error.what) from error
        return self.actor

    def close(self, grace_s: float = REWARD_GRACE_S) -> None:
        """Ends the actor. It may use `grace_s` to end its process, which also ends by itself once the actor
        is gone."""
        actor, self.actor = self.actor, None
        if actor is None:
            return
        if grace_s:
            ray.wait([actor.close.remote()], timeout=grace_s)
        ray.kill(actor)


class RewardPool(ComponentScorer):
    """Scores rollout batches with all components at the same time; a context manager that ends its actors.

    ConfigError, MissingInput or NotEnoughResources if a component cannot start.
    """

    def __init__(
        self,
        rewards: Rewards,
        *,
        model_for_tokenizer: Model | None,
        logs: Path | None,
        reservations: Mapping[str, Reservation] | None = None,
    ) -> None:
        """model_for_tokenizer: the policy. Reward models with the same tokenizer read its token ids.
        logs: folder for what functions print (reward-NAME.log); None discards it.
        reservations: of reward models with a GPU, by `reward NAME`, if the caller reserved them together with
        the run's other groups.
        """
        super().__init__(rewards)
        check_rewards(rewards)
        self.reservations = reservations or {}
        self.logs = logs.absolute() if logs is not None else None
        self.policy = model_for_tokenizer
        self.actors: list[ActorComponent] = []
        self.components: list[Component] = []
        self.threads = ThreadPoolExecutor(max(1, len(rewards.functions)), thread_name_prefix="reward")
        try:
            self.components = [self._component(function) for function in rewards.functions]
            pending = [(actor, actor.start()) for actor in self.actors]
            for actor, ready in pending:
                actor.await_ready(ready)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for actor in self.actors:
            actor.close()
        self.threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _component_rewards(self, groups: Sequence[RolloutGroup]) -> Mapping[str, ComponentRewards]:
        timeout_s, retries = self.rewards.timeout_s, self.rewards.retries
        futures = {
            c.name: self.threads.submit(score_with_retries, c, groups, timeout_s=timeout_s, retries=retries)
            for c in self.components
        }
        margin = max((a.limits.start + a.limits.margin for a in self.actors), default=0.0) + REWARD_GRACE_S
        limit = (retries + 1) * (timeout_s + margin)
        wait(futures.values(), timeout=limit)
        late = [name for name, future in futures.items() if not future.done()]
        if late:
            raise RewardsFailed(
                f"the rewards {', '.join(late)} did not come within {limit:.0f} s",
                why="every call and restart has its own deadline, and one was not kept",
                fix="look at logs/reward-NAME.log and the Ray logs; lower rewards.timeout_s or "
                "rewards.retries to get this error earlier",
            )
        return {name: future.result() for name, future in futures.items()}

    def _function(self, function: RewardFunction) -> Component:
        """On this node, where the recipe's files and the run folder are. It takes no CPU from Ray's count."""
        connect()
        log = self.logs / f"reward-{function.name}.log" if self.logs is not None else None
        confinement = Confinement.of(self.rewards, os.environ, log)
        own_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        kind = actor_class(
            RewardActor,
            ActorResources(cpus=0, gpus=0),
            strategy=own_node,
            name=f"reward-{function.name}",
        )
        limits = _Limits(START_TIMEOUT_S, START_TIMEOUT_S + REWARD_GRACE_S)
        return self._in_actor(function, lambda: kind.remote(function, confinement), limits)

    def _model(self, function: RewardFunction) -> Component:
        connect()
        has = ray.cluster_resources().get("GPU", 0.0)
        if function.gpus > has:
            raise NotEnoughResources(
                f"reward {function.name} asks for {function.gpus:g} GPUs, the cluster has {has:g}",
                fix="lower its gpus",
            )
        reservation = self.reservations.get(f"reward {function.name}")
        kind = actor_class(
            RewardModelActor,
            ActorResources(cpus=0, gpus=function.gpus),
            strategy=reservation.at(0) if reservation is not None else None,
            name=f"reward-{function.name}",
        )
        rows = self.rewards.batch_size
        limits = _Limits(REWARD_LOAD_S, 0.0)
        return self._in_actor(function, lambda: kind.remote(function, self.policy, rows), limits)

    def _in_actor(self, function: RewardFunction, make: Callable[[], Any], limits: _Limits) -> Component:
        actor = ActorComponent(function.name, lambda: create_named(make), limits)
        self.actors.append(actor)
        return actor


def _cause(name: str, error: RayTaskError) -> OrchestratorError:
    """The error for the user, from what an actor raised."""
    if isinstance(error.cause, OrchestratorError):
        return error.cause
    last = str(error).strip().splitlines()[-1]
    return RewardFailure(f"reward {name} failed", why=last)
