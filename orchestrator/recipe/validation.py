"""Validation of a mapping to a `Recipe`. No value changes its type, and one error lists every problem.

mapping --marks values that pydantic would convert--> pydantic --problems, by dotted key--> Recipe
"""

import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from orchestrator.core.errors import ConfigError
from orchestrator.recipe.schema import Recipe
from orchestrator.recipe.section import DURATION_PATTERN, KeyPath

_MUST_BE = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **{
        "string_type": "text",
        "dict_type": "a mapping",
        "model_type": "a mapping of keys",
        "literal_error": "{expected}",
    },
    **{
        "greater_than_equal": "at least {ge}",
        "greater_than": "above {gt}",
        "less_than_equal": "at most {le}",
        "less_than": "below {lt}",
    },
    **{
        "string_pattern_mismatch": "text that matches {pattern}",
        "too_long": "no longer than {max_length} entries",
    },
}


OWN = {"model": "model.path=MODEL", "data": "data.train=FILE", "data.train": "data.train=FILE"}
"""Keys that a starting recipe cannot set, and how the user sets them on the command line."""


@dataclass(frozen=True)
class _MisplacedValue:
    """Stands for a value that pydantic would convert without an error: `workers: true` is not one worker."""

    shown: str

    def __repr__(self) -> str:
        return self.shown


def validate(data: Mapping[str, Any], origins: Mapping[KeyPath, object], name: str) -> Recipe:
    """The checked recipe. Raises ConfigError with lines such as `batch.effective: must be at least 1 (got 0;
    own.yaml:3)`.

    origins: the place of each key, printed by `str`. name: the recipe in messages.
    """
    try:
        recipe = Recipe.model_validate(_mark(data, Recipe))
    except ValidationError as error:
        problems = _problems(error, data, origins)
        what = f"{name}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the recipe"
        raise ConfigError(what, why=listed(problems), fix=_fix(problems)) from error
    assert not any(isinstance(value, _MisplacedValue) for value in _values(recipe)), (
        "a mark was left in the recipe"
    )
    return recipe


def _fix(problems: list[str]) -> str:
    missing = [
        key
        for key in OWN
        if any(p.startswith(f"{key}: required") or p.startswith(f"{key}: set exactly one") for p in problems)
    ]
    if missing and len(missing) == len(problems):
        return f"set your own: {' '.join(dict.fromkeys(OWN[key] for key in missing))}"
    return "fix these keys; `orchestrator config schema` lists every key"


def listed(problems: list[str]) -> str:
    """Problems as the reason of an error, one per line."""
    return "".join(f"\n    {problem}" for problem in problems)


# ---- values that pydantic would convert


def _mark(value: Any, annotation: Any) -> Any:
    """A copy of `value` in which booleans outside of boolean keys, and numbers that are not finite, are
    marked.

    Values of keys that may hold anything (options of rewards), and of unknown keys, stay as they are:
    pydantic converts nothing there.
    """
    members = list(_members(annotation))
    if annotation is None or Any in members:
        return value
    if isinstance(value, dict):
        section = next((m for m in members if _is_section(m)), None)
        if section is not None:
            annotations = {k: field.annotation for k, field in section.model_fields.items()}
            return {k: _mark(v, annotations.get(k)) for k, v in value.items()}
        inner = next((get_args(m)[1] for m in members if get_origin(m) is dict), None)
        return {k: _mark(v, inner) for k, v in value.items()}
    if isinstance(value, list):
        inner = next((get_args(m)[0] for m in members if get_origin(m) in (list, tuple)), None)
        return [_mark(v, inner) for v in value]
    if isinstance(value, bool) and bool not in members:
        return _MisplacedValue(str(value).lower())
    if isinstance(value, float) and not math.isfinite(value):
        return _MisplacedValue(f"{value}, not finite")
    return value


