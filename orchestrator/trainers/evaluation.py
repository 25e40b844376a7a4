"""Held-out evaluation: preference accuracy and margins per source, and greedy generation with a checker.

`eval/preference_accuracy` is the share of pairs whose chosen answer ranks higher by trainers/ranking.py: if
there is a reference, by the implicit reward. Then `eval/logp_accuracy` is the share by the policy alone, by
its log-prob per token. Ties count one half. If every pair is a tie (the policy still is its reference) the
accuracy is NaN: null in metrics.jsonl, – in tables.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.algorithms.losses.ties import accuracy
from orchestrator.core.batches import Cut, PackedBatch, SequenceGroup
from orchestrator.core.reports import EvaluationReport, Sample
from orchestrator.core.roles import Learner, PerMicroBatch
from orchestrator.data.answers import matches
from orchestrator.data.micro_batches import cut_step
from orchestrator.observe.metric_names import MARGINS, named
from orchestrator.observe.metrics import values
from orchestrator.recipe.schema import Evaluation
from orchestrator.trainers.ranking import Margin, Ranking

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out examples."""

    groups: tuple[SequenceGroup, ...]
    sources: tuple[str, ...]
    """Names of the sources of data.eval."""
    prompts: tuple[tuple[int, ...], ...] = ()
    """Token ids of the prompts to generate from."""
    answers: tuple[str, ...] = ()
    """Expected answer to each prompt."""


class Evaluator:
    """Evaluates a learner on held-out examples, cut like a training step."""

    def __init__(
        self,
        held_out: HeldOut,
        config: Evaluation,
        policy: Learner,
        attach_reference: Callable[[PackedBatch], PackedBatch],
        decode: Decode,
        ranking: Ranking,
    ) -> None:
        self.held_out, self.config, self.policy = held_out, config, policy
        self.attach_reference, self.decode, self.ranking = attach_reference, decode, ranking

    def evaluate(self, cut: Cut, step: int) -> EvaluationReport:
        """Metrics `eval/...` after `step` optimizer steps, with the most wrong pairs and the generations."""
        metrics: dict[str, float] = {}
        samples: list[Sample] = []
        if self.held_out.groups:
            batch = self.attach_reference(cut_step(self.held_out.groups, cut))
            report, sums = self.policy.evaluate(batch)
            metrics["eval/loss"] = report.loss
            at_reference = step == 0 and self.ranking.starts_at_reference
            means = named(values(report.means, at_reference=at_reference), self.held_out.sources)
            metrics.update({f"eval/{name}": value for name, value in means.items()})
            if len(self.held_out.groups[0].branches) == 2 and self.held_out.groups[0].label is None:
                margins = self.ranking.margins(batch, sums)
                margins = {i: Margin(0.0, 0.0) for i in margins} if at_reference else margins
                metrics.update(self._preferences(margins))
                if self.ranking.basis == "implicit reward":
                    metrics.update(self._likelihoods(batch, sums))
                samples += self._most_wrong(margins, step)
        if self.held_out.prompts and self.config.generate is not None:
            generated, rate = self._generate(step)
            metrics["eval/exact_match"] = rate
            samples += generated
        return EvaluationReport(step, metrics, tuple(samples))

    def _preferences(self, margins: Mapping[int, Margin]) -> dict[str, float]:
        metrics = {"eval/preference_accuracy": _accuracy(margins.values())}
        by_source: dict[int, list[Margin]] = {}
        for group in self.held_out.groups:
            by_source.setdefault(group.source, []).append(margins[group.id])
        if len(by_source) > 1:
            for source, of_source in by_source.items():
                metrics[f"eval/preference_accuracy/{self.held_out.sources[source]}"] = _accuracy(of_source)
        return metrics

    def _likelihoods(self, batch: PackedBatch, sums: PerMicroBatch) -> dict[str, float]:
        """Accuracy and margin of the policy alone, without its reference, by the log-prob per token.

        They compare with a model that has no reference, and are known before the first step.
        """
        margins = replace(self.ranking, basis="log-prob per token").margins(batch, sums).values()
        return {
            "eval/logp_accuracy": _accuracy(margins),
            "eval/logp_margin": float(np.mean([m.value for m in margins])),
        }

    def _most_wrong(self, margins: Mapping[int, Margin], step: int) -> list[Sample]:
        """The pairs with the lowest margins; none if all pairs are ties."""
        if math.isnan(_accuracy(margins.values())):
            return []
        worst = sorted(self.held_out.groups, key=lambda g: (margins[g.id].value, g.id))[
            : self.config.worst_pairs
        ]
        return [
            Sample(
                step,
                "pair",
                prompt=self.decode(g.prompt.tolist()),
                chosen=self.decode(g.branches[0].ids.tolist()),
                rejected=self.decode(g.branches[1].ids.tolist()),
                scores={MARGINS[self.ranking.basis]: margins[g.id].value},
            )
            for g in worst
        ]

    def _generate(self, step: int) -> tuple[list[Sample], float]:
        generation = self.config.generate
        assert generation is not None
        completions = self.policy.generate(self.held_out.prompts, generation.max_new_tokens)
        samples, correct_count = [], 0
        for prompt, answer, tokens in zip(
            self.held_out.prompts, self.held_out.answers, completions, strict=True
        ):
            text = self.decode(tokens)
            correct = matches(text, answer, generation.checker)
            correct_count += correct
            samples.append(
                Sample(
                    step,
                    "generation",
                    self.decode(prompt),
                    completion=text,
                    answer=answer,
                    scores={"correct": float(correct)},
                )
            )
        return samples, correct_count / len(samples)


def _accuracy(margins: Collection[Margin]) -> float:
    return accuracy([m.value for m in margins], [m.noise for m in margins])
