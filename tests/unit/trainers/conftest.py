"""A real learner on one rank in this process, behind the verbs of roles.Learner, and small data for it."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.core.batches import Branch, Cut, PackedBatch, SequenceGroup
from orchestrator.core.reports import EvaluationReport, LearnReport, Progress, StepApplied, StepReport
from orchestrator.core.roles import PerMicroBatch, TokenLists
from orchestrator.data.order import Batches, Order
from orchestrator.learner.engine import ProcessGroup
from orchestrator.learner.rank_learner import LearnerSpec, RankLearner
from orchestrator.learner.reference import RankReference
from orchestrator.learner.state import full_weights, weights_digest
from orchestrator.recipe.schema import AlgorithmConfig, Data, Learners, Model, Optimizer, Recipe, TinyModel

CPU = torch.device("cpu")
WHOLE = Cut(1, 8, None, "prefix_shared", 0, "no_sync")


@pytest.fixture(scope="package")
def rank() -> Iterator[ProcessGroup]:
    """A process group of this process alone; the environment is restored afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = ProcessGroup(0, 1, "127.0.0.1", free.getsockname()[1], 60.0)
    before = dict(os.environ)
    group.join(CPU)
    yield group
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def recipe(**algorithm: Any) -> Recipe:
    return Recipe(
        model=Model(tiny=TinyModel(hidden_size=32, layers=1, heads=2)),
        data=Data(train="none"),
        algorithm=AlgorithmConfig(**{"name": "dpo", **algorithm}),
        optimizer=Optimizer(learning_rate=5e-3, schedule="linear"),
        learners=Learners(),
    )


def pairs(count: int, seed: int = 0, *, labelled: bool = False) -> list[SequenceGroup]:
    """Pairs of uneven length, some tokens of which are not scored."""
    draw = np.random.default_rng(seed)

    def branch() -> Branch:
        size = int(draw.integers(2, 9))
        return Branch(draw.integers(0, 256, size), np.arange(size) >= int(draw.integers(0, 2)))

    groups = []
    for i in range(count):
        prompt = draw.integers(0, 256, int(draw.integers(1, 9)))
        groups.append(
            SequenceGroup(i, prompt, (branch(), branch()), label=float(i % 2) if labelled else None)
        )
    return groups


def batches(groups: Sequence[SequenceGroup], effective: int = 8) -> Batches:
    return Batches(groups, Order([len(groups)], [1.0], 0), effective, "carry")


class OneRank:
    """roles.Learner over a RankLearner in this process. fits: largest positions of a micro-batch."""

    def __init__(
        self, group: ProcessGroup, cfg: Recipe, cut: Cut = WHOLE, fits: int = 10**9, total_steps: int = 10
    ) -> None:
        self.rank = RankLearner(LearnerSpec(cfg, cut, total_steps), group, CPU)
        self.frozen = RankReference(cfg, CPU)
        self.positions: list[int] = []
        self.discarded = 0
        self.rank.scoring.register_forward_pre_hook(self._allocate)
        self.fits = fits

    def _allocate(self, _: Any, inputs: tuple[Any, ...]) -> None:
        size = inputs[0].input_ids.numel()
        if torch.is_grad_enabled() and size > self.fits:
            raise torch.OutOfMemoryError(f"{size} positions do not fit")
        self.positions.append(size)

    def token_logprobs(
        self, batch: PackedBatch, *, reference: bool = False, step: int | None = None
    ) -> PerMicroBatch:
        if reference and self.rank.reference is not None:
            return (self.rank.token_logprobs(batch.micro_batches[0], reference=True),)
        if reference:
            return (self.frozen.token_logprobs(batch.micro_batches[0]),)
        return (self.rank.token_logprobs(batch.micro_batches[0], step=step),)

    def forward_backward(self, batch: PackedBatch, step: int) -> LearnReport:
        return self.rank.forward_backward(batch.micro_batches[0], batch.units, step)

    def optim_step(self, step: int) -> StepApplied:
        return self.rank.optim_step(step)

    def discard(self) -> None:
        self.discarded += 1
        self.rank.discard()

    def evaluate(self, batch: PackedBatch) -> tuple[LearnReport, PerMicroBatch]:
        report, sums = self.rank.evaluate(batch.micro_batches[0], batch.units)
        return report, (sums,)

    def sync_reference(self, alpha: float) -> None:
        self.rank.sync_reference(alpha)

    def generate(self, prompts: TokenLists, max_new_tokens: int) -> TokenLists:
        return self.rank.generate(prompts, max_new_tokens)

    def with_live_reference(self, batch: PackedBatch) -> PackedBatch:
        return batch.with_reference(self.token_logprobs(batch, reference=True))

    def weights(self) -> dict[str, np.ndarray]:
        return {name: weight.numpy() for name, weight in full_weights(self.rank)}

    def digest(self) -> str:
        return weights_digest(self.rank)


@pytest.fixture
def one_rank(rank: ProcessGroup) -> Callable[..., OneRank]:
    def make(cfg: Recipe | None = None, cut: Cut = WHOLE, fits: int = 10**9) -> OneRank:
        return OneRank(rank, cfg or recipe(), cut, fits)

    return make


@dataclass
class RecordingReporter:
    """A reporter that keeps what it gets."""

    steps: list[StepReport] = field(default_factory=list)
    evaluations: list[EvaluationReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def step(self, report: StepReport) -> None:
        self.steps.append(report)

    def evaluation(self, report: EvaluationReport) -> None:
        self.evaluations.append(report)

    def note(self, message: str) -> None:
        self.notes.append(message)

    @property
    def losses(self) -> list[float]:
        return [s.metrics["loss"] for s in self.steps]


@dataclass
class MemoryCheckpoints:
    """Checkpoints in memory: the start of a run, and what it saved."""

    start: Progress = field(default_factory=Progress)
    saved: list[Progress] = field(default_factory=list)

    def restore(self) -> Progress:
        return self.start

    def save(self, progress: Progress) -> Any:
        self.saved.append(progress)
