"""Recipe files: YAML -> `extends` -> overrides -> a checked `config.Recipe`, or a list of stages.

    find -> parse (strict YAML, the line of every key) -> extend (deep merge) -> override (a.b=c) -> validate (recipe/validation.py)
         -> refuse what nobody reads (recipe/keys.py) -> Recipe

A file with `pipeline:` is a list of stages: each is a recipe of its own with a `name`, and takes what an earlier one
exports where it says `stage:NAME` (recipe/pipeline.py). Nothing here needs torch.
"""

import copy
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from orchestrator.recipe.schema import NAME_PATTERN, Key, Recipe
from orchestrator.core.errors import ConfigError, MissingInput
from orchestrator.recipe.keys import READERS, Readers, unread
from orchestrator.recipe.pipeline import STAGE, Ignored, Stage, check
from orchestrator.recipe.strict_yaml import Dumper, parse
from orchestrator.recipe.validation import dotted, listed, section_at, validate, where

PIPELINE = "pipeline"
SHARED_PART = re.compile(r"(.*-)?base")  # shipped files of these names are extended by recipes and are no recipes by themselves

_OVERRIDE = re.compile(r"(?:(?P<stage>[A-Za-z0-9][A-Za-z0-9._-]*):)?(?P<key>[A-Za-z_]\w*(?:\.\w+)*)=(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A recipe file after `extends` and overrides; a plain recipe is one stage named by run.name."""

    path: Path
    stages: tuple[Stage, ...]

    @property
    def name(self) -> str:
        """Of the run folder and of a job: run.name, or a pipeline's file name."""
        return self.stages[0].recipe.run.name if len(self.stages) == 1 else self.path.stem


@dataclass(frozen=True, slots=True)
class _Override:
    """text: as the user wrote it. stage: None for every stage."""

    text: str
    stage: str | None
    keys: tuple[str, ...]
    value: Any


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a key was written: "file:line" or "override `a.b=c`". own: in the file that the user named or on the command line, not
    in one that it extends or that comes with the program."""

    text: str
    own: bool
    change: _Override | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class _Draft:
    """A mapping before validation, and where each of its keys was written."""

    data: dict[str, Any]
    origins: dict[Key, _Origin]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """The checked recipe of a file or of a built-in name such as `tiny/dpo`.

    overrides: `a.b=c` sets one key as if the file had been edited, in every stage of a pipeline that reads it; `NAME:a.b=c` sets it
    in one stage. What names a model (model.path, .tiny, .revision) is not spread over stages that start from another stage.
    Raises MissingInput (no such file) or ConfigError (one error that lists every problem, or every key that nobody reads).
    """
    file = find(path)
    changes = [_parse_override(text) for text in overrides]
    draft = _parse_file(file, own=not file.resolve().is_relative_to(_shipped()))
    if PIPELINE in draft.data:
        return Loaded(file, _pipeline(draft, file, changes))
    for change in changes:
        if change.stage is not None:
            raise ConfigError(f"override `{change.text}`: {file} is no pipeline", fix=f"write {'.'.join(change.keys)}=…")
    read = _read(_extend(draft, file, ()), changes, str(file), {})
    return Loaded(file, (Stage(read.recipe.run.name, read.recipe, read.ignored),))


def find(name: str | Path) -> Path:
    """The recipe file of a path or a built-in name; MissingInput with close matches if there is none."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = builtin_recipes()
    key = path.as_posix().removesuffix(".yaml")
    if key in shipped:
        return shipped[key]
    close = _neighbours(path) or difflib.get_close_matches(key.removeprefix("recipes/"), shipped)
    raise MissingInput(
        f"no recipe {name}" + (" (it is a folder)" if path.is_dir() else ""),
        fix=f"did you mean {', '.join(close)}?" if close else "`orchestrator recipes ls` lists the built-in recipes",
    )


def _neighbours(missing: Path) -> list[str]:
    """Recipe files beside `missing` that are named nearly so."""
    files = {file.stem: str(file) for file in missing.parent.glob("*.yaml")}
    return [files[stem] for stem in difflib.get_close_matches(missing.stem, files)]


def builtin_recipes() -> Mapping[str, Path]:
    """Name -> file of the recipes that come with the program, e.g. `tiny/dpo`, sorted by name."""
    root = _shipped()
    files = (f for f in root.rglob("*.yaml") if SHARED_PART.fullmatch(f.stem) is None)
    return dict(sorted((f.relative_to(root).with_suffix("").as_posix(), f) for f in files))


def _shipped() -> Path:
    """The folder of the recipes that come with the program."""
    package = Path(__file__).resolve().parent
    packaged = package / "_recipes"  # a wheel has them inside the package, a checkout beside it
    return packaged if packaged.is_dir() else package.parent / "recipes"


def parts(file: Path) -> tuple[Path, ...]:
    """A recipe file and the files it extends, its stages' included: what has to be copied to use it elsewhere."""
    found = [file]
    draft = _parse_file(file, own=False).data
    for entry in [draft, *(draft.get(PIPELINE) or [])]:
        if entry.get("extends"):
            found += parts(file.parent / entry["extends"])
    return tuple(dict.fromkeys(found))


def dump(recipe: Recipe) -> str:
    """All that the run reads as YAML, defaults included; `load` gives back an equal recipe where the rest has its defaults, as in every
    recipe that was loaded."""
    whole = recipe.model_dump(mode="json")
    read = _without(whole, (item.at for item in unread(recipe, whole)))
    return yaml.dump(read, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors. A file with `extends` may leave out what its base sets."""
    schema = Recipe.model_json_schema()
    for section, rows in READERS.items():
        known = schema["$defs"][section.__name__]["properties"] if section is not Recipe else schema["properties"]
        for key, readers in rows.items():
            if readers.words:
                said = known[key].get("description")
                known[key]["description"] = f"{said}; " * bool(said) + f"read only {readers.words}"
    extends = {"type": "string", "description": "a recipe file, relative to this one"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "properties": {"extends": extends, **schema["properties"]}}


# ---- extends and overrides


def _parse_file(file: Path, *, own: bool) -> _Draft:
    try:
        data, origins = parse(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 at byte {error.start}", fix="save the file as UTF-8") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: holds no recipe", why="a recipe is a mapping of sections", fix="see `orchestrator recipes show tiny/dpo`")
    return _Draft(data, {key: _Origin(text, own) for key, text in origins.items()})


def _extend(draft: _Draft, file: Path, chain: tuple[Path, ...]) -> _Draft:
    """`draft`, written in `file`, on top of the recipe that it extends. chain: the files that led here."""
    own = {k: v for k, v in draft.data.items() if k != "extends"}
    target = draft.data.get("extends")
    if target is None:
        return _Draft(own, draft.origins)
    place = f"{draft.origins.get(('extends',), file)}: extends"
    if not isinstance(target, str):
        raise ConfigError(f"{place}: must be the path of one recipe file (got {target!r})")
    base_file, chain = file.parent / target, (*chain, file.resolve())
    if not base_file.is_file():
        close = _neighbours(base_file)
        fix = f"did you mean {', '.join(close)}?" if close else "the path is relative to the file that says `extends`"
        raise MissingInput(f"{place}: no file {base_file}", fix=fix)
    if base_file.resolve() in chain:
        circle = " -> ".join(p.name for p in (*chain, base_file.resolve()))
        raise ConfigError(f"{place}: goes round in a circle", why=circle, fix="take one `extends` out")
    base = _parse_file(base_file, own=False)
    if PIPELINE in base.data:
        raise ConfigError(f"{place}: {base_file} is a pipeline", fix="extend the file of one of its stages")
    base = _extend(base, base_file, chain)
    model = own.get("model")
    touched = {k for k, v in model.items() if v is not None} if isinstance(model, dict) else set[str]()
    return _Draft(_settle_model(_merge(base.data, own, Recipe), base.data, touched), {**base.origins, **draft.origins})


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """`over` on top of `base`: sections are merged key by key; values, lists and loss mixes are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        inner, old = section_at(section, key), merged.get(key)
        merged[key] = _merge(old, value, inner) if inner and isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _settle_model(data: dict[str, Any], before: Mapping[str, Any], touched: set[str]) -> dict[str, Any]:
    """Only one of model.path and model.tiny may be set: the one just set (in `touched`) takes the place of the other."""
    old, new = before.get("model"), data.get("model")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return data
    stale = {"tiny"} & old.keys() if "path" in touched else set[str]()
    stale |= {"path"} if "tiny" in touched else set()
    stale |= {"revision"} if "tiny" in touched or new.get("path") != old.get("path") else set()  # it belongs to the old path
    return {**data, "model": {k: v for k, v in new.items() if k not in stale - touched}}


def _parse_override(text: str) -> _Override:
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise ConfigError(f"override `{text}` is not of the form key=value", fix="write e.g. batch.effective=64; give a list as a whole")
    value, _ = parse(match["value"], f"override `{text}`")
    return _Override(text, match["stage"], tuple(match["key"].split(".")), value)


def _override(draft: _Draft, changes: Sequence[_Override]) -> _Draft:
    """The draft with the key of every change set, later ones winning; missing sections are made."""
    data, origins = copy.deepcopy(draft.data), dict(draft.origins)
    for change in changes:
        node = data
        for depth, key in enumerate(change.keys[:-1], start=1):
            if node.get(key) is None:
                node[key] = {}
            if not isinstance(node[key], dict):
                name = ".".join(change.keys[:depth])
                kind = "a list, which cannot be indexed" if isinstance(node[key], list) else f"{node[key]!r}, which has no keys"
                raise ConfigError(f"override `{change.text}`: {name} is {kind}", fix=f"give it as a whole: {name}=…")
            node = node[key]
        node[change.keys[-1]] = change.value
        origins = {key: origin for key, origin in origins.items() if key[: len(change.keys)] != change.keys}
        origins[change.keys] = _Origin(f"override `{change.text}`", own=True, change=change)
    touched = {c.keys[1] for c in changes if len(c.keys) > 1 and c.keys[0] == "model" and c.value is not None}
    return _Draft(_settle_model(data, draft.data, touched), origins)


# ---- pipelines


def _pipeline(draft: _Draft, file: Path, changes: Sequence[_Override]) -> tuple[Stage, ...]:
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
            reason = f"the name {name} is taken" if name in names else "a stage is a mapping with a name of letters, digits, `.`, `_` and `-`"
            raise ConfigError(f"{draft.origins[(PIPELINE, i)]}: {reason}", fix=example)
        names.append(name)
    for change in changes:
        if change.stage is not None and change.stage not in names:
            raise ConfigError(f"override `{change.text}`: no stage is named {change.stage}", fix=f"the stages are {', '.join(names)}")
    stages: dict[str, _Read] = {}
    for i, name in enumerate(names):
        stages[name] = _stage(draft, i, file, {n: read.recipe for n, read in stages.items()}, changes)
    _refuse_idle(str(file), changes, tuple(stages.values()))
    return tuple(Stage(name, read.recipe, read.ignored) for name, read in stages.items())


def _stage(pipeline: _Draft, index: int, file: Path, earlier: Mapping[str, Recipe], changes: Sequence[_Override]) -> "_Read":
    """Entry `index` of the file, after the stages `earlier`."""
    name = pipeline.data[PIPELINE][index]["name"]
    entry = {k: v for k, v in pipeline.data[PIPELINE][index].items() if k != "name"}
    draft = _extend(_Draft(entry, {k[2:]: v for k, v in pipeline.origins.items() if k[:2] == (PIPELINE, index)}), file, ())
    model = draft.data.get("model")
    chained = isinstance(model, dict) and str(model.get("path")).startswith(STAGE)
    mine = [c for c in changes if c.stage == name or (c.stage is None and not (chained and _names_model(c.keys)))]
    return _read(draft, mine, f"{file} stage {name}", earlier, one_of_many=True)


def _names_model(keys: tuple[str, ...]) -> bool:
    return keys == ("model",) or keys[:2] in {("model", "path"), ("model", "tiny"), ("model", "revision")}


# ---- what nobody reads


@dataclass(frozen=True, slots=True)
class _Read:
    """A checked recipe, which holds only what the run reads. applied: changes of the command line for all stages that were made to it,
    by their text, each with the keys of it that nobody reads here."""

    recipe: Recipe
    ignored: tuple[Ignored, ...]
    applied: Mapping[str, frozenset[Key]]


def _read(base: _Draft, changes: Sequence[_Override], name: str, earlier: Mapping[str, Recipe], *, one_of_many: bool = False) -> _Read:
    """The checked recipe of a draft with its changes; ConfigError where what the user wrote is wrong, or would do nothing.

    earlier: the stages it may take exports of. one_of_many: changes for all stages may be for the others. What is inherited and not
    read, or useless only because of a change on the command line, is listed."""
    draft = _override(base, changes)
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
            assert isinstance(origin, _Origin), "every key was written somewhere"
            if one_of_many and origin.change is not None and origin.change.stage is None:
                applied[origin.change.text].add(key)
            elif not origin.own:
                theirs.append(Ignored(dotted(key), str(origin), f"read only {item.readers.words}"))
            elif origin.change is None and (because := _made_useless(base, changes, key)):
                theirs.append(Ignored(dotted(key), str(origin), f"not read because of override `{because}`"))
            else:
                mine.append(key)
        if len(theirs) == len(item.wishes) > 1 and len(reasons := {found.why for found in theirs}) == 1:  # a whole section is one line
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


def _made_useless(base: _Draft, changes: Sequence[_Override], key: Key) -> str | None:
    """The change without which a key of the user's file is read: `run.max_steps=2` for a try does not ask for the file's run.epochs to
    be removed. Another algorithm is no such change: what it does not read would mean something else than was written."""
    for change in changes:
        if change.keys in (("algorithm",), ("algorithm", "name")):
            continue
        draft = _override(base, [other for other in changes if other is not change])
        try:
            recipe = validate(draft.data, draft.origins, "")
        except ConfigError:  # the file is no recipe without that change
            continue
        if not any(key in item.wishes for item in unread(recipe, draft.data)):
            return change.text
    return None


def _refuse_idle(name: str, changes: Sequence[_Override], stages: Sequence[_Read]) -> None:
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


def _unread_error(name: str, recipe: Recipe, refused: Sequence[tuple[tuple[Key, ...], Readers, object]]) -> ConfigError:
    lines = [
        f"{dotted(key)}: is read only {readers.words}"
        + (f"; this recipe is {recipe.algorithm.name}" if readers.words.startswith("by ") else "")
        + (f" ({place})" if place else "")
        for keys, readers, place in refused
        for key in keys
    ]
    what = f"{name}: {len(lines)} key{'s are' if len(lines) > 1 else ' is'} set that this run does not read"
    return ConfigError(what, why=listed(lines), fix="remove what does nothing; `orchestrator config reference` says who reads each key")


def _without(data: Mapping[str, Any], paths: Iterable[Key]) -> dict[str, Any]:
    """A copy of `data` that lacks the keys at `paths`."""
    copied = copy.deepcopy(dict(data))
    for path in paths:
        node: Any = copied
        for part in path[:-1]:
            node = node[part]
        del node[path[-1]]
    return copied
