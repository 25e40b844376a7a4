"""Keys that a recipe sets and its run does not read.

recipe, the mapping it was made from --READERS of recipe/keys.py--> UnreadKey, with its row
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.recipe.keys import ALWAYS, READERS, Readers
from orchestrator.recipe.schema import Columns, Recipe, Section
from orchestrator.recipe.section import KeyPath

NOTHING: tuple[Any, ...] = (None, "auto", [], {})
"""Values that ask for nothing if they are the default: they may be written anywhere, to undo what an extended
file sets."""


@dataclass(frozen=True, slots=True)
class UnreadKey:
    """A key, or a whole section, that a run does not read."""

    at: KeyPath
    """The key or section. Example: ("critic",)."""
    requests: tuple[KeyPath, ...]
    """Keys at or below `at` whose values ask for something. Example: (("critic", "export"),)."""
    readers: Readers
    """The condition that does not hold."""


def unread(recipe: Recipe, written: Mapping[str, Any]) -> tuple[UnreadKey, ...]:
    """Parts of `written`, the mapping that became `recipe`, that the run does not read. A section that it
    does not read at all is one entry."""
    return tuple(_unread(recipe, recipe, written, ()))


def _unread(
    recipe: Recipe, section: Section, written: Mapping[str, Any], path: KeyPath
) -> Iterator[UnreadKey]:
    rows = READERS.get(type(section), {})
    for key, value in written.items():
        at, held, row = (*path, key), getattr(section, key), rows.get(key, ALWAYS)
        if not row.reads(recipe, section):
            yield UnreadKey(at, tuple(_requests(section, key, value, at)), row.lacking(recipe, section))
        elif isinstance(held, Section) and isinstance(value, Mapping):
            yield from _unread(recipe, held, value, at)
        elif isinstance(held, list) and isinstance(value, list):
            for index, (inner, raw) in enumerate(zip(held, value, strict=True)):
                if isinstance(inner, Section):
                    yield from _unread(recipe, inner, raw, (*at, index))


def _requests(section: Section, key: str, value: Any, at: KeyPath) -> Iterator[KeyPath]:
    """Keys at or below `at` whose values ask for something. null of a column asks for nothing: it leaves the
    column out, and so does a run that does not read it."""
    held = getattr(section, key)
    if isinstance(held, Section) and isinstance(value, Mapping):
        for inner, raw in value.items():
            yield from _requests(held, inner, raw, (*at, inner))
    elif value not in NOTHING or (
        value != type(section).model_fields[key].default and not isinstance(section, Columns)
    ):
        yield at
