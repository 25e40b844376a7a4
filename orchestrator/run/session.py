"""A recipe's workers behind a few verbs, for training loops of your own.

recipe --Session--> examples(step) | generate(step), with_advantages(groups, rewards)
                          |
                          v
                    forward_backward(examples, step) --> optim_step(step) --> save(folder)
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from orchestrator.cluster.in_process import LocalRank, LocalRollouts
from orchestrator.cluster.joining import connect, own_ray, store_for
from orchestrator.cluster.learner_group import LearnerGroup
from orchestrator.cluster.placement import reserved
from orchestrator.cluster.ranks import Ranks
from orchestrator.cluster.rollout_pool import RolloutPool
from orchestrator.cluster.weight_sync import make_weight_sync
from orchestrator.core.batches import SequenceGroup
from orchestrator.core.errors import ConfigError
from orchestrator.core.reports import LearnReport, StepApplied
from orchestrator.core.roles import Generator, WeightSync
from orchestrator.core.rollouts import RewardedGroup, RolloutGroup
from orchestrator.data.micro_batches import cut_step
from orchestrator.data.order import Batches
from orchestrator.learner.rank_learner import LearnerSpec
from orchestrator.recipe.schema import Recipe
from orchestrator.run import online
from orchestrator.run.planned_run import plan_run
from orchestrator.run.startup import Attach, attach_reference, learners_are_reference
from orchestrator.trainers.experience import make_experience, pairs
from orchestrator.trainers.two_pass import with_coefficients


class Session:
    """Workers that hold a recipe's model, as a context.

    The recipe decides model, data, loss, optimizer and effective batch. You decide the loop. Nothing is
    logged, checkpointed or restarted: `train` does that.
    """

    def __init__(self, recipe: Recipe, *, in_process: bool = False) -> None:
        """in_process: one worker, this process, without Ray: for breakpoints and notebooks."""
        recipe = recipe.in_one_process() if in_process else recipe
        self.planned = plan_run(recipe, Console(quiet=True), own_rewards=True)
        self.recipe, self.algorithm = self.planned.recipe, self.planned.algorithm
        if self.algorithm.online is not None and self.algorithm.online.critic:
            raise ConfigError(
                f"{self.algorithm.name} has a critic, which a session does not have",
                fix="choose e.g. algorithm.name=grpo, or use `orchestrator train`",
            )
        self.steps = self.planned.plan.total_steps
        """Optimizer steps of the recipe: what its learning-rate schedule counts."""
        self.cut = self.planned.plan.cut
        self.in_process = in_process
        self._stack = ExitStack()
        self._cursors = [0]

    def __enter__(self) -> "Session":
        """Starts the workers and loads the model."""
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the workers."""
        self._stack.close()

    def _start(self) -> None:
        self._generator: Generator | None = None
        self._weights: WeightSync | None = None
        placed: Mapping[str, Any] = {}
        if self.in_process:
            local = self._stack.enter_context(LocalRank(self.recipe.learners))
            self.learner: Ranks = local
        else:
            self._stack.enter_context(own_ray())
            connect(store_for(self.planned.store_bytes()))
            placed = self._stack.enter_context(
                reserved(self.planned.demands(), self.recipe.learners.start_timeout_s)
            )
            sizes, reservation = self.planned.sizes().all, placed["learners"]
            colocated = online.colocated_rollouts(self.recipe)
            self.learner = self._stack.enter_context(
                LearnerGroup(
                    self.recipe.learners, parameters=sizes, colocated=colocated, reservation=reservation
                )
            )
        if self.algorithm.online is None:
            self._attach = self._build_with_reference()
            return
        self._build()
        self._attach = online.live_reference(self.planned, self.learner)
        self._generator, self._weights = self._rollouts(placed)

    def _build(self) -> None:
        self.learner.build(LearnerSpec(self.recipe, self.cut, self.planned.schedule_steps))

    def _build_with_reference(self) -> Attach:
        """Builds the learners. Reference log-probs come from their start weights, or from `model.reference`,
        which is loaded before them."""
        built = learners_are_reference(self.recipe)
        if built:
            self._build()
        attach = attach_reference(
            self.recipe, self.algorithm, self.planned.data, self.cut, self.learner, _quiet, built=built
        )
        if not built:
            self._build()
        return attach

    def _rollouts(self, placed: Mapping[str, Any]) -> tuple[Generator, WeightSync]:
        if isinstance(self.learner, LocalRank):
            local = LocalRollouts(self.recipe, self.learner)
            return local, local
        assert isinstance(self.learner, LearnerGroup)
        reservation = online.rollout_reservation(placed)
        parameters = self.planned.sizes().all
        pool = self._stack.enter_context(
            RolloutPool(self.recipe, parameters=parameters, reservation=reservation)
        )
        return pool, make_weight_sync(self.recipe, self.learner, pool)

    # ---- verbs

    def examples(self, step: int) -> tuple[SequenceGroup, ...]:
        """The recipe's training examples of 0-based optimizer step `step`: one effective batch."""
        if self.algorithm.online is not None:
            raise ConfigError(
                f"{self.algorithm.name} learns from rollouts, not from rows",
                fix="call generate(step), and with_advantages(groups, rewards)",
            )
        return tuple(self._batch(self.planned.data.batches, step)[1])

    def forward_backward(self, examples: Sequence[SequenceGroup], step: int) -> LearnReport:
        """Adds the gradient of the recipe's loss over `examples`, however many: every sum is divided once by
        the count of all of them."""
        batch = self._attach(cut_step(examples, self.cut))
        if not self.algorithm.couples_batch:
            return self.learner.forward_backward(batch, step)
        precision = self.recipe.learners.precision
        batch, whole = with_coefficients(batch, self.learner, self.algorithm, step, precision)
        return whole.merged_into(self.learner.forward_backward(batch, step))

    def optim_step(self, step: int) -> StepApplied:
        """Clips and applies the gradient, with the learning rate of optimizer step `step`."""
        return self.learner.optim_step(step)

    def generate(self, step: int) -> tuple[RolloutGroup, ...]:
        """Completions of the prompts of rollout batch `step`, sampled with the present weights."""
        generator, weights = self._online()
        weights.publish(step)
        assert self.planned.prompts is not None
        cursor, prompts = self._batch(self.planned.prompts.batches, step)
        drawn = [(cursor + i, prompt) for i, prompt in enumerate(prompts)]
        return generator.start(drawn, online.sampling_of(self.recipe), step).result()

    def with_advantages(
        self, groups: Sequence[RolloutGroup], rewards: Sequence[Sequence[float]]
    ) -> tuple[SequenceGroup, ...]:
        """Training examples from completions and their rewards: rewards[g][k] of sample k of group g."""
        self._online()
        assert self.algorithm.online is not None
        if (given := [len(row) for row in rewards]) != (wanted := [len(g.rollouts) for g in groups]):
            raise ConfigError(
                f"{given} rewards for groups of {wanted} completions",
                fix="give rewards[g][k], a number for sample k of group g",
            )
        values = [np.asarray(row, np.float32) for row in rewards]
        rewarded = [RewardedGroup(group, row, {}) for group, row in zip(groups, values, strict=True)]
        if self.algorithm.online.advantage is None:
            return pairs(rewarded, values)
        inputs = online.experience_inputs(self.planned)
        made = make_experience(rewarded, values, self.algorithm, inputs, self.learner, None, self.cut)
        return made.groups

    def save(self, folder: str | Path) -> Path:
        """The model as a Hugging Face folder."""
        return self.learner.export(Path(folder), "")

    def _batch(self, batches: Batches[Any], step: int) -> tuple[int, Sequence[Any]]:
        """(cursor, batch) of a step. The last batch of an epoch may be smaller, so cursors are added up."""
        while len(self._cursors) <= step:
            self._cursors.append(self._cursors[-1] + len(batches.at(self._cursors[-1])))
        return self._cursors[step], batches.at(self._cursors[step])

    def _online(self) -> tuple[Generator, WeightSync]:
        if self._generator is None or self._weights is None:
            raise ConfigError(
                f"{self.algorithm.name} learns from rows, not from rollouts",
                fix="choose an online algorithm, e.g. algorithm.name=grpo, or call examples(step)",
            )
        return self._generator, self._weights


def _quiet(_: str) -> None:
    """Notes of the start-up have no reader here."""
