"""Schema of a recipe: strict, typed, without torch. All sections are imported from here.

    schema_data.py        model, data
    schema_algorithm.py   algorithm, rollouts, rewards, critic
    schema_run.py         run, batch, optimizer, learners, reference, checkpoint, export, evaluation, tracking

A recipe describes what an optimizer step is (`batch.effective`, `algorithm`, `optimizer`) and where it runs
(`learners`). Only the first may change a result. `recipe/loading.py` reads files, `extends` and overrides.
"""

from typing import Any, Literal

from orchestrator.recipe.schema_algorithm import (
    ONLINE,
    AlgorithmConfig,
    Clip,
    Correction,
    Critic,
    Kl,
    OfflineName,
    OnlineName,
    RewardFunction,
    Rewards,
    Rollouts,
)
from orchestrator.recipe.schema_data import Columns, Data, Lora, Model, Source, TinyModel
from orchestrator.recipe.schema_run import (
    Alerts,
    Batch,
    Checkpoint,
    Evaluation,
    Export,
    Generation,
    Learners,
    Offload,
    Optimizer,
    Reference,
    Run,
    Tracking,
)
from orchestrator.recipe.section import NAME_PATTERN, Section

__all__ = [
    "NAME_PATTERN",
    "ONLINE",
    "Alerts",
    "AlgorithmConfig",
    "Batch",
    "Checkpoint",
    "Clip",
    "Columns",
    "Correction",
    "Critic",
    "Data",
    "Evaluation",
    "Export",
    "Generation",
    "Kl",
    "Learners",
    "Lora",
    "Model",
    "OfflineName",
    "Offload",
    "OnlineName",
    "Optimizer",
    "Recipe",
    "Reference",
    "RewardFunction",
    "Rewards",
    "Rollouts",
    "Run",
    "Section",
    "Source",
    "TinyModel",
    "Tracking",
]


class Recipe(Section):
    """A checked recipe: its sections as attributes."""

    run: Run = Run()  # pyright: ignore[reportCallIssue]
    model: Model
    data: Data
    algorithm: AlgorithmConfig
    batch: Batch = Batch()  # pyright: ignore[reportCallIssue]
    optimizer: Optimizer
    learners: Learners = Learners()  # pyright: ignore[reportCallIssue]
    rollouts: Rollouts = Rollouts()  # pyright: ignore[reportCallIssue]
    rewards: Rewards = Rewards()  # pyright: ignore[reportCallIssue]
    critic: Critic = Critic()  # pyright: ignore[reportCallIssue]
    reference: Reference = Reference()  # pyright: ignore[reportCallIssue]
    checkpoint: Checkpoint = Checkpoint()  # pyright: ignore[reportCallIssue]
    export: Export = Export()  # pyright: ignore[reportCallIssue]
    evaluation: Evaluation = Evaluation()  # pyright: ignore[reportCallIssue]
    tracking: Tracking = Tracking()  # pyright: ignore[reportCallIssue]

    def with_workers(self, count: int) -> "Recipe":
        """The same run on `count` learners."""
        return self._with_learners(workers=count)

    def in_one_process(self) -> "Recipe":
        """The same run on one learner, one critic and one rollout actor."""
        ones = {
            "rollouts": self.rollouts.model_copy(update={"workers": 1}),
            "critic": self.critic.model_copy(update={"workers": 1}),
        }
        return self.with_workers(1).model_copy(update=ones)

    def with_checkpointing(self, mode: Literal["none", "selective", "full"]) -> "Recipe":
        """The same run with another mode of activation checkpointing."""
        return self._with_learners(activation_checkpointing=mode)

    def _with_learners(self, **changes: Any) -> "Recipe":
        return self.model_copy(update={"learners": self.learners.model_copy(update=changes)})
