"""Held-out evaluation: preference accuracy and margins per source, and greedy generation with a checker.

`eval/preference_accuracy` counts log p(chosen) > log p(rejected) under the policy alone: it needs no reference and can
be compared between an SFT and a DPO model. `eval/rewards/accuracies` is TRL's, on rewards relative to the reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.config import Evaluation
from orchestrator.cut import cut_step
from orchestrator.data.checkers import matches
from orchestrator.records import Cut, EvaluationReport, Floats, PackedBatch, Sample, SequenceGroup
from orchestrator.roles import Learner, PerMicroBatch

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out examples. prompts, answers: for generation, prompt token ids and the expected answer text."""

    groups: tuple[SequenceGroup, ...]
    sources: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...] = ()
    answers: tuple[str, ...] = ()


class Evaluator:
    """Evaluates a learner on held-out examples, cut like a training step."""

    def __init__(
        self,
        held_out: HeldOut,
        config: Evaluation,
        policy: Learner,
        attach_reference: Callable[[PackedBatch], PackedBatch],
        decode: Decode,
    ) -> None:
        self.held_out, self.config, self.policy = held_out, config, policy
        self.attach_reference, self.decode = attach_reference, decode

    def evaluate(self, cut: Cut, step: int) -> EvaluationReport:
        """Metrics `eval/...` after `step` optimizer steps, with the most-wrong pairs and the generations."""
        metrics: dict[str, float] = {}
        samples: list[Sample] = []
        if self.held_out.groups:
            batch = self.attach_reference(cut_step(self.held_out.groups, cut))
            report, sums = self.policy.evaluate(batch)
            metrics["eval/loss"] = report.loss
            metrics.update({f"eval/{name}": mean.value for name, mean in report.means.items()})
            if len(self.held_out.groups[0].branches) == 2 and self.held_out.groups[0].label is None:
                metrics.update(self._preferences(batch, sums))
                samples += self._most_wrong(batch, sums, step)
        if self.held_out.prompts and self.config.generate is not None:
            generated, rate = self._generate(step)
            metrics["eval/exact_match"] = rate
            samples += generated
        return EvaluationReport(step, metrics, tuple(samples))

    def _preferences(self, batch: PackedBatch, sums: PerMicroBatch) -> dict[str, float]:
        margins = _margins(batch, sums)
        metrics = {"eval/preference_accuracy": _accuracy(margins.values()), "eval/logp_margin": float(np.mean(list(margins.values())))}
        by_source: dict[int, list[float]] = {}
        for group in self.held_out.groups:
            by_source.setdefault(group.source, []).append(margins[group.id])
        if len(by_source) > 1:
            for source, values in by_source.items():
                metrics[f"eval/preference_accuracy/{self.held_out.sources[source]}"] = _accuracy(values)
        return metrics

    def _most_wrong(self, batch: PackedBatch, sums: PerMicroBatch, step: int) -> list[Sample]:
        margins = _margins(batch, sums)
        worst = sorted(self.held_out.groups, key=lambda g: (margins[g.id], g.id))[: self.config.worst_pairs]
        return [
            Sample(
                step,
                "pair",
                prompt=self.decode(g.prompt.tolist()),
                chosen=self.decode(g.branches[0].ids.tolist()),
                rejected=self.decode(g.branches[1].ids.tolist()),
                scores={"margin": margins[g.id]},
            )
            for g in worst
        ]

    def _generate(self, step: int) -> tuple[list[Sample], float]:
        generation = self.config.generate
        assert generation is not None
        completions = self.policy.generate(self.held_out.prompts, generation.max_new_tokens)
        samples, right = [], 0
        for prompt, answer, tokens in zip(self.held_out.prompts, self.held_out.answers, completions, strict=True):
            text = self.decode(tokens)
            correct = matches(text, answer, generation.checker)
            right += correct
            samples.append(
                Sample(step, "generation", self.decode(prompt), completion=text, answer=answer, scores={"correct": float(correct)})
            )
        return samples, right / len(samples)


def _accuracy(margins: Sequence[float] | object) -> float:
    return float(np.mean([m > 0 for m in margins]))  # pyright: ignore[reportGeneralTypeIssues]


def _margins(batch: PackedBatch, sums: PerMicroBatch) -> dict[int, float]:
    """chosen minus rejected of each example, by id."""
    margins: dict[int, float] = {}
    for rank, values in zip(batch.micro_batches, sums, strict=True):
        for mb, per_example in zip(rank, values, strict=True):
            if mb.weight:
                pair: Floats = per_example
                margins.update({int(i): float(p[0] - p[1]) for i, p in zip(mb.examples, pair, strict=True)})
    return margins
