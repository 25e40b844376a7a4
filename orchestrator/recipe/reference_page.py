"""The page docs/recipe-reference.md, generated from the schema.

    Recipe -> its sections in order -> a table of keys each: type and bounds, default, description, readers

`orchestrator config reference` prints it, and a test compares it with the committed page.
"""

import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from orchestrator.recipe.keys import ALWAYS, READERS, Readers
from orchestrator.recipe.schema import Recipe

HEAD = """# Recipe reference

A recipe is a YAML file with these sections. `extends: FILE` takes another recipe as its base, and `a.b=c`
on the command line sets one key. `orchestrator config schema` prints the JSON schema for editors. An
unknown key is an error that names the nearest one.

A file with `pipeline:` holds a list of stages instead. Each stage is a recipe with a `name`. In it
`stage:NAME` stands for the export of the earlier stage NAME (in `model.path`, `model.reference`,
`critic.model.path` and `rewards.functions[].model`). On the command line `NAME:a.b=c` sets a key of one
stage, and `a.b=c` sets it in every stage that reads it.

## Keys that a run does not read
The last column names the runs that read a key, if not all do. A key or section in your file or on the
command line that the run does not read is an error: it would have no effect, so remove it, even if it
repeats the default. Only null, `auto`, `[]` and `{{}}` may be written for any key of which they are the
default: they undo what an extended file sets. Two kinds of unread keys are not an error: keys of a file
under `extends` or of a shipped recipe, and keys that only a change on the command line left without an
effect (`run.max_steps=2` beside the file's `run.epochs`). `orchestrator plan` lists them, and the run has
their defaults.

The schema has {keys} keys. `tests/unit/settings` sets each of them to every legal kind of value, {values}
in all, from a file and from the command line. It also sets them to illegal values, and compares what two
values of each key change.

This page is generated from the schema: `orchestrator config reference > docs/recipe-reference.md`.
"""
KEYS, VALUES = 276, 1134
"""Numbers of keys and of values. tests/unit/settings/test_values.py counts them, and prints what to write
here."""
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def render() -> str:
    """The page as Markdown. A section that stands in several places is printed once."""
    places: dict[type[BaseModel], list[str]] = {}
    for path, section in _sections(Recipe, ""):
        places.setdefault(section, []).append(path)
    return HEAD.format(keys=KEYS, values=VALUES) + "".join(
        _section(paths, section) for section, paths in places.items()
    )


def _sections(section: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """(dotted path, section) of every section below `section`, depth first. `[]` stands for entries of a
    list."""
    for key, field in section.model_fields.items():
        for inner, many in _inside(field.annotation):
            below = f"{path}{key}{'[]' if many else ''}"
            yield below, inner
            yield from _sections(inner, f"{below}.")


def _inside(annotation: Any, many: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, many
    for argument in get_args(annotation):
        yield from _inside(argument, many or get_origin(annotation) is list)


def _section(paths: Sequence[str], section: type[BaseModel]) -> str:
    about = " ".join((section.__doc__ or "").split())
    readers = READERS.get(section, {})
    rows = "".join(_row(key, field, readers.get(key, ALWAYS)) for key, field in section.model_fields.items())
    text = f"\n{about}\n" if about else ""
    return f"\n## {', '.join(paths)}\n{text}\n| key | value | default | |\n|---|---|---|---|\n{rows}"


def _row(key: str, field: FieldInfo, readers: Readers) -> str:
    bounds = [
        f"{sign} {getattr(item, name):g}"
        for item in field.metadata
        for name, sign in BOUNDS
        if getattr(item, name, None) is not None
    ]
    about = field.description or ("See below." if any(_inside(field.annotation)) else "")
    about += f" **Read only {readers.words}.**" if readers.words else ""
    value = ", ".join([_type(field.annotation), *bounds])
    return f"| `{key}` | {value} | {_default(field)} | {_cell(about)} |\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return "its own"
    if field.default is None or field.default is PydanticUndefined:
        return "–"
    shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return f"`{list(shown) if isinstance(shown, tuple) else shown}`"


def _type(annotation: Any) -> str:
    """Name of a type. Example: "whole number", "list of texts"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _cell(" | ".join(f"`{value}`" for value in arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments if argument is not type(None))
    if origin is list:
        return "list of mappings" if any(_inside(arguments[0])) else f"list of {_type(arguments[0])}s"
    if origin is tuple:
        return f"list of {len(arguments)} {_type(arguments[0])}s"
    if origin is dict:
        return "mapping"
    if arguments:  # Annotated
        return _type(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return WORDS.get(annotation, "anything")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
