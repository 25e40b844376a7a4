"""In which type the stages of a pipeline export: rounding between stages is the user's choice, not a default.

stage that another takes --source--> fp32, as trained
the last ones            --source--> the type of the model that the chain began with; fp32 where they may compute in fp32, of which rounding
                                     would lose what small rates learn (models/rounding.py)
"""

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.models.rounding import WIDE
from orchestrator.models.source import RECIPE_TYPES, source_dtype
from orchestrator.recipe.pipeline import STAGE, Stage, references
from orchestrator.recipe.schema import Recipe

SHORT = {long: short for short, long in RECIPE_TYPES.items()}


def with_types(stages: Sequence[Stage]) -> list[Stage]:
    """The stages with export.dtype=source put in words where the stage's own source is not what is meant."""
    recipes = {stage.name: stage.recipe for stage in stages}
    taken = {name for stage in stages for name in references(stage.recipe).values()}
    return [replace(stage, recipe=_typed(stage.recipe, recipes, stage.name in taken)) for stage in stages]


def _typed(recipe: Recipe, stages: dict[str, Recipe], taken: bool) -> Recipe:
    chained = (recipe.model.path or "").startswith(STAGE)
    if recipe.export.dtype != "source" or not (taken or chained):
        return recipe
    first = recipe
    while (path := first.model.path or "").startswith(STAGE):
        first = stages[path.removeprefix(STAGE)]
    dtype = "fp32" if taken or recipe.learners.precision in WIDE else SHORT[source_dtype(first.model)]
    return recipe.model_copy(update={"export": recipe.export.model_copy(update={"dtype": dtype})})
