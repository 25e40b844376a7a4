"""Export of a learner on any number of ranks, or of a checkpoint, to a Hugging Face folder.

live learner --gather--+
checkpoint ----read----+--> fp32 weights by name --> merged (LoRA), cast --> models/export.py
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.algorithms.table import build, critic
from orchestrator.core.errors import OutputError
from orchestrator.learner.engine import on_cpu
from orchestrator.learner.rank_learner import RankLearner, Role
from orchestrator.learner.state import full_weights, saved_weights
from orchestrator.models.classes import Head
from orchestrator.models.export import export
from orchestrator.models.load import LoadedModel, load
from orchestrator.models.precision import precision_of
from orchestrator.models.rounding import FULL, MOST, may_be_too_coarse, rounding_share
from orchestrator.models.source import export_dtype
from orchestrator.recipe.schema import Recipe


def export_learner(learner: RankLearner, directory: Path, card: str) -> Path:
    """Writes the trained model to `directory` on rank 0. A collective: the other ranks take part in the
    gathers."""
    recipe, head = learner.spec.recipe, learner.algorithm.head
    names, keep = learner.scoring.hf_names(), learner.process_group.rank == 0
    trained = {names[name]: weight for name, weight in full_weights(learner, keep=keep)}
    again = (
        recipe.model.lora is None
        and precision_of(recipe.learners.precision).low
        and any(not p.requires_grad for p in learner.scoring.parameters())
    )
    if recipe.model.lora is None and not again:
        trained |= {names[name]: weight for name, weight in _frozen(learner, keep=keep)}
    if learner.process_group.rank != 0:
        return directory
    again = again or (recipe.model.lora is None and may_be_too_coarse(recipe))  # to measure what was learned
    # in a low precision the learner has rounded its frozen weights
    start = _start(recipe, head) if again else learner.loaded
    return _write(recipe, head, start, trained, directory, card)


def export_saved(
    recipe: Recipe, checkpoint: Path, directory: Path, card: str, *, role: Role = "policy", start: str
) -> Path:
    """Writes the model of a verified checkpoint, without a learner.

    start: fingerprint of the weights that the run began with. Raises OutputError if model.path holds others
    now.
    """
    head = (build(recipe.algorithm, recipe.rollouts) if role == "policy" else critic(recipe.algorithm)).head
    loaded = _start(recipe, head)
    if loaded.fingerprint != start:
        raise OutputError(
            f"{checkpoint} was trained from other start weights than model.path holds now",
            why=f"fingerprint {start[:12]} then, {loaded.fingerprint[:12]} now",
            fix="put the model back, or give its folder: model.path=FOLDER",
        )
    names = [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    with saved_weights(checkpoint, role) as read:
        trained = {name: read(f"model.{name}") for name in names}
    return _write(recipe, head, loaded, trained, directory, card)


def _start(recipe: Recipe, head: Head) -> LoadedModel:
    return load(recipe.model, seed=recipe.run.seed, head=head, longest=recipe.data.max_length)


def _write(
    recipe: Recipe, head: Head, start: LoadedModel, trained: Mapping[str, Tensor], directory: Path, card: str
) -> Path:
    """trained: weights by Hugging Face name, or an adapter's. The rest of the model comes from `start`."""
    dtype, base, adapter, weights = export_dtype(recipe.export.dtype, recipe.model), start.model, None, None
    before: Mapping[str, Tensor] | None = None
    if recipe.model.lora is None:
        before = dict(base.named_parameters())
        weights = before | dict(trained)
    else:
        if recipe.export.lora != "adapter":
            merge: Any = _with_adapter(recipe, head, trained)
            base = merge.merge_and_unload()
            weights = dict(base.named_parameters())
        if recipe.export.lora != "merged":
            adapter = _with_adapter(recipe, head, trained)
    if weights is not None and may_be_too_coarse(recipe):
        before = before or dict(_start(_without_adapter(recipe), head).model.named_parameters())
        dtype = FULL if rounding_share(weights, before, dtype) > MOST else dtype
    return export(
        weights,
        base=base,
        tokenizer=start.tokenizer,
        directory=directory,
        card=card,
        dtype=dtype,
        adapter=adapter,
    )


def _without_adapter(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": None})})


def _frozen(learner: RankLearner, *, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 weight on the CPU) of the parameters that never learn, e.g. image towers. A collective."""
    for name, parameter in learner.engine.module.named_parameters():
        if not parameter.requires_grad:
            with learner.engine.full_parameters([parameter]):
                if keep:
                    yield name, on_cpu(parameter)


@torch.no_grad()
def _with_adapter(recipe: Recipe, head: Head, trained: Mapping[str, Tensor]) -> Any:
    """The start weights with the trained adapter, loaded again on the CPU: the learner's own base weights may
    be partitioned."""
    model = load(recipe.model, seed=recipe.run.seed, head=head).model
    parameters = dict(model.named_parameters())
    for name, weight in trained.items():
        parameters[name].copy_(weight)
    return model
