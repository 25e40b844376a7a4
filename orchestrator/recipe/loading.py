"""Loading of recipes: a file and overrides to a checked `Recipe`, or to the stages of a pipeline.

    find -> parse       strict YAML, with the line of every key     recipe/files.py, recipe/strict_yaml.py
         -> extend      deep merge                                  recipe/merging.py
         -> override    a.b=c                                       recipe/merging.py
         -> validate                                                recipe/validation.py
         -> reject keys without an effect                           recipe/unread.py
         -> Recipe

A file with `pipeline:` is a list of stages. Each is a recipe with a `name`, in which `stage:NAME` stands for
the export of an earlier stage (recipe/pipeline.py). Nothing here needs torch.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.core.errors import ConfigError
from orchestrator.recipe.files import (
    PIPELINE,
    Draft,
    Origin,
    Override,
    find,
    parse_file,
    parse_override,
    shipped_folder,
)
from orchestrator.recipe.keys import READERS, Readers
from orchestrator.recipe.merging import apply_overrides, extend
from orchestrator.recipe.pipeline import STAGE, IgnoredKey, Stage, check
from orchestrator.recipe.schema import Recipe
from orchestrator.recipe.section import NAME_PATTERN, KeyPath
from orchestrator.recipe.strict_yaml import Dumper
from orchestrator.recipe.unread import UnreadKey, unread
from orchestrator.recipe.validation import dotted, listed, validate, where


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe file after `extends` and overrides."""

    path: Path
    """The file."""
    stages: tuple[Stage, ...]
    """Stages of the pipeline. A plain recipe is one stage, named by run.name."""

    @property
    def name(self) -> str:
        """Name of the run folder and of a job: run.name, or the file name of a pipeline."""
        return self.stages[0].recipe.run.name if len(self.stages) == 1 else self.path.stem