def _members(annotation: Any) -> Iterator[Any]:
    """Alternatives of an annotation. Example: int and None of `Annotated[int, …] | None`."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _values(value: Any) -> Iterator[Any]:
    """All values of a recipe, at any depth."""
    if isinstance(value, BaseModel):
        inner: Any = [getattr(value, name) for name in type(value).model_fields]
    elif isinstance(value, Mapping):
        inner = value.values()
    else:
        inner = value if isinstance(value, list | tuple) else ()
    yield value
    for item in inner:
        yield from _values(item)


# ---- the schema


def inside(annotation: Any) -> type[BaseModel] | None:
    """The section named in an annotation: TinyModel of `TinyModel | None`, Source of `str | list[Source]`."""
    if _is_section(annotation):
        return annotation
    return next((section for section in map(inside, get_args(annotation)) if section), None)


def section_at(section: type[BaseModel] | None, key: str | int) -> type[BaseModel] | None:
    """The section that stands at `key` of a section (or of a list of them)."""
    if isinstance(key, int) or section is None:
        return section
    return inside(section.model_fields[key].annotation) if key in section.model_fields else None


def all_keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """Dotted keys of a section and the sections below it, without the entries of lists."""
    for key, field in section.model_fields.items():
        yield prefix + key
        inner = inside(field.annotation)
        if inner and str not in get_args(field.annotation):
            yield from all_keys(inner, f"{prefix}{key}.")


def dotted(path: KeyPath) -> str:
    """Text of a path. Example: ("data", "train", 0, "path") is data.train[0].path."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def where(path: KeyPath, origins: Mapping[KeyPath, object]) -> object | None:
    """The place where a key, or the nearest section that holds it, was written."""
    return next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), None)


# ---- pydantic's errors as messages


def _problems(
    error: ValidationError, data: Mapping[str, Any], origins: Mapping[KeyPath, object]
) -> list[str]:
    """One line for each key that pydantic rejects. Example: "batch.effective: must be at least 1 (got 0;
    own.yaml:3)".
    """
    must: dict[KeyPath, list[str]] = {}
    texts: dict[KeyPath, str] = {}
    for item in error.errors():
        path, kind = _path(item["loc"], data, item["type"] == "missing"), item["type"]
        if kind in _MUST_BE:
            words = _MUST_BE[kind].format(**item.get("ctx", {}))
            must.setdefault(path, []).append(
                "a time such as 90s, 10m or 1h" if DURATION_PATTERN in words else words
            )
            texts[path] = (
                f"must be {' or '.join(dict.fromkeys(must[path]))} (got {_shown(item['input'])}{_meant(item)}"
            )
        elif kind == "extra_forbidden":
            texts |= {key: f"unknown key{_suggestion(key)} (" for key in _leaves(path, item["input"])}
        else:
            texts[path] = (
                "required, but not set ("
                if kind == "missing"
                else f"{item.get('ctx', {}).get('error', item['msg'])} ("
            )
    lines: list[str] = []
    for path, text in texts.items():
        # a problem of a deeper key replaces those of a union's other branches
        if not any(len(other) > len(path) and other[: len(path)] == path for other in texts):
            place = where(path, origins) or ""
            joint = "; " if place and not text.endswith("(") else ""
            lines.append(f"{dotted(path)}: {text}{joint}{place})".replace(" ()", ""))
    return lines


def _meant(item: Any) -> str:
    """Text ", did you mean …?" for a value that is close to a legal one."""
    legal = re.findall(r"'([^']*)'", item.get("ctx", {}).get("expected", ""))
    close = difflib.get_close_matches(str(item["input"]), legal, n=3)
    return f", did you mean {' or '.join(close)}?" if close else ""


def _path(location: KeyPath, data: Any, missing: bool) -> KeyPath:
    """pydantic's location without the names of union branches, which are not keys of the data."""
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


def _leaves(path: KeyPath, value: Any) -> Iterator[KeyPath]:
    """The written keys at or below an unknown one. Example: optimiser.lr of `optimiser: {lr: 1}`."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves((*path, key), inner)
    else:
        yield path


def _suggestion(path: KeyPath) -> str:
    """Text ", did you mean …?" with close keys of the same section, or else the same key of another
    section."""
    close = _close(path)
    every = list(all_keys(Recipe, ""))
    close = (
        close
        or [key for key in every if key.endswith(f".{path[-1]}")]
        or difflib.get_close_matches(dotted(path), every, cutoff=0.75)
    )
    return f", did you mean {' or '.join(close[:3])}?" if close else ""


def _close(path: KeyPath) -> list[str]:
    """Keys of the schema that are close to a path in each of its parts. Example: optimizer.learning_rate for
    optimiser.lr."""
    section: type[BaseModel] | None = Recipe
    right: KeyPath = ()
    for n, part in enumerate(path):
        keys = list(section.model_fields) if section else []
        near = [part] if isinstance(part, int) or part in keys else _near(str(part), keys)
        if not near:  # names the section, if that was misspelt
            return [dotted(right)] if n and right != path[:n] else []
        if n == len(path) - 1:
            return [dotted((*right, key)) for key in near]
        right, section = (*right, near[0]), section_at(section, near[0])
    return []


def _near(name: str, keys: list[str]) -> list[str]:
    """Keys that are spelt like `name`, or whose initials it is: lr for learning_rate."""
    initials = [key for key in keys if "_" in key and "".join(word[0] for word in key.split("_")) == name]
    return initials or difflib.get_close_matches(name, keys)


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
