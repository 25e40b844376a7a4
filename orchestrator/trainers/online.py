"""The online loop: PPO, GRPO and their family, and online DPO.

prompts --generator--> groups --scorer--> rewards --experience--> mini-batches --policy, critic--> new version --publish--+
   ^          ^                                                                                                           |
   |          +------------------------- at most max_staleness versions ahead of learning --------------------------------+
   +-- consumed cursor: what was in flight is sampled again after a resume
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.algorithms.losses.kl import adapt
from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.batches import Floats, SequenceGroup
from orchestrator.core.errors import OrchestratorError
from orchestrator.core.reports import Progress, StepReport
from orchestrator.core.roles import Checkpoints, Generator, Learner, Pending, Reporter, Scorer, WeightSync
from orchestrator.core.rollouts import Prompt, RewardedGroup, RolloutBatch, Sampling, WeightsDelivered
from orchestrator.core.stopping import Stop
from orchestrator.data.order import Batches, permutation
from orchestrator.observe.timeline import Timeline
from orchestrator.recipe.schema import Kl
from orchestrator.trainers.cadence import AfterSteps
from orchestrator.trainers.experience import (
    ExperienceInputs,
    TrainingData,
    has_signal,
    make_experience,
    pairs,
)
from orchestrator.trainers.online_evaluation import RolloutEvaluator
from orchestrator.trainers.online_metrics import batch_metrics, samples_of, summarise_steps
from orchestrator.trainers.optimizer_step import Clock, OptimizerStepper, StepOutcome


@dataclass(frozen=True, slots=True)
class OnlinePlan:
    """What the loop has to know. A step is one rollout batch; total_steps counts them.

    dropout: the learner's network drops features that the generator's has: who sampled a token is then the
    learner without dropout. mini_batch: groups (or pairs) of one optimizer step; optimizer_steps: of a full
    rollout batch; alarm: mean gap in nat between the generator's and the learner's log-probs above which a
    note is written; sources: names of the prompts' sources.
    """

    algorithm: AlgorithmSpec
    seed: int
    total_steps: int
    mini_batch: int
    epochs: int
    optimizer_steps: int
    sampling: Sampling
    dropout: bool
    max_staleness: int
    max_resampled: int
    mask_truncated: bool
    kl: Kl
    alarm: float
    normalise_rewards: bool
    critic_warmup: int
    evaluate_every: int | None
    evaluate_at_start: bool
    save_every: int | None
    save_after_s: float | None = None
    evaluated: bool = False
    sources: tuple[str, ...] = ()

    @property
    def needs(self) -> ExperienceInputs:
        in_reward = self.kl.place == "reward" and self.kl.coefficient > 0
        estimator = (
            ("k1" if self.kl.place == "reward" else "k3")
            if self.kl.estimator == "auto"
            else self.kl.estimator
        )
        old = self.optimizer_steps > 1 or in_reward or self.kl.target is not None or self.dropout
        return ExperienceInputs(
            old, self.algorithm.needs_reference, self.kl.coefficient if in_reward else 0.0, estimator
        )


@dataclass(frozen=True, slots=True)
class TrainedRoles:
    """Who learns: the policy, and PPO's critic."""

    policy: OptimizerStepper
    critic: OptimizerStepper | None = None

    @property
    def critic_learner(self) -> Learner | None:
        return None if self.critic is None else self.critic.learner


