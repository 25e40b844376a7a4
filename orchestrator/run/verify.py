"""`orchestrator verify`: the same optimizer steps under many cuts, compared with one plain large batch.

plain torch, one process, one batch ──────────┐
workers × micro-batch × layout × ZeRO × sync ─┴─> largest difference of losses, gradient norms and
                                                  final fp32 weights
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from orchestrator.algorithms.table import AlgorithmSpec, build, critic
from orchestrator.cluster.learner_group import LearnerGroup
from orchestrator.core.batches import Branch, Cut, Experience, Floats, Layout, SequenceGroup, Sync
from orchestrator.core.roles import PerMicroBatch
from orchestrator.data.micro_batches import cut_step, loss_units
from orchestrator.data.prompts import check_batches
from orchestrator.learner.probes import final_weights
from orchestrator.learner.rank_learner import LearnerSpec, Role
from orchestrator.learner.torch_baseline import PlainTrainer
from orchestrator.plan.planner import make_plan
from orchestrator.plan.ways import LEGAL_SYNC
from orchestrator.recipe.schema import Recipe
from orchestrator.run.inputs import read_data, read_prompts
from orchestrator.trainers.two_pass import with_coefficients

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 5e-3, "bf16_autocast": 5e-3}
"""Largest allowed relative difference, by precision.

fp32: the contract. bf16: twice the 2.1e-3 measured after five steps of the tiny DPO recipe at learning rate
1e-3, which is the rounding of the model's own arithmetic, the same for every cut. fp16: not measured yet
(needs a GPU)."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Largest relative differences of one cut from the plain large batch."""

    cut: Cut
    loss: float
    grad_norm: float
    weights: float
    """||dw|| / ||w|| of the final weights."""

    def within(self, tolerance: float) -> bool:
        """Whether the cut passes.

        The gradient norm, a sum of squares over all weights, may differ by ten times the tolerance.
        """
        return self.loss <= tolerance and self.weights <= tolerance and self.grad_norm <= 10 * tolerance


@dataclass(frozen=True, slots=True)
class LossCurve:
    """Losses and gradient norms by step, and the final weights by Hugging Face name."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    weights: dict[str, Floats]

    def difference(self, other: "LossCurve", cut: Cut) -> Difference:
        """The difference of `other`, under `cut`, from this baseline."""
        assert other.weights.keys() == self.weights.keys(), "the two runs trained different parameters"
        distance = sum(
            float(np.square(other.weights[n] - w, dtype=np.float64).sum()) for n, w in self.weights.items()
        )
        size = sum(float(np.square(w, dtype=np.float64).sum()) for w in self.weights.values())
        return Difference(
            cut,
            _relative(other.losses, self.losses),
            _relative(other.grad_norms, self.grad_norms),
            float(np.sqrt(distance / size)),
        )


def _relative(values: Sequence[float], baseline: Sequence[float]) -> float:
    pairs = zip(values, baseline, strict=True)
    return max(abs(v - b) / max(abs(b), 1e-12) for v, b in pairs)


@dataclass(frozen=True, slots=True)
class Verification:
    """The examples of a recipe's first steps, and the role that learns from them."""

    recipe: Recipe
    algorithm: AlgorithmSpec
    steps: tuple[tuple[SequenceGroup, ...], ...]
    """Examples of each optimizer step."""
    planned: Cut
    role: Role = "policy"

    @classmethod
    def of(cls, recipe: Recipe, steps: int, role: Role = "policy") -> "Verification":
        """The first steps of a recipe. Those of an online recipe learn from made-up rollouts: how they were
        sampled does not matter to the effect of a cut.

        role: policy, or PPO's critic.
        """
        algorithm = build(recipe.algorithm, recipe.rollouts)
        if algorithm.online is not None:
            check_batches(recipe, algorithm)
        data = (
            read_data(recipe, algorithm)
            if algorithm.online is None
            else read_prompts(recipe, algorithm).longest
        )
        batches, cursor = [], 0
        for _ in range(steps):
            batches.append(data.batches.at(cursor))
            cursor += len(batches[-1])
        planned = make_plan(recipe, algorithm, data).cut
        if algorithm.online is not None:
            batches = synthetic_rollouts(recipe, algorithm, batches)
        return cls(
            recipe, critic(recipe.algorithm) if role == "critic" else algorithm, tuple(batches), planned, role
        )

    def baseline(self) -> LossCurve:
        """The steps in plain torch: one process, one batch per step."""
        trainer = PlainTrainer(self.recipe, self.algorithm, len(self.steps))
        results = [trainer.step(groups, loss_units(groups), i) for i, groups in enumerate(self.steps)]
        return LossCurve(
            tuple(r.loss for r in results), tuple(r.grad_norm for r in results), trainer.weights()
        )

    def under(self, cut: Cut, group: LearnerGroup) -> LossCurve:
        """The same steps on DeepSpeed workers under one cut."""
        reference = _reference(self, cut, group)
        group.build(LearnerSpec(self.recipe, cut, len(self.steps), self.role))
        losses, norms = [], []
        for i, groups in enumerate(self.steps):
            batch = cut_step(groups, cut)
            batch = batch if reference is None else batch.with_reference(reference[i])
            if self.algorithm.couples_batch:
                batch, batch_loss = with_coefficients(batch, group, self.algorithm, i)
                losses.append(batch_loss.merged_into(group.forward_backward(batch, i)).loss)
            else:
                losses.append(group.forward_backward(batch, i).loss)
            norms.append(group.optim_step(i).grad_norm)
        weights = {name.removeprefix("model."): w for name, w in group.call(final_weights)[0].items()}
        return LossCurve(tuple(losses), tuple(norms), weights)


