"""Merging of recipes: `extends` puts a file on top of another, overrides come on top of both."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from orchestrator.core.errors import ConfigError, MissingInput
from orchestrator.recipe.files import PIPELINE, Draft, Origin, Override, neighbours, parse_file
from orchestrator.recipe.schema import Recipe
from orchestrator.recipe.validation import section_at


def extend(draft: Draft, file: Path, chain: tuple[Path, ...]) -> Draft:
    """`draft`, written in `file`, on top of the recipe that it extends. chain: files that extend `file`."""
    own = {k: v for k, v in draft.data.items() if k != "extends"}
    target = draft.data.get("extends")
    if target is None:
        return Draft(own, draft.origins)
    place = f"{draft.origins.get(('extends',), file)}: extends"
    if not isinstance(target, str):
        raise ConfigError(
            f"{place}: must be the path of a recipe file (got {target!r})",
            fix="name one file, relative to this one",
        )
    base_file, chain = file.parent / target, (*chain, file.resolve())
    if not base_file.is_file():
        close = neighbours(base_file)
        fix = (
            f"did you mean {', '.join(close)}?"
            if close
            else "write the path relative to the file that holds `extends`"
        )
        raise MissingInput(f"{place}: file {base_file} does not exist", fix=fix)
    if base_file.resolve() in chain:
        circle = " -> ".join(p.name for p in (*chain, base_file.resolve()))
        raise ConfigError(
            f"{place}: files extend each other in a circle", why=circle, fix="remove one `extends`"
        )
    base = parse_file(base_file, own=False)
    if PIPELINE in base.data:
        raise ConfigError(f"{place}: {base_file} is a pipeline", fix="extend the file of one of its stages")
    base = extend(base, base_file, chain)
    model = own.get("model")
    touched = {k for k, v in model.items() if v is not None} if isinstance(model, dict) else set[str]()
    return Draft(
        settle_model(merge(base.data, own, Recipe), base.data, touched), {**base.origins, **draft.origins}
    )


def merge(base: Mapping[str, Any], over: Mapping[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """`over` on top of `base`. Sections are merged key by key; values, lists and loss mixes are replaced as a
    whole."""
    merged = dict(base)
    for key, value in over.items():
        inner, old = section_at(section, key), merged.get(key)
        merged[key] = (
            merge(old, value, inner) if inner and isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def settle_model(data: dict[str, Any], before: Mapping[str, Any], touched: set[str]) -> dict[str, Any]:
    """Removes model.path if model.tiny has just been set, and the other way round: only one may be set.

    before: the mapping before the change. touched: keys of `model` that the change sets.
    """
    old, new = before.get("model"), data.get("model")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return data
    stale = {"tiny"} & old.keys() if "path" in touched else set[str]()
    stale |= {"path"} if "tiny" in touched else set()
    if "tiny" in touched or new.get("path") != old.get("path"):
        stale |= {"revision"}  # of the old path
    return {**data, "model": {k: v for k, v in new.items() if k not in stale - touched}}


def apply_overrides(draft: Draft, changes: Sequence[Override]) -> Draft:
    """The draft with the key of every change set. Later changes win; missing sections are created."""
    data, origins = copy.deepcopy(draft.data), dict(draft.origins)
    for change in changes:
        node = data
        for depth, key in enumerate(change.keys[:-1], start=1):
            if node.get(key) is None:
                node[key] = {}
            if not isinstance(node[key], dict):
                name = ".".join(change.keys[:depth])
                kind = (
                    "a list, which cannot be indexed"
                    if isinstance(node[key], list)
                    else f"{node[key]!r}, which has no keys"
                )
                raise ConfigError(
                    f"override `{change.text}`: {name} is {kind}", fix=f"set it as a whole: {name}=…"
                )
            node = node[key]
        node[change.keys[-1]] = change.value
        origins = {key: origin for key, origin in origins.items() if key[: len(change.keys)] != change.keys}
        origins[change.keys] = Origin(f"override `{change.text}`", own=True, change=change)
    touched = {c.keys[1] for c in changes if len(c.keys) > 1 and c.keys[0] == "model" and c.value is not None}
    return Draft(settle_model(data, draft.data, touched), origins)
