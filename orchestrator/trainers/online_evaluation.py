"""Evaluation on held-out prompts by the rollout actors: reward of greedy answers, pass@k of sampled ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.core.reports import EvaluationReport
from orchestrator.core.roles import Generator, Scorer
from orchestrator.core.rollouts import Prompt, RewardedGroup, Sampling
from orchestrator.recipe.schema import Evaluation
from orchestrator.trainers.online_metrics import sample_of


@dataclass(frozen=True, slots=True)
class RolloutEvaluator:
    """Samples from held-out prompts with the version published last; reports nothing without prompts."""

    prompts: tuple[Prompt, ...]
    config: Evaluation
    sampling: Sampling
    generator: Generator
    scorer: Scorer

    def evaluate(self, step: int) -> EvaluationReport:
        """Metrics `eval/...` at version `step`, with the greedy answers as samples."""
        if not self.prompts:
            return EvaluationReport(step, {})
        greedy = self._scored(step, replace(self.sampling, samples=1, temperature=0.0))
        metrics = {"eval/reward/mean": _mean([g.rewards for g in greedy])}
        metrics |= {
            f"eval/reward/{name}": _mean([g.parts[name] for g in greedy])
            for name in (greedy[0].parts if greedy else ())
        }
        metrics["eval/completions/mean_length"] = (
            float(np.mean([len(r.ids) for g in greedy for r in g.group.rollouts])) if greedy else 0.0
        )
        metrics["eval/unscored"] = float(len(self.prompts) - len(greedy))
        k = self.config.pass_at_k
        if k:
            sampled = self._scored(step, replace(self.sampling, samples=k))
            passed = [g.rewards >= self.config.pass_reward for g in sampled]
            metrics[f"eval/pass@{k}"] = _mean([np.array([p.any()]) for p in passed])
            metrics["eval/pass@1"] = _mean(passed)
        return EvaluationReport(step, metrics, tuple(sample_of(g, 0, step, "generation") for g in greedy))

    def _scored(self, step: int, sampling: Sampling) -> Sequence[RewardedGroup]:
        """Rewarded answers of all prompts. Draws count down from -1: training never uses their seeds."""
        drawn = [(-1 - i, prompt) for i, prompt in enumerate(self.prompts)]
        return self.scorer.score(self.generator.start(drawn, sampling, step).result()).groups


def _mean(values: Sequence[np.ndarray]) -> float:
    return float(np.mean(np.concatenate(values))) if values else float("nan")