def _reference(verification: Verification, cut: Cut, group: LearnerGroup) -> list[PerMicroBatch] | None:
    if (
        not verification.algorithm.needs_reference
        or verification.steps[0][0].branches[0].experience is not None
    ):
        return None  # rollouts have theirs
    group.build_reference(verification.recipe)
    return [group.token_logprobs(cut_step(groups, cut), reference=True) for groups in verification.steps]


def synthetic_rollouts(
    recipe: Recipe, algorithm: AlgorithmSpec, steps: Sequence[Sequence[SequenceGroup]]
) -> list[tuple[SequenceGroup, ...]]:
    """Made-up rollouts for the prompts of these steps: completions of random tokens and lengths.

    About a tenth of the tokens count as an environment's, outside the loss. Log-probs lie near the start
    policy's, so that ratios fall on both sides of every clip.
    """
    draw = np.random.default_rng(recipe.run.seed)
    trainer = PlainTrainer(recipe, algorithm, len(steps))

    def branch(longest: int) -> Branch:
        size = int(draw.integers(1, longest + 1))
        loss_mask = draw.random(size) < 0.9
        loss_mask[-1] = True
        return Branch(draw.integers(0, 256, size), loss_mask)

    rollouts = []
    for groups in steps:
        bare = [replace(g, branches=tuple(branch(len(b.ids)) for b in g.branches)) for g in groups]
        if algorithm.loss_unit == "pair":
            rollouts.append(tuple(bare))
            continue
        logps = trainer.token_logprobs(bare)
        rollouts.append(
            tuple(_with_experience(g, values, draw) for g, values in zip(bare, logps, strict=True))
        )
    return rollouts


def _with_experience(
    group: SequenceGroup, logps: tuple[Floats, ...], draw: np.random.Generator
) -> SequenceGroup:
    def near(values: Floats, width: float) -> Floats:
        return (values + width * draw.standard_normal(len(values))).astype(np.float32)

    branches = []
    for branch, values in zip(group.branches, logps, strict=True):
        advantages, returns = (draw.standard_normal(len(values)).astype(np.float32) for _ in range(2))
        old = near(values, 0.2)
        experience = Experience(
            advantages, near(old, 0.1), old, near(values, 0.2), near(returns, 0.3), returns
        )
        branches.append(replace(branch, experience=experience))
    return replace(group, branches=tuple(branches))


def cuts_to_try(
    planned: Cut, effective: int, precision: str, workers: Sequence[int], *, everything: bool
) -> list[Cut]:
    """Cuts to try. everything: the whole product; else every worker count with every stage and sync policy,
    and micro-batch sizes and layouts in turn."""
    sizes = _sizes(planned, effective, max(workers))
    layouts: tuple[Layout, ...] = (
        ("padded",) if planned.layout == "padded" else (planned.layout, "packed", "padded")
    )
    cuts = []
    for turn, (count, (stage, sync)) in enumerate(product(workers, _engines(precision))):
        shapes = list(product(sizes, dict.fromkeys(layouts)))
        for size, layout in shapes if everything else [shapes[turn % len(shapes)]]:
            cuts.append(Cut(count, size, None, layout, stage, sync))
    return cuts


def _sizes(planned: Cut, effective: int, workers: int) -> tuple[int, int]:
    """Two micro-batch sizes, one of which leaves a remainder."""
    share = max(1, effective // workers)
    first = min(planned.examples or share, share)
    return first, max(1, first - 1 if first > 2 else first // 2)


def _engines(precision: str) -> Iterator[tuple[int, Sync]]:
    low = precision in ("bf16", "fp16")
    for stage, policies in LEGAL_SYNC.items():
        for sync in policies:
            if not (low and (stage == 0 or sync == "coalesced")):
                yield stage, sync


def run(recipe: Recipe, *, steps: int, workers: Sequence[int], everything: bool) -> Iterator[Difference]:
    """Yields the difference of each cut when it is done. Workers share the machine's CPUs if it has fewer."""
    verification = Verification.of(recipe, steps)
    baseline, effective = verification.baseline(), len(verification.steps[0])
    cuts = cuts_to_try(
        verification.planned, effective, recipe.learners.precision, workers, everything=everything
    )
    for count in workers:
        cpus = min(recipe.learners.cpus_per_worker, (os.cpu_count() or 1) / count)
        learners = recipe.learners.model_copy(update={"workers": count, "cpus_per_worker": cpus})
        with LearnerGroup(learners) as group:
            for cut in (c for c in cuts if c.workers == count):
                yield baseline.difference(verification.under(replace(cut, workers=count), group), cut)
