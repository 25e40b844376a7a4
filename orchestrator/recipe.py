"""Recipe files: YAML -> `extends` -> overrides -> a checked `config.Recipe`, or a list of stages.

    find -> parse (strict YAML, the line of every key) -> extend (deep merge) -> override (a.b=c) -> validate -> Recipe

A file with `pipeline:` is a list of stages: each is a recipe of its own with a `name`, and takes what an earlier one
exports where it says `stage:NAME` (stages.py). Nothing here needs torch.
"""

import copy
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.config import NAME_PATTERN, Recipe
from orchestrator.errors import ConfigError, MissingInput
from orchestrator.stages import STAGE, Stage, check
from orchestrator.strict_yaml import Dumper, Key, parse

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
class _Draft:
    """A mapping before validation. origins: where each key was written, "file:line" or "override `a.b=c`"."""

    data: dict[str, Any]
    origins: dict[Key, str]


@dataclass(frozen=True, slots=True)
class _Override:
    """text: as the user wrote it. stage: None for every stage."""

    text: str
    stage: str | None
    keys: tuple[str, ...]
    value: Any


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """The checked recipe of a file or of a built-in name such as `tiny/dpo`.

    overrides: `a.b=c` sets one key as if the file had been edited, in every stage of a pipeline; `NAME:a.b=c` sets it in
    one stage. What names a model (model.path, .tiny, .revision) is not spread over stages that start from another stage.
    Raises MissingInput (no such file) or ConfigError (one error that lists every problem).
    """
    file = find(path)
    changes = [_parse_override(text) for text in overrides]
    draft = _parse_file(file)
    if PIPELINE in draft.data:
        return Loaded(file, _pipeline(draft, file, changes))
    for change in changes:
        if change.stage is not None:
            raise ConfigError(f"override `{change.text}`: {file} is no pipeline", fix=f"write {'.'.join(change.keys)}=…")
    recipe = _validate(_override(_extend(draft, file, ()), changes), str(file), {})
    return Loaded(file, (Stage(recipe.run.name, recipe),))


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
    package = Path(__file__).resolve().parent
    packaged = package / "_recipes"  # a wheel has them inside the package, a checkout beside it
    root = packaged if packaged.is_dir() else package.parent / "recipes"
    files = (f for f in root.rglob("*.yaml") if SHARED_PART.fullmatch(f.stem) is None)
    return dict(sorted((f.relative_to(root).with_suffix("").as_posix(), f) for f in files))


def parts(file: Path) -> tuple[Path, ...]:
    """A recipe file and the files it extends, its stages' included: what has to be copied to use it elsewhere."""
    found = [file]
    draft = _parse_file(file).data
    for entry in [draft, *(draft.get(PIPELINE) or [])]:
        if entry.get("extends"):
            found += parts(file.parent / entry["extends"])
    return tuple(dict.fromkeys(found))


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load` gives back an equal recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors. A file with `extends` may leave out what its base sets."""
    schema = Recipe.model_json_schema()
    extends = {"type": "string", "description": "a recipe file, relative to this one"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "properties": {"extends": extends, **schema["properties"]}}


# ---- extends and overrides


def _parse_file(file: Path) -> _Draft:
    try:
        data, origins = parse(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 at byte {error.start}", fix="save the file as UTF-8") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: holds no recipe", why="a recipe is a mapping of sections", fix="see `orchestrator recipes show tiny/dpo`")
    return _Draft(data, origins)


def _extend(draft: _Draft, file: Path, chain: tuple[Path, ...]) -> _Draft:
    """`draft`, written in `file`, on top of the recipe that it extends. chain: the files that led here."""
    own = {k: v for k, v in draft.data.items() if k != "extends"}
    target = draft.data.get("extends")
    if target is None:
        return _Draft(own, draft.origins)
    where = f"{draft.origins.get(('extends',), file)}: extends"
    if not isinstance(target, str):
        raise ConfigError(f"{where}: must be the path of one recipe file (got {target!r})")
    base_file, chain = file.parent / target, (*chain, file.resolve())
    if not base_file.is_file():
        close = _neighbours(base_file)
        fix = f"did you mean {', '.join(close)}?" if close else "the path is relative to the file that says `extends`"
        raise MissingInput(f"{where}: no file {base_file}", fix=fix)
    if base_file.resolve() in chain:
        circle = " -> ".join(p.name for p in (*chain, base_file.resolve()))
        raise ConfigError(f"{where}: goes round in a circle", why=circle, fix="take one `extends` out")
    base = _parse_file(base_file)
    if PIPELINE in base.data:
        raise ConfigError(f"{where}: {base_file} is a pipeline", fix="extend the file of one of its stages")
    base = _extend(base, base_file, chain)
    model = own.get("model")
    touched = {k for k, v in model.items() if v is not None} if isinstance(model, dict) else set[str]()
    return _Draft(_settle_model(_merge(base.data, own, Recipe), base.data, touched), {**base.origins, **draft.origins})


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """`over` on top of `base`: sections are merged key by key; values, lists and loss mixes are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        inner, old = _section(section, key), merged.get(key)
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
        origins[change.keys] = f"override `{change.text}`"
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
    earlier: dict[str, Recipe] = {}
    for i, name in enumerate(names):
        earlier[name] = _stage(draft, i, file, earlier, changes)
    return tuple(Stage(name, recipe) for name, recipe in earlier.items())


def _stage(pipeline: _Draft, index: int, file: Path, earlier: Mapping[str, Recipe], changes: Sequence[_Override]) -> Recipe:
    """Entry `index` of the file, after the stages `earlier`."""
    name = pipeline.data[PIPELINE][index]["name"]
    entry = {k: v for k, v in pipeline.data[PIPELINE][index].items() if k != "name"}
    draft = _extend(_Draft(entry, {k[2:]: v for k, v in pipeline.origins.items() if k[:2] == (PIPELINE, index)}), file, ())
    model = draft.data.get("model")
    chained = isinstance(model, dict) and str(model.get("path")).startswith(STAGE)
    mine = [c for c in changes if c.stage == name or (c.stage is None and not (chained and _names_model(c.keys)))]
    return _validate(_override(draft, mine), f"{file} stage {name}", earlier)


def _names_model(keys: tuple[str, ...]) -> bool:
    return keys == ("model",) or keys[:2] in {("model", "path"), ("model", "tiny"), ("model", "revision")}


# ---- validation, and pydantic's findings in the recipe's words


@dataclass(frozen=True)
class _Misplaced:
    """Stands for a value that pydantic would quietly read as another: `workers: true` is not one worker."""

    shown: str

    def __repr__(self) -> str:
        return self.shown


_MUST_BE = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **{"string_type": "text", "dict_type": "a mapping", "model_type": "a mapping of keys", "literal_error": "{expected}"},
    **{"greater_than_equal": "at least {ge}", "greater_than": "above {gt}", "less_than_equal": "at most {le}", "less_than": "below {lt}"},
    **{"string_pattern_mismatch": "text that matches {pattern}", "too_long": "no longer than {max_length} entries"},
}


def _validate(draft: _Draft, name: str, earlier: Mapping[str, Recipe]) -> Recipe:
    """The checked recipe. earlier: the stages it may take exports of. ConfigError lists `key: what (got value; where)`."""
    try:
        recipe = Recipe.model_validate(_mark(draft.data, Recipe))
    except ValidationError as error:
        problems = _problems(error, draft)
        what = f"{name}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the recipe"
        why = "".join(f"\n    {problem}" for problem in problems)
        raise ConfigError(what, why=why, fix="mend these keys; `orchestrator config schema` lists every key") from error
    check(recipe, name, earlier)
    return recipe


def _mark(value: Any, annotation: Any) -> Any:
    """A copy of `value` in which booleans outside of boolean keys, and non-finite numbers, are marked as misplaced."""
    if isinstance(value, dict):
        section = _inside(annotation)
        known = {} if section is None else {k: field.annotation for k, field in section.model_fields.items()}
        return {k: _mark(v, known.get(k, bool if section else None)) for k, v in value.items()}
    if isinstance(value, list):
        return [_mark(v, annotation) for v in value]
    if isinstance(value, bool) and annotation is not bool:
        return _Misplaced(str(value).lower())
    return _Misplaced(f"{value}, not finite") if isinstance(value, float) and not math.isfinite(value) else value


def _inside(annotation: Any) -> type[BaseModel] | None:
    """The section named in an annotation: TinyModel of `TinyModel | None`, Source of `str | list[Source]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for found in map(_inside, get_args(annotation)) if found), None)


