"""roles.Learner in this process: one rank with the methods of a learner group, for code that is written for
groups (verify, OptimizerStepper)."""

import socket
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from gpu_stages.device import release
from orchestrator.core.batches import PackedBatch
from orchestrator.core.reports import LearnReport, StepApplied
from orchestrator.core.roles import PerMicroBatch
from orchestrator.learner.engine import ProcessGroup
from orchestrator.learner.rank_learner import LearnerSpec, RankLearner
from orchestrator.learner.reference import RankReference
from orchestrator.models.load import LoadedModel
from orchestrator.recipe.schema import Recipe


@cache
def join(device: torch.device) -> ProcessGroup:
    """Joins once per process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = ProcessGroup(0, 1, "127.0.0.1", port, 120.0)
    group.join(device)
    return group


class LocalGroup:
    """The methods of cluster.learner_group.LearnerGroup, without Ray."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.group = device, join(device)
        self.held: Any = None

    def build(self, spec: LearnerSpec, loaded: LoadedModel | None = None) -> None:
        self.free()
        self.held = RankLearner(spec, self.group, self.device, loaded)

    def build_reference(self, recipe: Recipe) -> str:
        self.free()
        self.held = RankReference(recipe, self.device)
        return self.held.fingerprint

    def forward_backward(self, batch: PackedBatch, step: int) -> LearnReport:
        return self.held.forward_backward(batch.micro_batches[0], batch.units, step)

    def optim_step(self, step: int) -> StepApplied:
        return self.held.optim_step(step)

    def discard(self) -> None:
        self.held.discard()

    def token_logprobs(
        self, batch: PackedBatch, *, reference: bool = False, step: int | None = None
    ) -> PerMicroBatch:
        return (self.held.token_logprobs(batch.micro_batches[0], reference=reference, step=step),)

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return [function(self.held, *args)]

    def free(self) -> None:
        """Drops the model before the next one is built."""
        self.held = None
        release(self.device)
