"""roles.Scorer: the components of a reward by their kind, and how their parts are added up.

reward_pool.py gives each component of a run its own process; in_process.py calls them in this process. A URL
is called from this process by both.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from orchestrator.core.rollouts import BatchRewards, RolloutGroup
from orchestrator.recipe.schema import RewardFunction, Rewards
from orchestrator.rollout.rewards.combine import ComponentRewards, check_any, sum_components
from orchestrator.rollout.rewards.component import Component
from orchestrator.rollout.rewards.http import HttpReward


class ComponentScorer(ABC):
    """Scores batches with the components of a recipe. `components` is set by the subclass."""

    components: Sequence[Component]

    def __init__(self, rewards: Rewards) -> None:
        self.rewards = rewards

    def score(self, groups: Sequence[RolloutGroup]) -> BatchRewards:
        """Rewards of a batch. RewardsFailed if more than rewards.max_dropped_fraction of its groups have
        none."""
        check_any(groups, self.rewards)
        if not groups:
            return BatchRewards(())
        return sum_components(groups, self.rewards, self._component_rewards(groups))

    def _component(self, function: RewardFunction) -> Component:
        """The component of one entry of rewards.functions."""
        if function.url is not None:
            return HttpReward(
                function,
                batch_size=self.rewards.batch_size,
                environment=os.environ,
                retry=self.rewards.retries > 0,
            )
        return self._model(function) if function.model is not None else self._function(function)

    @abstractmethod
    def _model(self, function: RewardFunction) -> Component:
        """A reward model."""

    @abstractmethod
    def _function(self, function: RewardFunction) -> Component:
        """A Python function."""

    @abstractmethod
    def _component_rewards(self, groups: Sequence[RolloutGroup]) -> Mapping[str, ComponentRewards]:
        """Rewards of every component, by its name."""
