"""Records that learners and trainers report: metrics of a step, progress, samples, evaluations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from orchestrator.core.batches import Finish, PackedBatch


@dataclass(frozen=True, slots=True)
class Mean:
    """A metric as sum and count, so that the values of micro-batches, ranks and steps add up exactly.

    Example: Mean(3.0, 4) + Mean(1.0, 1) is Mean(4.0, 5), whose value is 0.8.
    """

    total: float
    """Sum of the values."""
    count: float
    """Number of the values, or the sum of their weights."""

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean; nan if nothing was counted."""
        return self.total / self.count if self.count else float("nan")


@dataclass(frozen=True, slots=True)
class LearnReport:
    """Result of forward_backward over one PackedBatch, of one rank or of all."""

    loss: float
    """The step's loss, already divided once by the global count."""
    means: Mapping[str, Mean]
    """Metrics that are averaged. Example: {"rewards/accuracies": Mean(6.0, 8)}."""
    micro_batches: int
    """Number of micro-batches."""
    tokens: int
    """Tokens with the prompt repeated for each branch, as TRL counts them."""
    computed: int
    """Positions that are not padding; a shared prompt counts once."""
    scored_tokens: int
    """Positions that the head ran on."""
    positions: int
    """All positions, padding and fillers included."""
    seconds: float
    """Wall time."""
    peak_bytes: int = 0
    """Highest memory in use since the last report, without the bytes that the process held before it built
    the model."""
    maxima: Mapping[str, float] = field(default_factory=dict)
    """Metrics whose maximum is reported."""
    attended: int = 0
    """(query, key) pairs, summed over the attention layers."""


SOURCE = "/source "
"""Separates the name of a metric from the number of its data source. The driver replaces both by the source's
name."""


def merge_reports(reports: Sequence[LearnReport], *, of: Literal["ranks", "steps"]) -> LearnReport:
    """One report of several: of ranks that work on one step together, or of steps one after the other.

    Counts and means are added and maxima compared. The loss is the sum of the ranks' shares, or the mean of
    the steps. The slowest rank gives the time, and steps add up.
    """
    longest = max if of == "ranks" else sum
    maxima: dict[str, float] = {}
    means: dict[str, Mean] = {}
    for report in reports:
        for name, mean in report.means.items():
            means[name] = means[name] + mean if name in means else mean
        for name, value in report.maxima.items():
            maxima[name] = max(maxima.get(name, value), value)
    return LearnReport(
        loss=sum(r.loss for r in reports) / (1 if of == "ranks" else len(reports)),
        means=means,
        micro_batches=longest(r.micro_batches for r in reports),
        tokens=sum(r.tokens for r in reports),
        computed=sum(r.computed for r in reports),
        scored_tokens=sum(r.scored_tokens for r in reports),
        positions=sum(r.positions for r in reports),
        seconds=longest(r.seconds for r in reports),
        peak_bytes=max(r.peak_bytes for r in reports),
        maxima=maxima,
        attended=sum(r.attended for r in reports),
    )


@dataclass(frozen=True, slots=True)
class StepApplied:
    """Result of optim_step."""

    applied: bool
    """False if the gradient was not finite: nothing was changed."""
    grad_norm: float
    """Norm of the whole step's gradient before clipping."""
    learning_rate: float
    """Learning rate of the step. Example: 5e-07."""
    reduced_bytes: int = 0
    """Gradient bytes that this rank sent into reductions."""
    gathered_bytes: int = 0
    """Parameter bytes that this rank gathered."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Resume state of a training loop. With the state of the learner it is all that a resumed run needs.

    Example: 20 steps of 256 pairs, none refused: Progress(step=20, examples=5120, tokens=…).
    """

    step: int = 0
    """Optimizer steps taken. Online: rollout batches learned from, which is also the policy version."""
    examples: int = 0
    """The data cursor: GLOBAL examples consumed (online: prompts)."""
    tokens: int = 0
    """Tokens learned from, with the prompt repeated for each branch."""
    skipped: int = 0
    """Steps refused because their loss or gradient was not finite."""
    optimizer_steps: int = 0
    """Online: optimizer steps taken, of which a rollout batch has several."""
    kl_coefficient: float | None = None
    """Coefficient of the adaptive KL controller. None: the recipe's."""
    reward_count: int = 0
    """Number of rewards so far. With the mean and m2 it is the state of Welford's running moments."""
    reward_mean: float = 0.0
    """Mean of the rewards so far."""
    reward_m2: float = 0.0
    """Sum of squared deviations of the rewards from their mean."""

    def after(self, batch: PackedBatch) -> "Progress":
        """State after a step on `batch`."""
        return replace(
            self,
            step=self.step + 1,
            examples=self.examples + batch.units.examples,
            tokens=self.tokens + batch.tokens,
        )

    def after_skip(self, batch: PackedBatch) -> "Progress":
        """State after a refused step: the batch is consumed, and the schedule does not advance."""
        return replace(self, examples=self.examples + batch.units.examples, skipped=self.skipped + 1)


@dataclass(frozen=True, slots=True)
class StepReport:
    """One line of metrics.jsonl."""

    step: int
    """Number of the step, from 1."""
    metrics: Mapping[str, float]
    """Values by the names that TRL uses. Example: {"loss": 0.6931, "rewards/margins": 0.0}."""
    samples: "tuple[Sample, ...]" = ()
    """Rollouts that the step learned from."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of samples.jsonl: a pair, a greedy completion or a rollout, with its scores."""

    step: int
    """Step that it belongs to."""
    kind: Literal["pair", "generation", "rollout"]
    """What it is: it decides which of the texts are set."""
    prompt: str
    """Text of the prompt."""
    completion: str | None = None
    """Generated text (generation, rollout)."""
    chosen: str | None = None
    """Better answer (pair)."""
    rejected: str | None = None
    """Worse answer (pair)."""
    answer: str | None = None
    """Reference answer of the row, if it has one."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores by name. Example: {"reward": 1.0, "accuracy": 1.0}."""
    prompt_id: int | None = None
    """Row of a rollout's prompt."""
    sample: int | None = None
    """Number of the rollout among those of its prompt."""
    version: int | None = None
    """Version of the policy that sampled the rollout."""
    finish: Finish | None = None
    """Why the rollout ended."""
    tokens: Mapping[str, Any] | None = None
    """Lists `prompt`, `ids`, `scored` and `logprobs` of a rollout, for replays."""


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Results on held-out data."""

    step: int
    """Optimizer steps taken before the evaluation."""
    metrics: Mapping[str, float]
    """Values by name. Example: {"eval/loss": 0.61}."""
    samples: tuple[Sample, ...] = ()
    """Pairs with the lowest margins, and generated answers."""
