"""roles.Scorer on a cluster: all components of the reward at once, each where it can do no harm.

function   RewardActor -> a clean process of its own (rollout/rewards/sandbox.py), on the driver's node
model      RewardModelActor with the GPUs it is given
url        threads of the driver (rollout/rewards/http.py)

groups --each component in a thread: judge_batch--> {name: Judged} --combine--> Scoring
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

from orchestrator.cluster.actors import Share, made, outlive_sigterm, own_device
from orchestrator.cluster.joining import connect
from orchestrator.cluster.placement import Placement, named
from orchestrator.core.errors import NotEnoughResources, OrchestratorError, RewardsFailed
from orchestrator.core.rollouts import BatchRewards, RolloutGroup
from orchestrator.recipe.schema import Model, RewardFunction, Rewards
from orchestrator.rollout.rewards.combine import (
    ComponentRewards,
    check_any,
    score_with_retries,
    sum_components,
)
from orchestrator.rollout.rewards.component import Component, Outcome, RewardCall, RewardFailure
from orchestrator.rollout.rewards.http import HttpReward
from orchestrator.rollout.rewards.lookup import check_rewards
from orchestrator.rollout.rewards.sandbox import START_TIMEOUT_S, Confinement, Sandbox

LOAD_TIMEOUT_S = 600.0
"""For an actor to be placed and a reward model to be loaded."""

GRACE_S = 5.0
"""On top of a deadline that the other side keeps itself."""


class RewardActor:
    """Supervises the process of one reward function; it runs nothing of the user's itself."""

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
    """Holds one reward model, on the GPU where Ray gave it one."""

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
    """Seconds. start: from asking for an actor until it is ready; margin: that a call may take beyond its
    timeout."""

    start: float
    margin: float


class ActorComponent:
    """A component (rewards.Component) behind a Ray actor, which is killed when it is late and made anew when
    it is gone."""

    def __init__(self, name: str, make: Callable[[], Any], limits: _Limits) -> None:
        self.name, self.make, self.limits = name, make, limits
        self.actor: Any = None

    def start(self) -> Any:
        """Asks for an actor without waiting for it: the handle of its being ready."""
        self.actor = self.make()
        return self.actor.ready.remote()

    def await_ready(self, ready: Any) -> None:
        """NotEnoughResources where it was not placed or did not start in time; what is wrong with it else."""
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
            raise RewardFailure(
                f"reward {self.name}: its actor died at start", why=str(error).strip().splitlines()[0]
            ) from error

    def score(self, groups: Sequence[RolloutGroup], timeout_s: float) -> list[Outcome]:
        try:
            return ray.get(
                self._alive().score.remote(groups, timeout_s), timeout=timeout_s + self.limits.margin
            )
        except GetTimeoutError:
            why = f"it did not answer within {timeout_s + self.limits.margin:g} s and was ended"
        except RayTaskError as error:
            raise _cause(self.name, error) from error
        except RayActorError as error:
            why = f"its actor died: {str(error).strip().splitlines()[0]}"
        self.close(patience_s=0)
        raise RewardFailure(f"reward {self.name} failed", why=why)

    def _alive(self) -> Any:
        """The actor, made anew where it was ended."""
        if self.actor is None:
            try:
                self.await_ready(self.start())
            except OrchestratorError as error:  # it did start before: a failure of this call
                raise RewardFailure(
                    f"reward {self.name} could not be started again", why=error.what
                ) from error
        return self.actor

    def close(self, patience_s: float = GRACE_S) -> None:
        """Ends the actor; it may use `patience_s` to end its process, which ends itself too once the actor is
        gone."""
        actor, self.actor = self.actor, None
        if actor is None:
            return
        if patience_s:
            ray.wait([actor.close.remote()], timeout=patience_s)
        ray.kill(actor)


