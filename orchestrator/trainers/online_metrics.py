"""The report of a rollout batch: flat metrics, and a sample for every rollout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from orchestrator.algorithms.losses.value import explained_variance
from orchestrator.core.batches import Floats
from orchestrator.core.reports import LearnReport, Progress, Sample, StepApplied, merge_reports
from orchestrator.core.rollouts import RewardedGroup, Rollout, RolloutBatch, Span, WeightsDelivered
from orchestrator.observe.metric_names import named
from orchestrator.observe.metrics import values
from orchestrator.trainers.experience import has_signal
from orchestrator.trainers.optimizer_step import StepOutcome

LEARNING = ("experience", "reference", "first_pass", "forward_backward", "optim")
"""Phases in which the learners work; in the others they wait."""


@dataclass(frozen=True, slots=True)
class LearnSummary:
    """All optimizer steps from one rollout batch, together."""

    report: LearnReport
    applied: StepApplied | None
    """The last optimizer step that was applied; None if all were refused."""
    steps: int


def summarise_steps(outcomes: Sequence[StepOutcome]) -> LearnSummary | None:
    """Sums counts, seconds and means, and averages the losses; None without steps."""
    if not outcomes:
        return None
    report = merge_reports([outcome.learned for outcome in outcomes], of="steps")
    applied = next((o.applied for o in reversed(outcomes) if o.applied is not None), None)
    return LearnSummary(report, applied, len(outcomes))


def batch_metrics(
    progress: Progress,
    batch: RolloutBatch,
    policy: LearnSummary | None,
    critic: LearnSummary | None,
    delivered: WeightsDelivered,
    phases: Mapping[str, float],
    spans: Sequence[tuple[str, float, float]],
    actors: Sequence[Span],
    sources: Sequence[str] = (),
) -> dict[str, float]:
    """One line of metrics.jsonl.

    time/<phase>: seconds that the controller spent; time/idle/<role>: seconds in which a role had no work.
    sources: names of the data's sources, by number.
    """
    metrics = {} if policy is None else _policy_metrics(policy, sources)
    if critic is not None:
        metrics |= _critic_metrics(critic)
    metrics |= (
        _reward_metrics(batch)
        | _rewards_by_source(batch, sources)
        | _completion_metrics(batch)
        | _kept_mass(batch)
    )
    metrics["policy/staleness"] = float(
        np.mean([progress.step - 1 - r.version for g in batch.groups for r in g.rollouts])
    )
    if progress.kl_coefficient is not None:
        metrics["kl_coefficient"] = progress.kl_coefficient
    metrics |= _times(phases, spans, actors)
    drawn = sum(len(r.logprobs) for g in batch.groups for r in g.rollouts)
    metrics["perf/tokens_per_s"] = drawn / max(1e-9, sum(phases.values()))
    metrics |= {
        "weights/mb": delivered.bytes / 1e6,
        "weights/seconds": delivered.seconds,
        "weights/buckets": delivered.buckets,
    }
    metrics |= {f"time/reward/{name}": seconds for name, seconds in batch.scoring.seconds.items()}
    return metrics | {
        "num_tokens": progress.tokens,
        "examples": progress.examples,
        "skipped": progress.skipped,
        "optimizer_steps": progress.optimizer_steps,
    }


def _policy_metrics(policy: LearnSummary, sources: Sequence[str]) -> dict[str, float]:
    report = policy.report
    means = {n: m for n, m in report.means.items() if m.count}  # no count: all completions are masked
    metrics = {"loss": report.loss, **named(values(means), sources), **report.maxima}
    if policy.applied is not None:
        metrics |= {"grad_norm": policy.applied.grad_norm, "learning_rate": policy.applied.learning_rate}
    metrics["perf/learn_tokens_per_s"] = report.tokens / max(1e-9, report.seconds)
    metrics["perf/padding"] = 1.0 - report.computed / max(1, report.positions)
    metrics["perf/peak_memory_gb"] = report.peak_bytes / 1e9
    return metrics


def _critic_metrics(critic: LearnSummary) -> dict[str, float]:
    means = {n: m.value for n, m in critic.report.means.items()}
    error, returns, square = (means.pop(f"value/{n}") for n in ("error_sq", "return", "return_sq"))
    metrics = {**means, "value/explained_variance": explained_variance(error, returns, square)}
    return metrics | ({} if critic.applied is None else {"value/grad_norm": critic.applied.grad_norm})


def _reward_metrics(batch: RolloutBatch) -> dict[str, float]:
    metrics = {"reward/dropped_groups": float(len(batch.scoring.dropped))}
    metrics |= {
        "reward/groups_wanted": float(batch.wanted),
        "reward/groups_learned": float(len(batch.learned_from)),
    }
    metrics["reward/groups_with_signal"] = float(sum(has_signal(g) for g in batch.learned_from))
    if not batch.rewarded:
        return metrics
    rewards = np.stack([g.rewards for g in batch.rewarded]).astype(np.float64)
    metrics |= {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/max": float(rewards.max()),
    }
    metrics["reward/group_std"] = float(rewards.std(1).mean())
    if rewards.shape[1] > 1:  # a single answer cannot be compared
        metrics["reward/no_signal_ratio"] = float(np.mean(np.ptp(rewards, axis=1) <= 1e-6))
    for name in batch.rewarded[0].parts:
        metrics[f"reward/{name}"] = float(np.mean([g.parts[name] for g in batch.rewarded]))
    return metrics


def _rewards_by_source(batch: RolloutBatch, sources: Sequence[str]) -> dict[str, float]:
    """reward/mean of each source of the prompts, if there are several."""
    if len(sources) < 2:
        return {}
    by_source: dict[int, list[Floats]] = {}
    for item in batch.rewarded:
        by_source.setdefault(item.group.prompt.source, []).append(item.rewards)
    return {
        f"reward/mean/{sources[source]}": float(np.mean(np.concatenate(by_source[source])))
        for source in sorted(by_source)
    }


def _completion_metrics(batch: RolloutBatch) -> dict[str, float]:
    rollouts = [r for g in batch.groups for r in g.rollouts]
    lengths = np.array([len(r.ids) for r in rollouts])
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(np.mean([r.finish == "length" for r in rollouts])),
        "completions/empty_ratio": float(np.mean([not _model_text(r).strip() for r in rollouts])),
        "completions/mean_turns": float(np.mean([r.turns for r in rollouts])),
    }


def _kept_mass(batch: RolloutBatch) -> dict[str, float]:
    """Mean over tokens of the policy's mass that top-k, top-p and min-p keep; empty if they are off."""
    kept = [r.kept for g in batch.groups for r in g.rollouts if r.kept is not None]
    return {"policy/kept_mass": float(np.exp(np.concatenate(kept)).mean())} if kept else {}


