"""Flat metrics of an optimizer step, by the names TRL users know."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.core.reports import LearnReport, Mean, Progress, StepApplied
from orchestrator.observe.metric_names import named


@dataclass(frozen=True, slots=True)
class Throughput:
    """What turns tokens per second into model FLOPs utilisation.

    flops_per_position: forward + backward of one computed position, the head and attention's own products
    excluded; flops_per_pair: those of one (query, key) pair in one layer; flops_per_scored: the head on one
    scored position; peak_flops: of all workers together, None where the device's is unknown (no perf/mfu
    then).
    """

    flops_per_position: float = 0.0
    flops_per_pair: float = 0.0
    flops_per_scored: float = 0.0
    peak_flops: float | None = None

    def mfu(self, learned: LearnReport) -> float | None:
        """Percent of peak FLOPs spent on positions that are not padding, each shared prompt counted once,
        attention as far as each token really sees, nothing that is computed a second time for the backward.
        """
        if not self.peak_flops or not self.flops_per_position:
            return None
        useful = (
            self.flops_per_position * learned.computed
            + self.flops_per_pair * learned.attended
            + self.flops_per_scored * learned.scored_tokens
        )
        return 100.0 * useful / learned.seconds / self.peak_flops


ACCURACIES, TIES = "rewards/accuracies", "rewards/ties"


def values(means: Mapping[str, Mean], *, at_reference: bool = False) -> dict[str, float]:
    """The value of each metric. Of an accuracy nothing is known, NaN, where every pair is a tie, or the
    policy is its reference still."""
    found: dict[str, float] = {}
    for name, mean in means.items():
        if name.startswith(ACCURACIES):
            ties = means.get(TIES + name.removeprefix(ACCURACIES))
            unknown = at_reference or (ties is not None and ties.total >= ties.count)
            found[name] = math.nan if unknown else mean.value
        elif not name.startswith(TIES):
            found[name] = mean.value
    return found


def flatten(
    progress: Progress,
    learned: LearnReport,
    applied: StepApplied,
    phases: Mapping[str, float],
    throughput: Throughput,
    sources: Sequence[str] = (),
    *,
    at_reference: bool = False,
) -> dict[str, float]:
    """One line of metrics.jsonl. phases: seconds by name; sources: names of the data's, by their numbers;
    at_reference: the policy was its reference in this step. perf/tokens_per_s counts unshared tokens, as TRL
    does."""
    metrics = {"loss": learned.loss, **named(values(learned.means, at_reference=at_reference), sources)}
    metrics |= {"grad_norm": applied.grad_norm, "learning_rate": applied.learning_rate}
    metrics["perf/tokens_per_s"] = learned.tokens / sum(phases.values())
    utilisation = throughput.mfu(learned)
    if utilisation is not None:
        metrics["perf/mfu"] = utilisation
    metrics["perf/padding"] = 1.0 - learned.computed / max(1, learned.positions)
    metrics["perf/micro_batches"] = learned.micro_batches
    metrics["perf/peak_memory_gb"] = learned.peak_bytes / 1e9
    metrics["perf/reduced_mb"] = applied.reduced_bytes / 1e6
    metrics["perf/gathered_mb"] = applied.gathered_bytes / 1e6
    metrics |= {f"time/{name}": seconds for name, seconds in phases.items()}
    metrics |= {"num_tokens": progress.tokens, "examples": progress.examples, "skipped": progress.skipped}
    return metrics


def step_seconds(metrics: Mapping[str, float | None]) -> float:
    """Seconds of one step, of the metrics of its line: an online step's phases overlap, an offline one's add
    up (`time/idle/…` are no phases)."""
    phases = sum(v for name, v in metrics.items() if name.startswith("time/") and name.count("/") == 1 and v)
    return metrics.get("time/step") or phases
