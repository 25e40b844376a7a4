"""Strict YAML: the core types of YAML 1.2 (`off` and `no` are text, `1e-5` is a number), no repeated keys, no
aliases.
"""

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import yaml

from orchestrator.core.errors import ConfigError
from orchestrator.recipe.section import KeyPath


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's table: for each first character the (type, pattern) pairs that are tried in order."""
    types = (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
        (
            "float",
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
            list("-+.0123456789"),
        ),
    )
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, pattern, starts in types:
        for start in starts:
            table.setdefault(start, []).append((f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})\Z")))
    return table


class Loader(yaml.SafeLoader):
    """Rejects what a person would read differently from YAML."""

    yaml_implicit_resolvers: ClassVar = _resolvers()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not supported; use `extends`",
                problem_mark=self.peek_event().start_mark,
            )
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is not text; quote it", problem_mark=key.start_mark
                )
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is already set in line {lines[key.value]}",
                    problem_mark=key.start_mark,
                )
            lines[key.value] = key.start_mark.line + 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


class Dumper(yaml.SafeDumper):
    """Writes texts that Loader reads as the same values."""

    # quotes exactly the texts that the loader would not read as text
    yaml_implicit_resolvers: ClassVar = _resolvers()


def parse(text: str, name: str) -> tuple[Any, dict[KeyPath, str]]:
    """The value of a YAML text, and the place of each key as "name:line". A ConfigError names line and
    column."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        return (
            (None, {})
            if node is None
            else (loader.construct_document(node), {k: f"{name}:{line}" for k, line in _lines(node, ())})
        )
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ConfigError(
            f"{name}{f':{mark.line + 1}:{mark.column + 1}' if mark else ''}: {error.problem or error.context}"
        ) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{name}: the text is not YAML", why=str(error).splitlines()[0]) from error


def _lines(node: yaml.Node, path: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    """The line of each key below a node at `path`."""
    children = node.value if isinstance(node, yaml.MappingNode | yaml.SequenceNode) else ()
    for i, child in enumerate(children):
        key, value, mark = (
            (child[0].value, child[1], child[0]) if isinstance(child, tuple) else (i, child, child)
        )
        yield (*path, key), mark.start_mark.line + 1
        yield from _lines(value, (*path, key))
