"""Stages of a pipeline, and the keys of a recipe that may take what an earlier stage exports.

    model.path, model.reference, critic.model.path, critic.model.reference, rewards.functions[i].model:
    stage:NAME

`references` finds them, `check` refuses a stage that cannot be what the key needs, `resolve` puts the folders
in.
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
class Ignored:
    """A key that a stage inherits, or that a change on the command line has made useless, and that the run
    does not read."""

    key: str
    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.key} ({self.where}): {self.why}"


@dataclass(frozen=True, slots=True)
class Stage:
    """One training run. Where its recipe says `stage:NAME` it takes the export of that earlier stage.
    ignored: what was written for it and is not read; the recipe holds the defaults there."""

    name: str
    recipe: Recipe
    ignored: tuple[Ignored, ...] = ()


def references(recipe: Recipe) -> dict[str, str]:
    """Key -> name of the stage whose export it takes, e.g. {"model.path": "sft",
    "rewards.functions[0].model": "reward"}."""
    found: dict[str, str] = {}

    def note(key: str, value: str) -> str:
        found[key] = value.removeprefix(STAGE)
        return value

    _replaced(recipe, note)
    return found


def check(recipe: Recipe, where: str, earlier: Mapping[str, Recipe]) -> None:
    """ConfigError where a key names no earlier stage, or one that trains something else than the key needs.

    where: the recipe, for messages. A reward model has a scalar head: it scores, and can be the start of a
    critic or of another reward model; transformers would draw the missing half of any other use at random,
    and say so in a log line.
    """
    for key, name in references(recipe).items():
        if name not in earlier:
            fix = (
                f"the stages before it are {', '.join(earlier)}"
                if earlier
                else "no stage comes before it; give a folder or a hub name"
            )
            raise ConfigError(f"{where}: {key}: {STAGE}{name} names no earlier stage", fix=fix)
        if earlier[name].model.lora is not None and earlier[name].export.lora == "adapter":
            what = f"{where}: {key}: stage {name} exports its adapter alone"
            raise ConfigError(
                what, why="export.lora=adapter: there is no model to load", fix=f"set {name}:export.lora=both"
            )
        scores = earlier[name].algorithm.name == "reward"
        wanted = key.startswith(_REWARD) or recipe.algorithm.name == "reward" or key == _CRITIC
        if scores and not wanted:
            fix = "name a stage that trains a policy"
            raise ConfigError(
                f"{where}: {key}: stage {name} trains a reward model", why="it cannot write text", fix=fix
            )
        if key.startswith(_REWARD) and not scores:
            why = f"its algorithm is {earlier[name].algorithm.name}"
            raise ConfigError(
                f"{where}: {key}: stage {name} trains no reward model",
                why=why,
                fix="name a stage with algorithm.name: reward",
            )


def resolve(recipe: Recipe, exports: Mapping[str, Path]) -> Recipe:
    """The recipe with every `stage:NAME` replaced by that stage's exported folder."""
    return _replaced(recipe, lambda key, value: str(exports[value.removeprefix(STAGE)]))


def _replaced(recipe: Recipe, put: Callable[[str, str], str]) -> Recipe:
    """The recipe with every `stage:NAME` put through put(key, "stage:NAME")."""

    def one(key: str, value: str | None) -> str | None:
        return put(key, value) if value is not None and value.startswith(STAGE) else value

    def model(key: str, cfg: Model) -> Model:
        return cfg.model_copy(
            update={"path": one(f"{key}.path", cfg.path), "reference": one(f"{key}.reference", cfg.reference)}
        )

    functions = [
        f.model_copy(update={"model": one(f"{_REWARD}{i}].model", f.model)})
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