def _times(
    phases: Mapping[str, float], spans: Sequence[tuple[str, float, float]], actors: Sequence[Span]
) -> dict[str, float]:
    """Seconds by phase, of the learners' phases together (learn), of the rest (idle/learners), and in which a
    rollout actor had no work, mean over actors (idle/rollouts)."""
    times = {f"time/{name}": seconds for name, seconds in phases.items()}
    start, end = min(s for _, s, _ in spans), max(e for _, _, e in spans)
    learning = sum(seconds for name, seconds in phases.items() if name in LEARNING)
    times |= {
        "time/step": end - start,
        "time/learn": learning,
        "time/idle/learners": max(0.0, end - start - learning),
    }
    ids = {span.actor for span in actors}
    if ids:
        busy = sum(max(0.0, min(span.end, end) - max(span.start, start)) for span in actors)
        times["time/idle/rollouts"] = max(0.0, (end - start) - busy / len(ids))
    return times


def _model_text(rollout: Rollout) -> str:
    """The text that the model wrote."""
    if isinstance(rollout.completion, str):
        return rollout.completion
    return "\n".join(str(m.get("content") or "") for m in rollout.completion if m.get("role") == "assistant")


def _shown(value: Any) -> str:
    """A prompt or completion as text; messages as `role: content` lines."""
    if isinstance(value, str):
        return value
    return "\n".join(f"{m.get('role')}: {m.get('content') or ''}" for m in value)


def sample_of(item: RewardedGroup, k: int, step: int, kind: Literal["generation", "rollout"]) -> Sample:
    """Rollout k of a group with its reward."""
    prompt, rollout = item.group.prompt, item.group.rollouts[k]
    answer = prompt.columns.get("answer")
    return Sample(
        step,
        kind,
        prompt=_shown(prompt.text),
        completion=_shown(rollout.completion),
        answer=None if answer is None else str(answer),
        scores={
            "reward": float(item.rewards[k]),
            **{name: float(part[k]) for name, part in item.parts.items()},
        },
    )


def samples_of(batch: RolloutBatch, step: int) -> tuple[Sample, ...]:
    """A sample for each rewarded rollout, with its tokens, so that it can be replayed."""
    return tuple(
        replace(
            sample_of(item, k, step, "rollout"),
            prompt_id=item.group.prompt.id,
            sample=rollout.sample,
            version=rollout.version,
            finish=rollout.finish,
            tokens={
                "prompt": item.group.prompt.ids.tolist(),
                "ids": rollout.ids.tolist(),
                "scored": rollout.loss_mask.astype(int).tolist(),
                "logprobs": rollout.logprobs.tolist(),
                **({} if rollout.kept is None else {"kept": rollout.kept.tolist()}),
            },
        )
        for item in batch.rewarded
        for k, rollout in enumerate(item.group.rollouts)
    )
