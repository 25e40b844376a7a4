"""Flat metrics of an optimizer step, with the names that TRL uses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.core.reports import LearnReport, Mean, Progress, StepApplied
from orchestrator.observe.metric_names import named


@dataclass(frozen=True, slots=True)
class Throughput:
    """FLOPs of the model, forward + backward, and of the devices: the factors of perf/mfu."""

    flops_per_position: float = 0.0
    """FLOPs of one computed position, without the head and without attention's own products."""
    flops_per_pair: float = 0.0
    """FLOPs of attention for one (query, key) pair in one layer."""
    flops_per_scored: float = 0.0
    """FLOPs of the head on one scored position."""
    peak_flops: float | None = None
    """Peak FLOPs per second of all workers together; None if the device is not known: no perf/mfu then."""

    def mfu(self, learned: LearnReport) -> float | None:
        """Percent of the peak FLOPs that were spent on useful work; None if it is not known.

        Useful are positions that are not padding, a shared prompt once, and the pairs that attention really
        sees. What is recomputed for the backward pass does not count.
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
    """The value of each metric. An accuracy is NaN, not known, if every pair is a tie or the policy still
    equals its reference."""
    metrics: dict[str, float] = {}
    for name, mean in means.items():
        if name.startswith(ACCURACIES):
            ties = means.get(TIES + name.removeprefix(ACCURACIES))
            unknown = at_reference or (ties is not None and ties.total >= ties.count)
            metrics[name] = math.nan if unknown else mean.value
        elif not name.startswith(TIES):
            metrics[name] = mean.value
    return metrics


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
    """Metrics of one line of metrics.jsonl. perf/tokens_per_s counts unshared tokens, as TRL does.

    phases: seconds by name; sources: names of the data's sources, by number; at_reference: the policy equals
    its reference in this step.
    """
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
    """Seconds of one step, from its line: time/step online, where phases overlap, else the sum of the phases.

    `time/idle/…` is not a phase.
    """
    phases = sum(v for name, v in metrics.items() if name.startswith("time/") and name.count("/") == 1 and v)
    return metrics.get("time/step") or phases
