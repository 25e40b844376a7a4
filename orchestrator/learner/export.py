"""From a learner on any number of ranks to a Hugging Face folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.learner.engine import on_cpu
from orchestrator.learner.learner import RankLearner
from orchestrator.learner.state import full_weights
from orchestrator.models.export import export
from orchestrator.models.load import load


def export_learner(learner: RankLearner, directory: Path, card: str) -> Path:
    """Writes the trained model to `directory` on rank 0; the other ranks take part in the gathers. A collective."""
    names = learner.scoring.hf_names()
    weights = {names[name]: weight for name, weight in full_weights(learner, keep=learner.group.rank == 0)}
    if learner.spec.recipe.model.lora is None:
        weights |= {names[name]: weight for name, weight in _frozen(learner, keep=learner.group.rank == 0)}
    if learner.group.rank != 0:
        return directory
    recipe = learner.spec.recipe
    base, adapter = learner.loaded.model, None
    if recipe.model.lora is not None:
        base, adapter = _merged(learner, weights)
        weights = dict(base.named_parameters())
    dtype = "bfloat16" if recipe.learners.precision in ("bf16", "bf16_autocast") else "float32"
    return export(weights, base=base, tokenizer=learner.loaded.tokenizer, directory=directory, card=card, dtype=dtype, adapter=adapter)


def _frozen(learner: RankLearner, *, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, weight on the CPU) of what never learns, in the precision that the model computes in: towers that text does not reach.
    A collective."""
    for name, parameter in learner.engine.module.named_parameters():
        if not parameter.requires_grad:
            with learner.engine.full_parameters([parameter]):
                if keep:
                    yield name, on_cpu(parameter)


@torch.no_grad()
def _merged(learner: RankLearner, adapter: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """(start weights with the trained adapter merged in, the same with the adapter apart), loaded anew on the CPU, since
    the learner's own base weights may be partitioned."""
    recipe = learner.spec.recipe
    pair = [load(recipe.model, seed=recipe.run.seed, head=learner.algorithm.head).model for _ in range(2)]
    for model in pair:
        parameters = dict(model.named_parameters())
        for name, weight in adapter.items():
            parameters[name].copy_(weight)
    merge: Any = pair[0]
    return merge.merge_and_unload(), pair[1]