def load(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The checked recipe of a file or of a built-in name such as `tiny/dpo`.

    overrides: `a.b=c` sets one key as if the file had been edited, in every stage of a pipeline that reads
    it; `NAME:a.b=c` sets it in one stage. Keys that name a model (model.path, .tiny, .revision) are not set
    in stages that start from another stage.

    Raises MissingInput if the file does not exist, and ConfigError with every problem, or every unread key.
    """
    file = find(path)
    changes = [parse_override(text) for text in overrides]
    draft = parse_file(file, own=not file.resolve().is_relative_to(shipped_folder()))
    if PIPELINE in draft.data:
        return LoadedRecipe(file, _pipeline(draft, file, changes))
    for change in changes:
        if change.stage is not None:
            raise ConfigError(
                f"override `{change.text}`: {file} is not a pipeline", fix=f"write {'.'.join(change.keys)}=…"
            )
    checked = _check(extend(draft, file, ()), changes, str(file), {})
    return LoadedRecipe(file, (Stage(checked.recipe.run.name, checked.recipe, checked.ignored),))


def recipe_files(file: Path) -> tuple[Path, ...]:
    """A recipe file and the files that it and its stages extend: all that has to be copied to use it
    elsewhere."""
    files = [file]
    draft = parse_file(file, own=False).data
    for entry in [draft, *(draft.get(PIPELINE) or [])]:
        if entry.get("extends"):
            files += recipe_files(file.parent / entry["extends"])
    return tuple(dict.fromkeys(files))


def dump(recipe: Recipe) -> str:
    """All keys that the run reads as YAML, defaults included.

    `load` gives back an equal recipe if the unread keys have their defaults, as in every recipe that was
    loaded.
    """
    values = recipe.model_dump(mode="json")
    read = _without(values, (item.at for item in unread(recipe, values)))
    return yaml.dump(read, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors. A file with `extends` may omit keys that its base sets."""
    schema = Recipe.model_json_schema()
    for section, rows in READERS.items():
        holder = schema if section is Recipe else schema["$defs"][section.__name__]
        for key, readers in rows.items():
            if readers.words:
                about = holder["properties"][key].get("description", "")
                holder["properties"][key]["description"] = f"{about} Read only {readers.words}.".lstrip()
    extends = {"type": "string", "description": "Recipe file that this one extends, relative to it."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "properties": {"extends": extends, **schema["properties"]},
    }


# ---- pipelines


def _pipeline(draft: Draft, file: Path, changes: Sequence[Override]) -> tuple[Stage, ...]:
    """The checked stages of a pipeline."""
    example = "write `- {name: sft, extends: sft.yaml}`"
    for key in draft.data.keys() - {PIPELINE}:
        raise ConfigError(
            f"{draft.origins[(key,)]}: {key}: no key may stand beside `pipeline`",
            fix="move the key into a file that the stages extend",
        )
    entries = draft.data[PIPELINE]
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{file}: pipeline: must be a list of recipes (got {entries!r})", fix=example)
    names: list[str] = []
    for i, entry in enumerate(entries):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or re.match(NAME_PATTERN, name) is None or name in names:
            reason = (
                f"two stages are named {name}"
                if name in names
                else "a stage is a mapping with a name of letters, digits, `.`, `_` and `-`"
            )
            raise ConfigError(f"{draft.origins[(PIPELINE, i)]}: {reason}", fix=example)
        names.append(name)
    for change in changes:
        if change.stage is not None and change.stage not in names:
            raise ConfigError(
                f"override `{change.text}`: no stage is named {change.stage}",
                fix=f"name one of the stages: {', '.join(names)}",
            )
    stages: dict[str, _CheckedRecipe] = {}
    for i, name in enumerate(names):
        stages[name] = _stage(draft, i, file, {n: stage.recipe for n, stage in stages.items()}, changes)
    _reject_idle(str(file), changes, tuple(stages.values()))
    return tuple(Stage(name, stage.recipe, stage.ignored) for name, stage in stages.items())


def _stage(
    pipeline: Draft, index: int, file: Path, earlier: Mapping[str, Recipe], changes: Sequence[Override]
) -> "_CheckedRecipe":
    """The recipe of entry `index` of the pipeline, after the stages `earlier`."""
    name = pipeline.data[PIPELINE][index]["name"]
    entry = {k: v for k, v in pipeline.data[PIPELINE][index].items() if k != "name"}
    draft = extend(
        Draft(entry, {k[2:]: v for k, v in pipeline.origins.items() if k[:2] == (PIPELINE, index)}), file, ()
    )
    model = draft.data.get("model")
    chained = isinstance(model, dict) and str(model.get("path")).startswith(STAGE)
    own = [
        c for c in changes if c.stage == name or (c.stage is None and not (chained and _names_model(c.keys)))
    ]
    return _check(draft, own, f"{file} stage {name}", earlier, one_of_many=True)


def _names_model(keys: tuple[str, ...]) -> bool:
    return keys == ("model",) or keys[:2] in {("model", "path"), ("model", "tiny"), ("model", "revision")}


# ---- keys without an effect


@dataclass(frozen=True, slots=True)
class _CheckedRecipe:
    """A checked recipe, in which every key that the run does not read has its default."""

    recipe: Recipe
    ignored: tuple[IgnoredKey, ...]
    """Unread keys that are not an error."""
    applied: Mapping[str, frozenset[KeyPath]]
    """Overrides for all stages by their text, each with those of its keys that are unread here."""


def _check(
    base: Draft,
    changes: Sequence[Override],
    name: str,
    earlier: Mapping[str, Recipe],
    *,
    one_of_many: bool = False,
) -> _CheckedRecipe:
    """The checked recipe of a draft with its changes.

    Raises ConfigError if a key of the user is wrong or would have no effect. An unread key is only listed if
    it is inherited, or if a change on the command line took its effect.

    earlier: recipes of the stages whose exports it may take. one_of_many: changes for all stages may be meant
    for other stages.
    """
    draft = apply_overrides(base, changes)
    recipe = validate(draft.data, draft.origins, name)
    check(recipe, name, earlier)
    unread_keys = unread(recipe, draft.data)
    applied: dict[str, set[KeyPath]] = {change.text: set() for change in changes if change.stage is None}
    rejected: list[tuple[tuple[KeyPath, ...], Readers, object]] = []
    ignored: list[IgnoredKey] = []
    for item in unread_keys:
        own: list[KeyPath] = []
        listed_only: list[IgnoredKey] = []
        for key in item.requests:
            origin = where(key, draft.origins)
            assert isinstance(origin, Origin), "every key was written somewhere"
            if one_of_many and origin.change is not None and origin.change.stage is None:
                applied[origin.change.text].add(key)
            elif not origin.own:
                listed_only.append(IgnoredKey(dotted(key), str(origin), f"read only {item.readers.words}"))
            elif origin.change is None and (change := _change_against(base, changes, key)):
                why = f"not read because of override `{change}`"
                listed_only.append(IgnoredKey(dotted(key), str(origin), why))
            else:
                own.append(key)
        ignored += _as_one_line(item, listed_only, draft)
        if own:
            keys = (item.at,) if len(own) == len(item.requests) > 1 else tuple(own)
            rejected.append((keys, item.readers, where(keys[0], draft.origins)))
    if rejected:
        raise _unread_error(name, recipe, rejected)
    if unread_keys:
        recipe = validate(_without(draft.data, (item.at for item in unread_keys)), draft.origins, name)
    return _CheckedRecipe(recipe, tuple(ignored), {text: frozenset(keys) for text, keys in applied.items()})


def _as_one_line(item: UnreadKey, keys: list[IgnoredKey], draft: Draft) -> list[IgnoredKey]:
    """One entry for a whole section, if all of its keys are ignored for the same reason."""
    reasons = {key.why for key in keys}
    if len(keys) == len(item.requests) > 1 and len(reasons) == 1:
        return [IgnoredKey(dotted(item.at), str(where(item.at, draft.origins)), *reasons)]
    return keys


def _change_against(base: Draft, changes: Sequence[Override], key: KeyPath) -> str | None:
    """The override without which a key of the user's file is read. `run.max_steps=2` for a try does not
    require that the file's run.epochs be removed. An override of the algorithm does not count: the keys that
    the new one does not read would mean something else than was written."""
    for change in changes:
        if change.keys in (("algorithm",), ("algorithm", "name")):
            continue
        draft = apply_overrides(base, [other for other in changes if other is not change])
        try:
            recipe = validate(draft.data, draft.origins, "")
        except ConfigError:  # the file is not a recipe without that change
            continue
        if not any(key in item.requests for item in unread(recipe, draft.data)):
            return change.text
    return None


def _reject_idle(name: str, changes: Sequence[Override], stages: Sequence[_CheckedRecipe]) -> None:
    """Raises ConfigError for a change of all stages that none of them reads."""
    for change in changes:
        if change.stage is None:
            idle = [stage.applied.get(change.text, frozenset()) for stage in stages]
            for key in sorted(frozenset.intersection(*idle), key=dotted):
                raise ConfigError(
                    f"{name}: no stage reads {dotted(key)} (override `{change.text}`)",
                    why=f"their algorithms are {', '.join(stage.recipe.algorithm.name for stage in stages)}",
                    fix="leave it out; `orchestrator config reference` shows which runs read each key",
                )


def _unread_error(
    name: str, recipe: Recipe, rejected: Sequence[tuple[tuple[KeyPath, ...], Readers, object]]
) -> ConfigError:
    """Error for keys without an effect. rejected: (keys, their row, the place where they were written)."""
    lines = [
        f"{dotted(key)}: is read only {readers.words}"
        + (f"; this recipe is {recipe.algorithm.name}" if readers.words.startswith("by ") else "")
        + (f" ({place})" if place else "")
        for keys, readers, place in rejected
        for key in keys
    ]
    what = f"{name}: {len(lines)} key{'s are' if len(lines) > 1 else ' is'} set that this run does not read"
    return ConfigError(
        what,
        why=listed(lines),
        fix="remove these keys; `orchestrator config reference` shows which runs read each key",
    )


def _without(data: Mapping[str, Any], paths: Iterable[KeyPath]) -> dict[str, Any]:
    """A copy of `data` without the keys at `paths`."""
    copied = copy.deepcopy(dict(data))
    for path in paths:
        node: Any = copied
        for part in path[:-1]:
            node = node[part]
        del node[path[-1]]
    return copied
