"""What a controller may ask of the others. Controllers import these Protocols and never ray, deepspeed or
wandb."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from orchestrator.core.batches import Floats, PackedBatch
from orchestrator.core.reports import EvaluationReport, LearnReport, Progress, StepApplied, StepReport
from orchestrator.core.rollouts import BatchRewards, Prompt, RolloutGroup, Sampling, Span, WeightsDelivered

PerMicroBatch = tuple[tuple[Floats, ...], ...]
"""Values [rank][i]: Float[N] for the scored tokens of each micro-batch of a PackedBatch."""

TokenLists = Sequence[Sequence[int]]


class Learner(Protocol):
    """A model that scores and learns, on any number of ranks. Every verb acts on all ranks and has a
    deadline."""

    def token_logprobs(
        self, batch: PackedBatch, *, reference: bool = False, step: int | None = None
    ) -> PerMicroBatch:
        """Log-probs of the scored tokens, without gradients; reference=True: under the live reference policy;
        step: with the dropout that forward_backward of that optimizer step will draw, None: without."""
        ...

    def forward_backward(self, batch: PackedBatch, step: int) -> LearnReport:
        """Adds the gradient of the batch's loss, every sum divided once by the batch's global count."""
        ...

    def optim_step(self, step: int) -> StepApplied:
        """Clips and applies the gradient with the learning rate of optimizer step `step` (0-based)."""
        ...

    def discard(self) -> None:
        """Drops the accumulated gradient, so that a step can be played again."""
        ...

    def evaluate(self, batch: PackedBatch) -> tuple[LearnReport, PerMicroBatch]:
        """The objective without gradients, and [rank][i]: Float[n, branches] log-prob sums (or rewards) per
        example."""
        ...

    def token_values(self, batch: PackedBatch) -> PerMicroBatch:
        """A critic's values before each scored token, without gradients."""
        ...

    def sync_reference(self, alpha: float) -> None:
        """TR-DPO: reference <- alpha * policy + (1 - alpha) * reference."""
        ...

    def generate(self, prompts: TokenLists, max_new_tokens: int) -> TokenLists:
        """Greedy continuations, one list of token ids per prompt, the eos token left out."""
        ...


class Reporter(Protocol):
    def step(self, report: StepReport) -> None: ...
    def evaluation(self, report: EvaluationReport) -> None: ...
    def note(self, message: str) -> None: ...


class Checkpoints(Protocol):
    def restore(self) -> Progress:
        """Puts the newest verified checkpoint back; step 0 where there is none."""
        ...

    def save(self, progress: Progress) -> Path: ...


class Pending(Protocol):
    """Rollouts under way."""

    def result(self) -> tuple[RolloutGroup, ...]:
        """Waits for all of them, in the order of the prompts; has a deadline and names who is late."""
        ...


class Generator(Protocol):
    """Samples completions (or whole episodes) with one exact version of the policy, on any number of actors."""

    def start(self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int) -> Pending:
        """Begins to sample for (draw, prompt) with weights `version`, which must have been published, and
        returns at once."""
        ...

    def spans(self) -> Sequence[Span]:
        """When the actors worked since the last call."""
        ...


class Scorer(Protocol):
    """Rewards. Never invents one: a group that cannot be scored is dropped and named."""

    def score(self, groups: Sequence[RolloutGroup]) -> BatchRewards: ...


class WeightSync(Protocol):
    """Carries the policy's weights to the generator."""

    def publish(self, version: int) -> WeightsDelivered:
        """Makes `version` available; an actor takes it before its first piece of work of that version."""
        ...
