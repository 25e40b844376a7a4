"""Protocols that the training loops are written against. The loops import these and never ray, deepspeed or
wandb.

    offline   batch -> Learner.forward_backward -> Learner.optim_step -> Reporter.step, Checkpoints.save
    online    Generator.start -> Pending.result -> Scorer.score -> Learner … -> WeightSync.publish
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from orchestrator.core.batches import Floats, PackedBatch
from orchestrator.core.reports import EvaluationReport, LearnReport, Progress, StepApplied, StepReport
from orchestrator.core.rollouts import BatchRewards, Prompt, RolloutGroup, Sampling, Span, WeightsDelivered

PerMicroBatch = tuple[tuple[Floats, ...], ...]
"""values[rank][i]: Float[N], one value for each scored token of micro-batch i of a rank."""

TokenLists = Sequence[Sequence[int]]
"""A list of token ids for each prompt. Example: [[1, 7, 8], [1, 5]]."""


class Learner(Protocol):
    """A model that computes log-probs and learns, on any number of ranks.

    Every method acts on all ranks and has a deadline. Example of one optimizer step:

        report = learner.forward_backward(batch, step=0)    # report.loss == 0.6931
        applied = learner.optim_step(step=0)                # applied.grad_norm == 12.5
    """

    def token_logprobs(
        self, batch: PackedBatch, *, reference: bool = False, step: int | None = None
    ) -> PerMicroBatch:
        """Log-probs of the scored tokens, without gradients.

        reference: True for those of the live reference policy. step: the optimizer step whose dropout is
        applied, the same as in its forward_backward; None: no dropout.
        """
        ...

    def forward_backward(self, batch: PackedBatch, step: int) -> LearnReport:
        """Adds the gradient of the batch's loss, a sum divided once by the batch's global count."""
        ...

    def optim_step(self, step: int) -> StepApplied:
        """Clips the gradient and applies it with the learning rate of optimizer step `step`, from 0."""
        ...

    def discard(self) -> None:
        """Drops the accumulated gradient, so that the step can be repeated."""
        ...

    def evaluate(self, batch: PackedBatch) -> tuple[LearnReport, PerMicroBatch]:
        """The objective without gradients, and sums[rank][i]: Float[n, branches], the log-prob sums (or
        rewards) of the n examples of each micro-batch."""
        ...

    def token_values(self, batch: PackedBatch) -> PerMicroBatch:
        """Values of a critic before each scored token, without gradients."""
        ...

    def sync_reference(self, alpha: float) -> None:
        """TR-DPO: reference <- alpha * policy + (1 - alpha) * reference."""
        ...

    def generate(self, prompts: TokenLists, max_new_tokens: int) -> TokenLists:
        """Greedy continuations of the prompts, without the eos token. Example: [[1, 7, 8]] -> [[9, 2]]."""
        ...


class Reporter(Protocol):
    """Writes the results of a run to the console, its files and trackers."""

    def step(self, report: StepReport) -> None:
        """Writes a step."""
        ...

    def evaluation(self, report: EvaluationReport) -> None:
        """Writes an evaluation."""
        ...

    def note(self, message: str) -> None:
        """Writes a message. Example: "step 12: resumed from checkpoint 10"."""
        ...


class Checkpoints(Protocol):
    """Saves and restores the state of a run."""

    def restore(self) -> Progress:
        """Restores the newest verified checkpoint. Without one the progress is that of step 0."""
        ...

    def save(self, progress: Progress) -> Path:
        """Writes a checkpoint, and returns its folder. Example: checkpoints/step_00000020."""
        ...


class Pending(Protocol):
    """Rollouts that are being sampled."""

    def result(self) -> tuple[RolloutGroup, ...]:
        """Waits for all groups, and returns them in the order of the prompts. The error of a missed deadline
        names the actor that is late."""
        ...


class Generator(Protocol):
    """Samples completions, or whole episodes, on any number of actors."""

    def start(self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int) -> Pending:
        """Starts sampling and returns without waiting.

        prompts: (draw, prompt) pairs. version: the version of the weights to sample with; it must have been
        published.
        """
        ...

    def spans(self) -> Sequence[Span]:
        """Time spans in which the actors worked since the last call."""
        ...


class Scorer(Protocol):
    """Rewards rollouts."""

    def score(self, groups: Sequence[RolloutGroup]) -> BatchRewards:
        """Rewards of the groups. A group without a reward is dropped and named, never given a made-up one."""
        ...


class WeightSync(Protocol):
    """Carries the policy's weights to the generator."""

    def publish(self, version: int) -> WeightsDelivered:
        """Makes `version` available. An actor loads it before its first prompt of that version."""
        ...
