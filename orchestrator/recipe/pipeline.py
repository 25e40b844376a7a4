"""Stages of a pipeline, and the keys of a recipe that may name the export of an earlier stage.

    model.path: stage:NAME       also model.reference, critic.model.path, critic.model.reference,
                                 and rewards.functions[i].model

`references` finds such keys, `check` rejects a stage that does not have what the key needs, and `resolve`
replaces them by folders.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.core.errors import ConfigError
from orchestrator.recipe.schema import Model, Recipe

STAGE = "stage:"
_CRITIC = "critic.model.path"
_REWARD = "rewards.functions["


@dataclass(frozen=True, slots=True)
class IgnoredKey:
    """A key that the run does not read, and that is not an error: it is inherited, or only a change on the
    command line left it without an effect."""

    key: str
    """Dotted key. Example: "critic.export"."""
    where: str
    """Place where it was written. Example: "base.yaml:6"."""
    why: str
    """Reason. Example: "read only by ppo"."""

    def __str__(self) -> str:
        return f"{self.key} ({self.where}): {self.why}"


@dataclass(frozen=True, slots=True)
class Stage:
    """One training run of a pipeline."""

    name: str
    """Name in the pipeline. Example: "sft"."""
    recipe: Recipe
    """Its recipe, in which `stage:NAME` stands for the export of an earlier stage."""
    ignored: tuple[IgnoredKey, ...] = ()
    """Keys that are written and not read. The recipe has the defaults there."""


def references(recipe: Recipe) -> dict[str, str]:
    """Name of the stage whose export each key takes. Example: {"model.path": "sft",
    "rewards.functions[0].model": "reward"}."""
    stages: dict[str, str] = {}

    def note(key: str, value: str) -> str:
        stages[key] = value.removeprefix(STAGE)
        return value

    _replaced(recipe, note)
    return stages


def check(recipe: Recipe, where: str, earlier: Mapping[str, Recipe]) -> None:
    """Raises ConfigError for a key that does not name an earlier stage, or one that trains another kind of
    model than the key needs.

    A reward model has a scalar head: it rewards, and can be the start of a critic or of another reward model.
    For any other use transformers would initialise the missing head at random, and only log it.

    where: the recipe, for messages. earlier: recipes of the stages before it.
    """
    for key, name in references(recipe).items():
        if name not in earlier:
            fix = (
                f"name one of the stages before it: {', '.join(earlier)}"
                if earlier
                else "name a folder or a hub name: no stage comes before this one"
            )
            raise ConfigError(f"{where}: {key}: {STAGE}{name} is not an earlier stage", fix=fix)
        if earlier[name].model.lora is not None and earlier[name].export.lora == "adapter":
            raise ConfigError(
                f"{where}: {key}: stage {name} exports only its adapter",
                why="with export.lora=adapter it has no model to load",
                fix=f"set {name}:export.lora=both",
            )
        scores = earlier[name].algorithm.name == "reward"
        needs_head = key.startswith(_REWARD) or recipe.algorithm.name == "reward" or key == _CRITIC
        if scores and not needs_head:
            raise ConfigError(
                f"{where}: {key}: stage {name} trains a reward model",
                why="a reward model cannot generate text",
                fix="name a stage that trains a policy",
            )
        if key.startswith(_REWARD) and not scores:
            raise ConfigError(
                f"{where}: {key}: stage {name} does not train a reward model",
                why=f"its algorithm is {earlier[name].algorithm.name}",
                fix="name a stage with algorithm.name: reward",
            )


def resolve(recipe: Recipe, exports: Mapping[str, Path]) -> Recipe:
    """The recipe with every `stage:NAME` replaced by the folder that the stage exported."""
    return _replaced(recipe, lambda key, value: str(exports[value.removeprefix(STAGE)]))


def _replaced(recipe: Recipe, put: Callable[[str, str], str]) -> Recipe:
    """The recipe with every `stage:NAME` replaced by put(key, "stage:NAME")."""

    def path(key: str, value: str | None) -> str | None:
        return put(key, value) if value is not None and value.startswith(STAGE) else value

    def model(key: str, cfg: Model) -> Model:
        return cfg.model_copy(
            update={
                "path": path(f"{key}.path", cfg.path),
                "reference": path(f"{key}.reference", cfg.reference),
            }
        )

    functions = [
        f.model_copy(update={"model": path(f"{_REWARD}{i}].model", f.model)})
        for i, f in enumerate(recipe.rewards.functions)
    ]
    critic = recipe.critic
    return recipe.model_copy(
        update={
            "model": model("model", recipe.model),
            "rewards": recipe.rewards.model_copy(update={"functions": functions}),
            "critic": critic
            if critic.model is None
            else critic.model_copy(update={"model": model("critic.model", critic.model)}),
        }
    )