def _section(section: type[BaseModel] | None, key: str | int) -> type[BaseModel] | None:
    if isinstance(key, int) or section is None:
        return section
    return _inside(section.model_fields[key].annotation) if key in section.model_fields else None


def _problems(error: ValidationError, draft: _Draft) -> list[str]:
    must: dict[Key, list[str]] = {}
    said: dict[Key, str] = {}
    for item in error.errors():
        path, kind = _path(item["loc"], draft.data, item["type"] == "missing"), item["type"]
        if kind in _MUST_BE:
            must.setdefault(path, []).append(_MUST_BE[kind].format(**item.get("ctx", {})))
            said[path] = f"must be {' or '.join(dict.fromkeys(must[path]))} (got {_shown(item['input'])}"
        elif kind == "extra_forbidden":
            said[path] = f"unknown key{_suggestion(path)} ("
        else:
            said[path] = "required, but not set (" if kind == "missing" else f"{item.get('ctx', {}).get('error', item['msg'])} ("
    lines: list[str] = []
    for path, text in said.items():
        if not any(len(other) > len(path) and other[: len(path)] == path for other in said):  # a union's other branches
            where = next((draft.origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in draft.origins), "")
            joint = "; " if where and not text.endswith("(") else ""
            lines.append(f"{_dotted(path)}: {text}{joint}{where})".replace(" ()", ""))
    return lines


def _path(location: Key, data: Any, missing: bool) -> Key:
    """pydantic's location without the names of union branches, which are no keys of the data."""
    path: list[str | int] = []
    for i, part in enumerate(location):
        if _holds(data, part):
            path, data = [*path, part], data[part]
        elif missing and i == len(location) - 1:
            path.append(part)
    return tuple(path)


def _holds(data: Any, part: str | int) -> bool:
    if isinstance(data, list):
        return isinstance(part, int) and part < len(data)
    return isinstance(data, dict) and part in data


def _suggestion(path: Key) -> str:
    """The words ", did you mean …?": close keys of the same section, else the same key in another section."""
    section: type[BaseModel] | None = Recipe
    for part in path[:-1]:
        section = _section(section, part)
    close = [_dotted((*path[:-1], key)) for key in difflib.get_close_matches(str(path[-1]), section.model_fields if section else ())]
    every = list(all_keys(Recipe, ""))
    close = close or [key for key in every if key.endswith(f".{path[-1]}")] or difflib.get_close_matches(_dotted(path), every, cutoff=0.75)
    return f", did you mean {' or '.join(close[:3])}?" if close else ""


def all_keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """Dotted keys of a section and of those below it, but not of the entries of lists."""
    for key, field in section.model_fields.items():
        yield prefix + key
        inner = _inside(field.annotation)
        if inner and str not in get_args(field.annotation):
            yield from all_keys(inner, f"{prefix}{key}.")


def _dotted(path: Key) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