class RewardPool:
    """roles.Scorer: scores rollout batches with all components at once; a context manager that ends its
    actors.

    model_for_tokenizer: the policy, whose token ids reward models read where theirs is the same tokenizer;
    logs: the folder for what functions print (reward-NAME.log), None for nowhere. ConfigError, MissingInput
    or NotEnoughResources where a component cannot start.
    """

    def __init__(
        self,
        rewards: Rewards,
        *,
        model_for_tokenizer: Model | None,
        logs: Path | None,
        placed: Mapping[str, Placement] | None = None,
    ) -> None:
        """placed: of reward models with a GPU, by `reward NAME`, where the caller reserved them together with
        the run's other groups."""
        check_rewards(rewards)
        self.placed = placed or {}
        self.rewards, self.logs = rewards, logs.absolute() if logs is not None else None
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

    def score(self, groups: Sequence[RolloutGroup]) -> BatchRewards:
        """Rewards of a batch; RewardsFailed where more than rewards.max_dropped_fraction of its groups have
        none."""
        check_any(groups, self.rewards)
        if not groups:
            return BatchRewards(())
        return sum_components(groups, self.rewards, self._judge(groups))

    def close(self) -> None:
        for actor in self.actors:
            actor.close()
        self.threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _judge(self, groups: Sequence[RolloutGroup]) -> dict[str, ComponentRewards]:
        """Each component's word, by name."""
        timeout_s, retries = self.rewards.timeout_s, self.rewards.retries
        futures = {
            c.name: self.threads.submit(score_with_retries, c, groups, timeout_s=timeout_s, retries=retries)
            for c in self.components
        }
        margin = max((a.limits.start + a.limits.margin for a in self.actors), default=0.0) + GRACE_S
        patience = (retries + 1) * (timeout_s + margin)
        wait(futures.values(), timeout=patience)
        late = [name for name, future in futures.items() if not future.done()]
        if late:
            raise RewardsFailed(
                f"the rewards {', '.join(late)} did not come within {patience:.0f} s",
                why="every call and restart has a deadline of its own, and one was not kept",
                fix="look at logs/reward-NAME.log and the Ray logs; lower rewards.timeout_s or "
                "rewards.retries to be told earlier",
            )
        return {name: future.result() for name, future in futures.items()}

    def _component(self, function: RewardFunction) -> Component:
        if function.url is not None:
            rewards = self.rewards
            return HttpReward(
                function, batch_size=rewards.batch_size, environment=os.environ, retry=rewards.retries > 0
            )
        connect()
        actor = self._model(function) if function.model is not None else self._sandboxed(function)
        self.actors.append(actor)
        return actor

    def _sandboxed(self, function: RewardFunction) -> ActorComponent:
        """On this node, where the recipe's files and the run folder are; it takes no CPU from Ray's count."""
        log = self.logs / f"reward-{function.name}.log" if self.logs is not None else None
        confinement = Confinement.of(self.rewards, os.environ, log)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        kind = made(RewardActor, Share(cpus=0, gpus=0), strategy=here, name=f"reward-{function.name}")
        limits = _Limits(START_TIMEOUT_S, START_TIMEOUT_S + GRACE_S)
        return ActorComponent(
            function.name, lambda: named(lambda: kind.remote(function, confinement)), limits
        )

    def _model(self, function: RewardFunction) -> ActorComponent:
        has = ray.cluster_resources().get("GPU", 0.0)
        if function.gpus > has:
            raise NotEnoughResources(
                f"reward {function.name} asks for {function.gpus:g} GPUs, the cluster has {has:g}",
                fix="lower its gpus",
            )
        placed = self.placed.get(f"reward {function.name}")
        there = placed.at(0) if placed is not None else None
        kind = made(
            RewardModelActor,
            Share(cpus=0, gpus=function.gpus),
            strategy=there,
            name=f"reward-{function.name}",
        )
        rows = self.rewards.batch_size
        return ActorComponent(
            function.name,
            lambda: named(lambda: kind.remote(function, self.policy, rows)),
            _Limits(LOAD_TIMEOUT_S, 0.0),
        )


def _cause(name: str, error: RayTaskError) -> OrchestratorError:
    """What a user can read from what an actor raised."""
    if isinstance(error.cause, OrchestratorError):
        return error.cause
    last = str(error).strip().splitlines()[-1]
    return RewardFailure(f"reward {name} failed", why=last)
