"""Recipe files: YAML -> `extends` -> overrides -> a checked `config.Recipe`, or a list of stages.

    find -> parse (strict YAML, the line of every key) -> extend (deep merge) -> override (a.b=c) -> validate
    (recipe/validation.py)
         -> refuse what nobody reads (recipe/keys.py) -> Recipe

A file with `pipeline:` is a list of stages: each is a recipe of its own with a `name`, and takes what an
earlier one exports where it says `stage:NAME` (recipe/pipeline.py). Nothing here needs torch.
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
from orchestrator.recipe.keys import READERS, Readers, unread
from orchestrator.recipe.merging import apply_overrides, extend
from orchestrator.recipe.pipeline import STAGE, Ignored, Stage, check
from orchestrator.recipe.schema import NAME_PATTERN, Key, Recipe
from orchestrator.recipe.strict_yaml import Dumper
from orchestrator.recipe.validation import dotted, listed, validate, where


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe file after `extends` and overrides; a plain recipe is one stage named by run.name."""

    path: Path
    stages: tuple[Stage, ...]

    @property
    def name(self) -> str:
        """Of the run folder and of a job: run.name, or a pipeline's file name."""
        return self.stages[0].recipe.run.name if len(self.stages) == 1 else self.path.stem


def load(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The checked recipe of a file or of a built-in name such as `tiny/dpo`.

    overrides: `a.b=c` sets one key as if the file had been edited, in every stage of a pipeline that reads
    it; `NAME:a.b=c` sets it in one stage. What names a model (model.path, .tiny, .revision) is not spread
    over stages that start from another stage. Raises MissingInput (no such file) or ConfigError (one error
    that lists every problem, or every key that nobody reads).
    """
    file = find(path)
    changes = [parse_override(text) for text in overrides]
    draft = parse_file(file, own=not file.resolve().is_relative_to(shipped_folder()))
    if PIPELINE in draft.data:
        return LoadedRecipe(file, _pipeline(draft, file, changes))
    for change in changes:
        if change.stage is not None:
            raise ConfigError(
                f"override `{change.text}`: {file} is no pipeline", fix=f"write {'.'.join(change.keys)}=…"
            )
    read = _read(extend(draft, file, ()), changes, str(file), {})
    return LoadedRecipe(file, (Stage(read.recipe.run.name, read.recipe, read.ignored),))


def recipe_files(file: Path) -> tuple[Path, ...]:
    """A recipe file and the files it extends, its stages' included: what has to be copied to use it
    elsewhere."""
    found = [file]
    draft = parse_file(file, own=False).data
    for entry in [draft, *(draft.get(PIPELINE) or [])]:
        if entry.get("extends"):
            found += recipe_files(file.parent / entry["extends"])
    return tuple(dict.fromkeys(found))


def dump(recipe: Recipe) -> str:
    """All that the run reads as YAML, defaults included; `load` gives back an equal recipe where the rest has
    its defaults, as in every recipe that was loaded."""
    whole = recipe.model_dump(mode="json")
    read = _without(whole, (item.at for item in unread(recipe, whole)))
    return yaml.dump(read, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors. A file with `extends` may leave out what its base sets."""
    schema = Recipe.model_json_schema()
    for section, rows in READERS.items():
        known = (
            schema["$defs"][section.__name__]["properties"] if section is not Recipe else schema["properties"]
        )
        for key, readers in rows.items():
            if readers.words:
                said = known[key].get("description")
                known[key]["description"] = f"{said}; " * bool(said) + f"read only {readers.words}"
    extends = {"type": "string", "description": "a recipe file, relative to this one"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "properties": {"extends": extends, **schema["properties"]},
    }


# ---- extends and overrides


# ---- pipelines


def _pipeline(draft: Draft, file: Path, changes: Sequence[Override]) -> tuple[Stage, ...]:
    example = "write `- {name: sft, extends: sft.yaml}`"
    for key in draft.data.keys() - {PIPELINE}:
        fix = "put the key into a file that the stages extend"
        raise ConfigError(f"{draft.origins[(key,)]}: {key}: nothing may stand beside `pipeline`", fix=fix)
    entries = draft.data[PIPELINE]
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{file}: pipeline: must be a list of recipes (got {entries!r})", fix=example)
    names: list[str] = []
    for i, entry in enumerate(entries):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or re.match(NAME_PATTERN, name) is None or name in names:
            reason = (
                f"the name {name} is taken"
                if name in names
                else "a stage is a mapping with a name of letters, digits, `.`, `_` and `-`"
            )
            raise ConfigError(f"{draft.origins[(PIPELINE, i)]}: {reason}", fix=example)
        names.append(name)
    for change in changes:
        if change.stage is not None and change.stage not in names:
            raise ConfigError(
                f"override `{change.text}`: no stage is named {change.stage}",
                fix=f"the stages are {', '.join(names)}",
            )
    stages: dict[str, _Read] = {}
    for i, name in enumerate(names):
        stages[name] = _stage(draft, i, file, {n: read.recipe for n, read in stages.items()}, changes)
    _refuse_idle(str(file), changes, tuple(stages.values()))
    return tuple(Stage(name, read.recipe, read.ignored) for name, read in stages.items())


def _stage(
    pipeline: Draft, index: int, file: Path, earlier: Mapping[str, Recipe], changes: Sequence[Override]
) -> "_Read":
    """Entry `index` of the file, after the stages `earlier`."""
    name = pipeline.data[PIPELINE][index]["name"]
    entry = {k: v for k, v in pipeline.data[PIPELINE][index].items() if k != "name"}
    draft = extend(
        Draft(entry, {k[2:]: v for k, v in pipeline.origins.items() if k[:2] == (PIPELINE, index)}), file, ()
    )
    model = draft.data.get("model")
    chained = isinstance(model, dict) and str(model.get("path")).startswith(STAGE)
    mine = [
        c for c in changes if c.stage == name or (c.stage is None and not (chained and _names_model(c.keys)))
    ]
    return _read(draft, mine, f"{file} stage {name}", earlier, one_of_many=True)


def _names_model(keys: tuple[str, ...]) -> bool:
    return keys == ("model",) or keys[:2] in {("model", "path"), ("model", "tiny"), ("model", "revision")}


# ---- what nobody reads


@dataclass(frozen=True, slots=True)
class _Read:
    """A checked recipe, which holds only what the run reads. applied: changes of the command line for all
    stages that were made to it, by their text, each with the keys of it that nobody reads here."""

    recipe: Recipe
    ignored: tuple[Ignored, ...]
    applied: Mapping[str, frozenset[Key]]


def _read(
    base: Draft,
    changes: Sequence[Override],
    name: str,
    earlier: Mapping[str, Recipe],
    *,
    one_of_many: bool = False,
) -> _Read:
    """The checked recipe of a draft with its changes; ConfigError where what the user wrote is wrong, or
    would do nothing.

    earlier: the stages it may take exports of. one_of_many: changes for all stages may be for the others.
    What is inherited and not read, or useless only because of a change on the command line, is listed.
    """
    draft = apply_overrides(base, changes)
    recipe = validate(draft.data, draft.origins, name)
    check(recipe, name, earlier)
    found = unread(recipe, draft.data)
    applied: dict[str, set[Key]] = {change.text: set() for change in changes if change.stage is None}
    refused: list[tuple[tuple[Key, ...], Readers, object]] = []
    ignored: list[Ignored] = []
    for item in found:
        mine: list[Key] = []
        theirs: list[Ignored] = []
        for key in item.wishes:
            origin = where(key, draft.origins)
            assert isinstance(origin, Origin), "every key was written somewhere"
            if one_of_many and origin.change is not None and origin.change.stage is None:
                applied[origin.change.text].add(key)
            elif not origin.own:
                theirs.append(Ignored(dotted(key), str(origin), f"read only {item.readers.words}"))
            elif origin.change is None and (because := _made_useless(base, changes, key)):
                theirs.append(Ignored(dotted(key), str(origin), f"not read because of override `{because}`"))
            else:
                mine.append(key)
        if (
            len(theirs) == len(item.wishes) > 1 and len(reasons := {found.why for found in theirs}) == 1
        ):  # a whole section is one line
            theirs = [Ignored(dotted(item.at), str(where(item.at, draft.origins)), *reasons)]
        ignored += theirs
        if mine:
            whole = len(mine) == len(item.wishes) > 1
            at = (item.at,) if whole else tuple(mine)
            refused.append((at, item.readers, where(at[0], draft.origins)))
    if refused:
        raise _unread_error(name, recipe, refused)
    if found:
        recipe = validate(_without(draft.data, (item.at for item in found)), draft.origins, name)
    return _Read(recipe, tuple(ignored), {text: frozenset(keys) for text, keys in applied.items()})


def _made_useless(base: Draft, changes: Sequence[Override], key: Key) -> str | None:
    """The change without which a key of the user's file is read: `run.max_steps=2` for a try does not ask for
    the file's run.epochs to be removed. Another algorithm is no such change: what it does not read would mean
    something else than was written."""
    for change in changes:
        if change.keys in (("algorithm",), ("algorithm", "name")):
            continue
        draft = apply_overrides(base, [other for other in changes if other is not change])
        try:
            recipe = validate(draft.data, draft.origins, "")
        except ConfigError:  # the file is no recipe without that change
            continue
        if not any(key in item.wishes for item in unread(recipe, draft.data)):
            return change.text
    return None


def _refuse_idle(name: str, changes: Sequence[Override], stages: Sequence[_Read]) -> None:
    """ConfigError for a change of all stages that none of them reads."""
    for change in changes:
        if change.stage is None:
            idle = [stage.applied.get(change.text, frozenset()) for stage in stages]
            for key in sorted(frozenset.intersection(*idle), key=dotted):
                raise ConfigError(
                    f"{name}: no stage reads {dotted(key)} (override `{change.text}`)",
                    why=f"their algorithms are {', '.join(stage.recipe.algorithm.name for stage in stages)}",
                    fix="leave it out; `orchestrator config reference` says who reads each key",
                )


def _unread_error(
    name: str, recipe: Recipe, refused: Sequence[tuple[tuple[Key, ...], Readers, object]]
) -> ConfigError:
    lines = [
        f"{dotted(key)}: is read only {readers.words}"
        + (f"; this recipe is {recipe.algorithm.name}" if readers.words.startswith("by ") else "")
        + (f" ({place})" if place else "")
        for keys, readers, place in refused
        for key in keys
    ]
    what = f"{name}: {len(lines)} key{'s are' if len(lines) > 1 else ' is'} set that this run does not read"
    return ConfigError(
        what,
        why=listed(lines),
        fix="remove what does nothing; `orchestrator config reference` says who reads each key",
    )


def _without(data: Mapping[str, Any], paths: Iterable[Key]) -> dict[str, Any]:
    """A copy of `data` that lacks the keys at `paths`."""
    copied = copy.deepcopy(dict(data))
    for path in paths:
        node: Any = copied
        for part in path[:-1]:
            node = node[part]
        del node[path[-1]]
    return copied
