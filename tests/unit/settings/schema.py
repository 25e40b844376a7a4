"""Every key of the schema, with legal values and some illegal ones."""

import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from orchestrator.recipe.schema import NAME_PATTERN, Recipe, Section
from orchestrator.recipe.validation import inside


@dataclass(frozen=True, slots=True)
class Leaf:
    """A key at one place."""

    path: str
    """Dotted path, with `[]` for entries of a list. Example: "data.train[].weight"."""
    holder: type[Section]
    """Its section."""
    name: str
    """Its name in the section."""
    field: FieldInfo
    """Its field in the schema."""


@dataclass(frozen=True, slots=True)
class Value:
    """A legal value."""

    text: str
    """The value as YAML."""
    wanted: Any
    """The value in the recipe."""


def leaves(section: type[Section] = Recipe, prefix: str = "") -> Iterator[Leaf]:
    """Every key at every place, inside lists too. A key that holds a section is a key as well: it may be
    null, or written as a whole."""
    for name, field in section.model_fields.items():
        yield Leaf(prefix + name, section, name, field)
        inner = inside(field.annotation)
        if inner is not None:
            many = any(get_origin(member) is list for member in members(field.annotation))
            yield from leaves(inner, f"{prefix}{name}{'[]' if many else ''}.")  # pyright: ignore[reportArgumentType]


def members(annotation: Any) -> list[Any]:
    """The alternatives of a type; Annotated types stay as they are."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for member in get_args(annotation) for inner in members(member)]
    return [annotation]


def bounds(member: Any, field: FieldInfo) -> dict[str, float]:
    metadata = [*field.metadata, *(get_args(member)[1].metadata if get_origin(member) is Annotated else ())]
    return {
        name: getattr(item, name)
        for item in metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(item, name, None) is not None
    }


def legal(leaf: Leaf) -> list[Value]:
    """A value of every type that the key may have: both booleans, each literal, null, bounds, powers of ten,
    lists, mappings."""
    values = [value for member in members(leaf.field.annotation) for value in _of(member, leaf)]
    return list({value.text: value for value in values}.values())


def _of(member: Any, leaf: Leaf) -> list[Value]:
    kind = get_args(member)[0] if get_origin(member) is Annotated else member
    limits = bounds(member, leaf.field)
    if kind is type(None):
        return [Value("null", None), Value("~", None)]
    if kind is bool:
        return [Value("true", True), Value("false", False), Value("True", True)]
    if get_origin(kind) is Literal:
        return [Value(str(word), word) for word in get_args(kind)]
    if kind is int:
        low, high = math.ceil(limits.get("ge", limits.get("gt", 0) + 1)), limits.get("le", 1_000)
        power = 10 ** math.ceil(math.log10(max(low, 10)))
        return [Value(str(low), low), Value(f"{power:.0e}", power), Value(str(int(high)), int(high))]
    if kind is float:
        return _floats(limits)
    if kind is str:
        if get_origin(member) is Annotated:  # a time
            return [Value(text, text) for text in ("90s", "10m", "1h")]
        named = [Value("tiny", "tiny"), Value('"1e3"', "1e3")]
        return (
            named if _pattern(leaf) else [Value(text, text) for text in ("off", "plain.jsonl", "1e-5x", "no")]
        )
    if get_origin(kind) is tuple:
        return [Value("[0.5, 9e-1]", (0.5, 0.9))]
    if get_origin(kind) is list and get_args(kind)[0] is str:
        return [Value("[]", []), Value('[a, "1", "off"]', ["a", "1", "off"])]
    if get_origin(kind) is dict:
        return _mappings(get_args(kind)[1])
    return []  # sections, and lists of them: their keys are other leaves


def _floats(limits: dict[str, float]) -> list[Value]:
    numbers = [limits[name] for name in ("ge", "le") if name in limits]
    low = limits.get("ge", limits.get("gt", -1.0))
    high = limits.get("le", limits.get("lt", low + 2.0))
    inner = low + (high - low) / 4
    numbers += [inner, low + (high - low) * 1e-3]
    texts = [Value(repr(float(n)), float(n)) for n in numbers] + [Value(f"{inner:e}", float(f"{inner:e}"))]
    whole = math.floor(low) + 1
    return texts + (
        [Value(str(whole), float(whole))]
        if whole <= limits.get("le", math.inf) and whole < limits.get("lt", math.inf)
        else []
    )


def _mappings(inner: Any) -> list[Value]:
    if inner is float:
        return [Value("{sigmoid: 0.8, ipo: 1}", {"sigmoid": 0.8, "ipo": 1.0})]
    if inner is str:
        return [Value("{}", {}), Value('{X-Key: "KEY", other: "1"}', {"X-Key": "KEY", "other": "1"})]
    text = (
        '{a: true, b: false, c: null, d: .nan, e: [1, {f: [false]}, 1e3], g: "true", h: {}, i: -.inf, j: no}'
    )
    anything = {
        "a": True,
        "b": False,
        "c": None,
        "d": math.nan,
        "e": [1, {"f": [False]}, 1000.0],
        "g": "true",
        "h": {},
        "i": -math.inf,
        "j": "no",
    }
    return [Value("{}", {}), Value(text, anything)]


def _pattern(leaf: Leaf) -> bool:
    return any(getattr(item, "pattern", None) == NAME_PATTERN for item in leaf.field.metadata)


def illegal(leaf: Leaf) -> list[str]:
    """Illegal values of the key, as YAML."""
    kinds = [get_args(m)[0] if get_origin(m) is Annotated else m for m in members(leaf.field.annotation)]
    if inside(leaf.field.annotation) is not None:
        return []
    if any(get_origin(kind) is dict and Any in get_args(kind) for kind in kinds):
        return ["null", "true", "[[1]]", "5"]
    found = [] if type(None) in kinds else ["null"]
    numeric = float in kinds or int in kinds or any(get_origin(kind) is tuple for kind in kinds)
    found += ["true"] if bool not in kinds else ["maybe", "2"]
    found += ["[[1]]", "{a: {b: 1}}"]
    if numeric:
        found += ["much", ".nan", ".inf"]
        for member in members(leaf.field.annotation):
            found += _beyond(bounds(member, leaf.field))
    if int in kinds and float not in kinds:
        found += ["1.5"]
    if any(get_origin(kind) is Literal for kind in kinds) and str not in kinds:
        found += ["nothing-like-it"]
    if str in kinds and not numeric:
        found += ["5"]
    return found


def _beyond(limits: dict[str, float]) -> list[str]:
    below = [limits["ge"] - 1] if "ge" in limits else [limits["gt"]] if "gt" in limits else []
    above = [limits["le"] + 1] if "le" in limits else [limits["lt"]] if "lt" in limits else []
    return [f"{number:g}" for number in (*below, *above)]
