"""A mapping to a checked `config.Recipe`: no value changes its kind on the way, and one error lists every
problem.

mapping --mark what pydantic would quietly read as another value--> pydantic --problems in the recipe's words--> Recipe
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
from orchestrator.recipe.schema import DURATION_PATTERN, Key, Recipe

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
"""What no starting recipe can know, and how it is given on the command line."""


@dataclass(frozen=True)
class _Misplaced:
    """Stands for a value that pydantic would quietly read as another: `workers: true` is not one worker."""

    shown: str

    def __repr__(self) -> str:
        return self.shown


def validate(data: Mapping[str, Any], origins: Mapping[Key, object], name: str) -> Recipe:
    """The checked recipe. origins: where each key was written, by `str`. ConfigError lists `key: what (got
    value; where)`."""
    try:
        recipe = Recipe.model_validate(_mark(data, Recipe))
    except ValidationError as error:
        problems = _problems(error, data, origins)
        what = f"{name}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the recipe"
        raise ConfigError(what, why=listed(problems), fix=_cure(problems)) from error
    assert not any(isinstance(value, _Misplaced) for value in _values(recipe)), (
        "a mark was left in the recipe"
    )
    return recipe


def _cure(problems: list[str]) -> str:
    absent = [
        key
        for key in OWN
        if any(p.startswith(f"{key}: required") or p.startswith(f"{key}: set exactly one") for p in problems)
    ]
    if absent and len(absent) == len(problems):
        return f"give what is yours: {' '.join(dict.fromkeys(OWN[key] for key in absent))}"
    return "mend these keys; `orchestrator config schema` lists every key"


def listed(problems: list[str]) -> str:
    """Problems as the reason of an error, one a line."""
    return "".join(f"\n    {problem}" for problem in problems)


# ---- values that pydantic would change


def _mark(value: Any, annotation: Any) -> Any:
    """A copy of `value` in which booleans outside of boolean keys, and non-finite numbers, are marked as
    misplaced.

    What stands where the schema takes anything (options of rewards) is handed on as it is, and so is what it
    does not know at all: pydantic converts nothing there.
    """
    members = list(_members(annotation))
    if annotation is None or Any in members:
        return value
    if isinstance(value, dict):
        section = next((m for m in members if _is_section(m)), None)
        if section is not None:
            known = {k: field.annotation for k, field in section.model_fields.items()}
            return {k: _mark(v, known.get(k)) for k, v in value.items()}
        inner = next((get_args(m)[1] for m in members if get_origin(m) is dict), None)
        return {k: _mark(v, inner) for k, v in value.items()}
    if isinstance(value, list):
        inner = next((get_args(m)[0] for m in members if get_origin(m) in (list, tuple)), None)
        return [_mark(v, inner) for v in value]
    if isinstance(value, bool) and bool not in members:
        return _Misplaced(str(value).lower())
    return (
        _Misplaced(f"{value}, not finite") if isinstance(value, float) and not math.isfinite(value) else value
    )


def _members(annotation: Any) -> Iterator[Any]:
    """The alternatives of an annotation: int and None of `Annotated[int, …] | None`."""
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
    """Everything that a recipe holds, however deep."""
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
    return next((found for found in map(inside, get_args(annotation)) if found), None)


def section_at(section: type[BaseModel] | None, key: str | int) -> type[BaseModel] | None:
    """The section that stands at `key` of a section (or of a list of them)."""
    if isinstance(key, int) or section is None:
        return section
    return inside(section.model_fields[key].annotation) if key in section.model_fields else None


def all_keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """Dotted keys of a section and of those below it, but not of the entries of lists."""
    for key, field in section.model_fields.items():
        yield prefix + key
        inner = inside(field.annotation)
        if inner and str not in get_args(field.annotation):
            yield from all_keys(inner, f"{prefix}{key}.")


def dotted(path: Key) -> str:
    """("data", "train", 0, "path") as a person writes it: data.train[0].path."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def where(path: Key, origins: Mapping[Key, object]) -> object | None:
    """Where a key was written, or the nearest section that holds it."""
    return next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), None)


# ---- pydantic's findings in the recipe's words


def _problems(error: ValidationError, data: Mapping[str, Any], origins: Mapping[Key, object]) -> list[str]:
    must: dict[Key, list[str]] = {}
    said: dict[Key, str] = {}
    for item in error.errors():
        path, kind = _path(item["loc"], data, item["type"] == "missing"), item["type"]
        if kind in _MUST_BE:
            words = _MUST_BE[kind].format(**item.get("ctx", {}))
            must.setdefault(path, []).append(
                "a time such as 90s, 10m or 1h" if DURATION_PATTERN in words else words
            )
            said[path] = (
                f"must be {' or '.join(dict.fromkeys(must[path]))} (got {_shown(item['input'])}{_meant(item)}"
            )
        elif kind == "extra_forbidden":
            said |= {whole: f"unknown key{_suggestion(whole)} (" for whole in _leaves(path, item["input"])}
        else:
            said[path] = (
                "required, but not set ("
                if kind == "missing"
                else f"{item.get('ctx', {}).get('error', item['msg'])} ("
            )
    lines: list[str] = []
    for path, text in said.items():
        if not any(
            len(other) > len(path) and other[: len(path)] == path for other in said
        ):  # a union's other branches
            place = where(path, origins) or ""
            joint = "; " if place and not text.endswith("(") else ""
            lines.append(f"{dotted(path)}: {text}{joint}{place})".replace(" ()", ""))
    return lines


def _meant(item: Any) -> str:
    """The words ", did you mean …?" for text that is nearly one of the words of a key."""
    known = re.findall(r"'([^']*)'", item.get("ctx", {}).get("expected", ""))
    close = difflib.get_close_matches(str(item["input"]), known, n=3)
    return f", did you mean {' or '.join(close)}?" if close else ""


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


def _leaves(path: Key, value: Any) -> Iterator[Key]:
    """The keys that were written of an unknown one: of `optimiser: {lr: 1}` its optimiser.lr."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves((*path, key), inner)
    else:
        yield path


def _suggestion(path: Key) -> str:
    """The words ", did you mean …?": close keys of the same section, else the same key in another section."""
    close = _close(path)
    every = list(all_keys(Recipe, ""))
    close = (
        close
        or [key for key in every if key.endswith(f".{path[-1]}")]
        or difflib.get_close_matches(dotted(path), every, cutoff=0.75)
    )
    return f", did you mean {' or '.join(close[:3])}?" if close else ""


def _close(path: Key) -> list[str]:
    """Keys of the schema that are near to a path in each of its parts, as far as any is:
    optimizer.learning_rate for optimiser.lr."""
    section: type[BaseModel] | None = Recipe
    right: Key = ()
    for n, part in enumerate(path):
        known = list(section.model_fields) if section else []
        near = [part] if isinstance(part, int) or part in known else _near(str(part), known)
        if not near:
            return (
                [dotted(right)] if n and right != path[:n] else []
            )  # a section was misspelt, and has no such key
        if n == len(path) - 1:
            return [dotted((*right, key)) for key in near]
        right, section = (*right, near[0]), section_at(section, near[0])
    return []


def _near(name: str, known: list[str]) -> list[str]:
    """Names that are spelt alike, or of which it is the initials: lr for learning_rate."""
    initials = [key for key in known if "_" in key and "".join(word[0] for word in key.split("_")) == name]
    return initials or difflib.get_close_matches(name, known)


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
