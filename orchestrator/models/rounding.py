"""How much of the training an export in fewer bits would undo. Small changes of large weights are below the
last bit of bfloat16, so rounding restores the old weights.

trained fp32 weights, start weights --rounding_share--> |rounding error| / |change by training|
share > MOST --> the export is in float32 instead
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.models.load import load_config
from orchestrator.models.source import source_dtype
from orchestrator.recipe.schema import Model, Recipe

MOST = 0.25
"""Largest ratio of rounding error to change by training. Above it weights are rounded only if the recipe asks
for that type."""
FULL = "float32"
WIDE = ("fp32", "auto")
"""Values of learners.precision that may compute with more bits than the source has."""


def may_be_too_coarse(recipe: Recipe) -> bool:
    """Whether rounding to the source's type may lose what was learned. False if the recipe names a type, or
    if the run itself computed with as few bits."""
    return (
        recipe.export.dtype == "source"
        and recipe.learners.precision in WIDE
        and source_dtype(recipe.model) != FULL
    )


@torch.no_grad()
def rounding_share(trained: Mapping[str, Tensor], start: Mapping[str, Tensor], dtype: str) -> float:
    """|rounded - trained| / |trained - start| over all weights in `trained`, or 0 if none changed.

    Example: 0.98 if each weight moved by less than half of bfloat16's last bit.
    """
    error = moved = 0.0
    for name, weight in trained.items():
        wide, before = weight.detach().float(), start[name].detach().float()
        change = wide - before
        if not change.any():  # a frozen weight had that type before
            continue
        moved += change.double().square().sum().item()
        error += (wide.to(getattr(torch, dtype)).float() - wide).double().square().sum().item()
    return (error / moved) ** 0.5 if moved else 0.0


def widened(recipe: Recipe, folder: Path) -> str | None:
    """The note on an export that is wider than its source, since rounding would have undone the training.
    None for any other export."""
    if not may_be_too_coarse(recipe) or not (folder / "config.json").is_file():
        return None
    written = str(
        getattr(load_config(Model.model_validate({"path": str(folder)})), "dtype", None)
    ).removeprefix("torch.")
    source = source_dtype(recipe.model)
    if written == source:
        return None
    short = {"bfloat16": "bf16", "float16": "fp16"}[source]
    lost = f"rounded to the source's {source} it would lose much of what was learned"
    return f"the export is in {written}: {lost} (export.dtype={short} rounds all the same)"
