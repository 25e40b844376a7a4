"""The online loop: PPO, GRPO and their family, and online DPO.

prompts --generator--> groups --scorer--> rewards --experience--> mini-batches --policy, critic--> version
   ^          ^                                                                                       |
   |          +---- publish: at most max_staleness versions ahead of learning ------------------------+
   |
   +-- cursor of consumed prompts: a resumed run samples again what was in flight
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
    """What the loop needs to know. A step is one rollout batch. `Cadence` describes the schedule."""

    algorithm: AlgorithmSpec
    seed: int
    total_steps: int
    """Rollout batches of the run."""
    mini_batch: int
    """Groups (or pairs) of one optimizer step."""
    epochs: int
    """Passes over a rollout batch."""
    optimizer_steps: int
    """Optimizer steps from a full rollout batch."""
    sampling: Sampling
    dropout: bool
    """The learner drops features that the generator keeps: old log-probs are those without dropout."""
    max_staleness: int
    """Most versions that a rollout may be behind the learner."""
    max_resampled: int
    """Most further rollout batches of a step with dynamic sampling."""
    mask_truncated: bool
    """Completions that reach the length limit are not learned."""
    kl: Kl
    gap_warning: float
    """Mean gap in nat between the generator's and the learner's log-probs above which a warning appears."""
    normalise_rewards: bool
    """Rewards are divided by the deviation of all rewards so far."""
    critic_warmup: int
    """Steps in which only the critic learns."""
    evaluate_every: int | None
    evaluate_at_start: bool
    save_every: int | None
    save_after_s: float | None = None
    evaluated: bool = False
    sources: tuple[str, ...] = ()
    """Names of the sources of the prompts."""

    @property
    def needs(self) -> ExperienceInputs:
        """Columns that experience needs."""
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
    """The learners: the policy, and PPO's critic."""

    policy: OptimizerStepper
    critic: OptimizerStepper | None = None

    @property
    def critic_learner(self) -> Learner | None:
        return None if self.critic is None else self.critic.learner


class OnlineTrainer:
    """Runs the online loop."""

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
        """Trains to the plan's last step and returns the progress."""
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
            outcomes, progress = self._learn(batch, progress, clock)
            with clock.phase("publish"):
                delivered = self.weights.publish(progress.step)
            self._report(progress, batch, outcomes, delivered, clock)
            self.after.step(progress)
        return progress

    # ---- rollouts

    def _collect(self, progress: Progress, clock: Clock) -> RolloutBatch:
        """A rewarded rollout batch; dynamic sampling draws more prompts until its groups have a signal.

        If they do not suffice, groups without signal fill it up. These count in the loss's divisor, so that
        an optimizer step still is of the effective batch. If no group has a signal, no step is taken.
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
            self._note_starved(progress.step + 1, len(taught), batch)
        return replace(batch, learned_from=(*taught, *rest) if taught else ())

    def _note_starved(self, step: int, taught: int, batch: RolloutBatch) -> None:
        consequence = "others fill it up and teach nothing" if taught else "no optimizer step is taken"
        self.report.note(
            f"warning: step {step}: dynamic sampling found {taught} of {batch.wanted} groups whose rewards "
            f"differ, in {batch.prompts} prompts; {consequence}. Raise algorithm.max_resampled, or give "
            "other prompts"
        )

    def _next(self, progress: Progress, clock: Clock) -> RolloutBatch:
        """Starts rollout batches up to max_staleness, waits for the oldest one and gets its rewards."""
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
        """All optimizer steps from one rollout batch: (outcome of the policy's, of the critic's) each."""
        plan = self.plan
        rewards, progress = self._rewards(batch.learned_from, progress)
        coefficient = progress.kl_coefficient if progress.kl_coefficient is not None else plan.kl.coefficient
        with clock.phase("experience"):
            data = self._training_data(batch.learned_from, rewards, coefficient)
        in_loss = coefficient if plan.kl.place == "loss" and plan.kl.target is not None else None
        outcomes, at = [], progress.optimizer_steps
        for groups in self._mini_batches(data.groups, progress.step):
            critic = None if self.learning.critic is None else self.learning.critic.step(groups, at, clock)
            policy = None
            if progress.step >= plan.critic_warmup:
                policy = self.learning.policy.step(groups, at, clock, kl_coefficient=in_loss)
            outcomes.append((policy, critic))
            at += 1
        if plan.kl.target is not None and data.kl is not None:
            rollouts = sum(len(g.group.rollouts) for g in batch.learned_from)
            progress = replace(
                progress,
                kl_coefficient=adapt(coefficient, data.kl, plan.kl.target, plan.kl.horizon, rollouts),
            )
        refused = sum(o is not None and o.applied is None for pair in outcomes for o in pair)
        return outcomes, replace(
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
        """The mini-batches of all epochs, in an order that is a function of (seed, step, epoch)."""
        for epoch in range(self.plan.epochs):
            order = permutation(len(groups), self.plan.seed, step, epoch, 3)
            for first in range(0, len(groups), self.plan.mini_batch):
                yield [groups[i] for i in order[first : first + self.plan.mini_batch]]

    def _rewards(self, groups: Sequence[RewardedGroup], progress: Progress) -> tuple[list[Floats], Progress]:
        """(rewards for the estimator, progress with their moments).

        With normalisation they are divided by the deviation of all rewards so far (Welford).
        """
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

    # ---- reports

    def _report(
        self,
        progress: Progress,
        batch: RolloutBatch,
        outcomes: Sequence[tuple[StepOutcome | None, StepOutcome | None]],
        delivered: WeightsDelivered,
        clock: Clock,
    ) -> None:
        policy = summarise_steps([p for p, _ in outcomes if p is not None])
        critic = summarise_steps([c for _, c in outcomes if c is not None])
        spans = self.generator.spans()
        metrics = batch_metrics(
            progress, batch, policy, critic, delivered, clock.phases, clock.spans, spans, self.plan.sources
        )
        gap = metrics.get("policy/train_rollout_gap", 0.0)
        if self.plan.max_staleness == 0 and gap > self.plan.gap_warning:
            self.report.note(
                f"warning: step {progress.step}: the generator's log-probs differ from the learner's by "
                f"{gap:.3f} nat per token, though the run is strictly on-policy: the generator has other "
                "weights, or its kernels (precision, attention, a fused head) compute differently"
            )
        self.report.step(StepReport(progress.step, metrics, samples_of(batch, progress.step)))
        self.timeline.step(progress.step, clock.spans, spans)

    def _evaluate(self, step: int) -> None:
        report = self.evaluator.evaluate(step)
        if report.metrics:  # none without data.eval
            self.report.evaluation(report)
