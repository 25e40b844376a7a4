"""What learners and controllers report: metrics of a step, progress, samples, evaluations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from orchestrator.core.batches import Finish, PackedBatch


@dataclass(frozen=True, slots=True)
class Mean:
    """A metric on its way: sum and count, so that partial values add up exactly. Example: Mean(3.0, 4) is
    0.75."""

    total: float
    count: float

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")


@dataclass(frozen=True, slots=True)
class LearnReport:
    """What forward_backward over one PackedBatch found: loss (already divided once by the global count) and
    means.

    tokens: with the prompt repeated for each branch, as TRL counts; computed: positions that are not padding,
    prompts shared; scored_tokens: positions the head ran on; positions: all, padding and fillers included.
    peak_bytes: highest memory in use since the report before, less what the process held before it built the
    model. maxima: metrics whose reduction is the maximum. attended: (query, key) pairs, added up over the
    attention layers.
    """

    loss: float
    means: Mapping[str, Mean]
    micro_batches: int
    tokens: int
    computed: int
    scored_tokens: int
    positions: int
    seconds: float
    peak_bytes: int = 0
    maxima: Mapping[str, float] = field(default_factory=dict)
    attended: int = 0


SOURCE = "/source "
"""Between a metric's name and the number of a source of the data, until the driver puts the source's name
there."""


def joined_metrics(reports: Sequence[LearnReport]) -> tuple[dict[str, Mean], dict[str, float]]:
    """(means, maxima) of several reports as one, whether of ranks or of steps: each metric by its own
    reduction."""
    means: dict[str, Mean] = {}
    maxima: dict[str, float] = {}
    for report in reports:
        for name, mean in report.means.items():
            means[name] = means[name] + mean if name in means else mean
        for name, value in report.maxima.items():
            maxima[name] = max(maxima.get(name, value), value)
    return means, maxima


@dataclass(frozen=True, slots=True)
class StepApplied:
    """What optim_step did. applied is False where a non-finite gradient was refused: then nothing advanced.

    reduced_bytes: gradient bytes this rank sent into reductions; gathered_bytes: parameter bytes gathered.
    """

    applied: bool
    grad_norm: float
    learning_rate: float
    reduced_bytes: int = 0
    gathered_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """The whole resume state of a controller, with the learner's own.

    step: optimizer steps taken (online: rollout batches learned from, which is also the policy version);
    examples: GLOBAL examples consumed (online: prompts; the data cursor); tokens: unshared tokens seen;
    skipped: steps refused by the non-finite guard; optimizer_steps: online, as a rollout batch takes several;
    kl_coefficient: of the adaptive controller, None while it is the recipe's; reward_*: running moments of
    the reward (Welford).
    """

    step: int = 0
    examples: int = 0
    tokens: int = 0
    skipped: int = 0
    optimizer_steps: int = 0
    kl_coefficient: float | None = None
    reward_count: int = 0
    reward_mean: float = 0.0
    reward_m2: float = 0.0

    def after(self, batch: PackedBatch) -> "Progress":
        return replace(
            self,
            step=self.step + 1,
            examples=self.examples + batch.units.examples,
            tokens=self.tokens + batch.tokens,
        )

    def after_skip(self, batch: PackedBatch) -> "Progress":
        """The batch is consumed, but no step was taken: the schedule does not advance."""
        return replace(self, examples=self.examples + batch.units.examples, skipped=self.skipped + 1)


@dataclass(frozen=True, slots=True)
class StepReport:
    """One line of metrics.jsonl: `step` and flat metrics by the names TRL users know; samples: the rollouts
    it learned from."""

    step: int
    metrics: Mapping[str, float]
    samples: "tuple[Sample, ...]" = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of samples.jsonl: a pair, a greedy completion or a rollout, with its scores.

    tokens: of a rollout, so that it can be replayed: prompt, ids, scored and logprobs as lists."""

    step: int
    kind: Literal["pair", "generation", "rollout"]
    prompt: str
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    answer: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    prompt_id: int | None = None
    sample: int | None = None
    version: int | None = None
    finish: Finish | None = None
    tokens: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Held-out results after `step` optimizer steps: metrics named `eval/...` and the samples worth looking
    at."""

    step: int
    metrics: Mapping[str, float]
    samples: tuple[Sample, ...] = ()