class OnlineTrainer:
    """Runs the loop."""

    def __init__(
        self,
        plan: OnlinePlan,
        learning: TrainedRoles,
        prompts: Batches[Prompt],
        generator: Generator,
        scorer: Scorer,
        weights: WeightSync,
        evaluator: RolloutEvaluator,
        report: Reporter,
        checkpoints: Checkpoints,
        timeline: Timeline,
        stop: Stop,
    ) -> None:
        self.plan, self.learning, self.prompts, self.generator = plan, learning, prompts, generator
        self.scorer, self.weights, self.evaluator = scorer, weights, evaluator
        self.report, self.checkpoints, self.timeline, self.stop = report, checkpoints, timeline, stop
        self.after = AfterSteps(plan, self._evaluate, checkpoints, stop)
        self.in_flight: deque[tuple[int, Pending]] = deque()
        self.next_prompt = 0

    def run(self) -> Progress:
        """Trains to the plan's last step and returns where it ended."""
        plan, progress = self.plan, self.checkpoints.restore()
        self.next_prompt = progress.examples
        self.weights.publish(progress.step)
        with self.stop.deferred("training"):
            return self._steps(plan, progress)

    def _steps(self, plan: OnlinePlan, progress: Progress) -> Progress:
        self.after.begin(progress)
        while progress.step < plan.total_steps:
            clock = Clock()
            batch = self._collect(progress, clock)
            taken, progress = self._learn(batch, progress, clock)
            with clock.phase("publish"):
                delivered = self.weights.publish(progress.step)
            self._report(progress, batch, taken, delivered, clock)
            self.after.step(progress)
        return progress

    # ---- rollouts

    def _collect(self, progress: Progress, clock: Clock) -> RolloutBatch:
        """A scored rollout batch; with dynamic sampling as many prompts more as it takes to fill it with
        groups that teach.

        Where they do not suffice, groups without signal fill it up: they count in what the loss is divided
        by, so that an optimizer step is of the effective batch all the same. Where no group teaches at all
        there is nothing to learn from, and no step is taken.
        """
        plan = self.plan
        batch = self._next(progress, clock)
        if plan.algorithm.online is None or not plan.algorithm.online.dynamic_sampling:
            return batch
        useful = [g for g in batch.rewarded if has_signal(g)]
        for _ in range(plan.max_resampled):
            if len(useful) >= batch.wanted:
                break
            more = self._next(progress, clock)
            useful += [g for g in more.rewarded if has_signal(g)]
            batch = batch.joined(more)
        taught = useful[: batch.wanted]
        rest = [g for g in batch.rewarded if not has_signal(g)][: batch.wanted - len(taught)]
        if rest:
            self._say_starved(progress.step + 1, len(taught), batch)
        return replace(batch, learned_from=(*taught, *rest) if taught else ())

    def _say_starved(self, step: int, taught: int, batch: RolloutBatch) -> None:
        drawn = (
            f"{taught} of the {batch.wanted} groups that a step wants have rewards that differ, of "
            f"{batch.prompts} prompts drawn"
        )
        what = "the others fill it up and teach nothing" if taught else "no optimizer step is taken"
        self.report.note(
            f"warning: step {step}: dynamic sampling found {drawn}; {what}. Raise algorithm.max_resampled, "
            "or give other prompts"
        )

    def _next(self, progress: Progress, clock: Clock) -> RolloutBatch:
        """Tops up what is in flight, waits for the oldest batch of it and has it scored."""
        with clock.phase("generate"):
            ahead = min(self.plan.max_staleness + 1, self.plan.total_steps - progress.step)
            while len(self.in_flight) < ahead:
                self._start(progress.step)
            count, pending = self.in_flight.popleft()
            groups = pending.result()
        stale = [progress.step - r.version for g in groups for r in g.rollouts]
        if max(stale) > self.plan.max_staleness or min(stale) < 0:
            raise OrchestratorError(
                f"a rollout of version {progress.step - max(stale)} reached the learner at version "
                f"{progress.step}",
                why=f"rollouts.max_staleness is {self.plan.max_staleness}",
                fix="this is a bug: report it with logs/ of the run",
            )
        with clock.phase("score"):
            scoring = self.scorer.score(groups)
        for reason in scoring.dropped:
            self.report.note(f"step {progress.step + 1}: group dropped, no reward: {reason}")
        return RolloutBatch(count, groups, scoring, scoring.groups, len(groups))

    def _start(self, version: int) -> None:
        prompts = self.prompts.at(self.next_prompt)
        drawn = [(self.next_prompt + i, prompt) for i, prompt in enumerate(prompts)]
        self.next_prompt += len(prompts)
        self.in_flight.append((len(prompts), self.generator.start(drawn, self.plan.sampling, version)))

    # ---- learning

    def _learn(
        self, batch: RolloutBatch, progress: Progress, clock: Clock
    ) -> tuple[list[tuple[StepOutcome | None, StepOutcome | None]], Progress]:
        """All optimizer steps from one rollout batch: (policy's, critic's) each."""
        plan = self.plan
        rewards, progress = self._rewards(batch.learned_from, progress)
        coefficient = progress.kl_coefficient if progress.kl_coefficient is not None else plan.kl.coefficient
        with clock.phase("experience"):
            made = self._training_data(batch.learned_from, rewards, coefficient)
        in_loss = coefficient if plan.kl.place == "loss" and plan.kl.target is not None else None
        taken, at = [], progress.optimizer_steps
        for groups in self._mini_batches(made.groups, progress.step):
            critic = None if self.learning.critic is None else self.learning.critic.step(groups, at, clock)
            policy = None
            if progress.step >= plan.critic_warmup:
                policy = self.learning.policy.step(groups, at, clock, kl_coefficient=in_loss)
            taken.append((policy, critic))
            at += 1
        if plan.kl.target is not None and made.kl is not None:
            rollouts = sum(len(g.group.rollouts) for g in batch.learned_from)
            progress = replace(
                progress,
                kl_coefficient=adapt(coefficient, made.kl, plan.kl.target, plan.kl.horizon, rollouts),
            )
        refused = sum(t is not None and t.applied is None for pair in taken for t in pair)
        return taken, replace(
            progress,
            step=progress.step + 1,
            examples=progress.examples + batch.prompts,
            tokens=progress.tokens + batch.tokens,
            optimizer_steps=at,
            skipped=progress.skipped + refused,
        )

    def _training_data(
        self, groups: Sequence[RewardedGroup], rewards: Sequence[Floats], coefficient: float
    ) -> TrainingData:
        plan = self.plan
        assert plan.algorithm.online is not None
        if not groups:
            return TrainingData((), None)
        if plan.algorithm.online.advantage is None:
            return TrainingData(pairs(groups, rewards), None)
        needs = replace(plan.needs, penalty=coefficient) if plan.needs.penalty else plan.needs
        policy, critic = self.learning.policy, self.learning.critic_learner
        return make_experience(
            groups,
            rewards,
            plan.algorithm,
            needs,
            policy.learner,
            critic,
            policy.cut,
            mask_truncated=plan.mask_truncated,
        )

    def _mini_batches(self, groups: Sequence[SequenceGroup], step: int) -> Iterator[list[SequenceGroup]]:
        """Epochs x mini-batches, in an order that is a function of (seed, step, epoch)."""
        for epoch in range(self.plan.epochs):
            order = permutation(len(groups), self.plan.seed, step, epoch, 3)
            for first in range(0, len(groups), self.plan.mini_batch):
                yield [groups[i] for i in order[first : first + self.plan.mini_batch]]

    def _rewards(self, groups: Sequence[RewardedGroup], progress: Progress) -> tuple[list[Floats], Progress]:
        """Rewards as the estimator sees them; with normalisation divided by the deviation of all rewards so
        far (Welford)."""
        if not self.plan.normalise_rewards or not groups:
            return [g.rewards for g in groups], progress
        values = np.concatenate([g.rewards for g in groups]).astype(np.float64)
        count, mean = progress.reward_count + len(values), progress.reward_mean
        shift = float(values.mean()) - mean
        m2 = (
            progress.reward_m2
            + float(values.var()) * len(values)
            + shift**2 * progress.reward_count * len(values) / count
        )
        deviation = max(1e-6, float(np.sqrt(m2 / max(1, count - 1))))
        progress = replace(
            progress, reward_count=count, reward_mean=mean + shift * len(values) / count, reward_m2=m2
        )
        return [(g.rewards / deviation).astype(np.float32) for g in groups], progress

    # ---- what is seen of it

    def _report(
        self,
        progress: Progress,
        batch: RolloutBatch,
        taken: Sequence[tuple[StepOutcome | None, StepOutcome | None]],
        delivered: WeightsDelivered,
        clock: Clock,
    ) -> None:
        policy = summarise_steps([p for p, _ in taken if p is not None])
        critic = summarise_steps([c for _, c in taken if c is not None])
        spans = self.generator.spans()
        metrics = batch_metrics(
            progress, batch, policy, critic, delivered, clock.phases, clock.spans, spans, self.plan.sources
        )
        gap = metrics.get("policy/train_rollout_gap", 0.0)
        if self.plan.max_staleness == 0 and gap > self.plan.alarm:
            self.report.note(
                f"warning: step {progress.step}: the generator's log-probs are {gap:.3f} nat per token from "
                "the learner's, though strictly "
                "on-policy: its weights are other ones, or its kernels (precision, attention, a fused head) "
                "compute otherwise"
            )
        self.report.step(StepReport(progress.step, metrics, samples_of(batch, progress.step)))
        self.timeline.step(progress.step, clock.spans, spans)

    def _evaluate(self, step: int) -> None:
        report = self.evaluator.evaluate(step)
        if report.metrics:  # none without data.eval
            self.report.evaluation(report)
