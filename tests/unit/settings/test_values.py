"""All settings: each key takes every legal type of value, from a file and from the command line, rejects
other values, and is rejected if its run does not read it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.core.errors import ConfigError
from orchestrator.recipe import reference_page
from orchestrator.recipe.files import builtin_recipes
from orchestrator.recipe.keys import ALWAYS, READERS
from orchestrator.recipe.loading import load
from orchestrator.recipe.pipeline import IgnoredKey
from orchestrator.recipe.schema import Recipe, Section
from orchestrator.recipe.strict_yaml import Dumper, parse
from tests.unit.settings.contexts import ALWAYS_HERE, BASE, NEVER_READ, NULLED, context
from tests.unit.settings.schema import Leaf, Value, illegal, leaves, legal

LEAVES = list(leaves())
HERE = "HERE_STANDS_THE_VALUE"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    (folder / "base.yaml").write_text(BASE)
    return folder


def changes(leaf: Leaf, given: tuple[str, ...], text: str) -> list[str]:
    """Overrides that set the key to `text`, in the place of %s or after the others."""
    if not any("%s" in change for change in given):
        return [*given, f"{leaf.path}={text}"]
    return [change.replace("%s", f"{leaf.name}: {text}") for change in given]


def written(folder: Path, overrides: list[str], text: str, name: str = "own.yaml") -> Path:
    """A file with BASE and the overrides. HERE in the overrides is replaced by `text` as it is."""
    tree, _ = parse(BASE, "base")
    for change in overrides:
        keys, _, value = change.partition("=")
        node, *rest = tree, *keys.split(".")
        for key in rest[:-1]:
            node = node.setdefault(key, {})
        node[rest[-1]] = parse(value, change)[0]
    model = tree["model"]
    if model.get("path") and model.get("tiny") == {} and text not in ("null", "~"):
        del model["tiny"]
    file = folder / name
    file.write_text(re.sub(f"['\"]?{HERE}['\"]?", lambda _: text, yaml.dump(tree, Dumper=Dumper)))
    return file


def of(file: Path, *overrides: str) -> tuple[Recipe, tuple[IgnoredKey, ...]]:
    (stage,) = load(file, overrides).stages
    return stage.recipe, stage.ignored


def value_at(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for part in path.split("."):
        value = getattr(value, part.removesuffix("[]"))
        value = value[0] if part.endswith("[]") else value
    return value


def same(value: Any, wanted: Any) -> bool:
    """Equal in value and in type, at any depth. NaN equals NaN."""
    return repr(value) == repr(wanted)


def given(leaf: Leaf, value: Value) -> tuple[str, ...]:
    return NULLED[leaf.path] if value.wanted is None and leaf.path in NULLED else context(leaf.path).read


@pytest.mark.parametrize(
    "leaf", [leaf for leaf in LEAVES if leaf.path not in NEVER_READ], ids=lambda leaf: leaf.path
)
def test_every_legal_value_arrives_as_it_is(folder: Path, leaf: Leaf) -> None:
    for value in legal(leaf):
        overrides = changes(leaf, given(leaf, value), value.text)
        from_file = written(folder, changes(leaf, given(leaf, value), HERE), value.text)
        for place, recipe in (
            ("command line", of(folder / "base.yaml", *overrides)[0]),
            ("file", of(from_file)[0]),
        ):
            assert same(value_at(recipe, leaf.path), value.wanted), (
                f"{leaf.path}: {value.text} from the {place}"
            )


@pytest.mark.parametrize(
    "leaf", [leaf for leaf in LEAVES if leaf.path not in NEVER_READ], ids=lambda leaf: leaf.path
)
def test_every_other_value_is_refused_by_name(folder: Path, leaf: Leaf) -> None:
    for text in illegal(leaf):
        overrides = changes(leaf, context(leaf.path).read, text)
        for place in (
            (folder / "base.yaml", *overrides),
            (written(folder, changes(leaf, context(leaf.path).read, HERE), text),),
        ):
            with pytest.raises(ConfigError) as refused:
                load(place[0], [str(change) for change in place[1:]])
            lines = [line.strip() for line in refused.value.why.splitlines() if line.strip()]
            assert any(line.startswith(leaf.path.replace("[]", "[0]")) for line in lines), (
                f"{text}: {refused.value}"
            )


UNREAD = [leaf for leaf in LEAVES if context(leaf.path).unread is not None and leaf.path.count(".")]


def wish(leaf: Leaf) -> Value | None:
    """A value that asks for something, even if it is the default."""
    return next((value for value in legal(leaf) if value.wanted not in (None, "auto", [], {})), None)


@pytest.mark.parametrize("leaf", UNREAD, ids=lambda leaf: leaf.path)
def test_a_key_that_nobody_reads_is_refused_where_the_user_wrote_it_and_listed_where_it_is_inherited(
    folder: Path, leaf: Leaf
) -> None:
    value, unread = wish(leaf), context(leaf.path).unread
    if value is None:  # a section: its keys are other leaves
        return
    assert unread is not None
    own = written(folder, changes(leaf, unread, HERE), value.text)
    name = leaf.path.replace("[]", "[0]")
    for file, overrides in ((folder / "base.yaml", changes(leaf, unread, value.text)), (own, [])):
        with pytest.raises(ConfigError, match="that this run does not read") as refused:
            load(file, overrides)
        keys = [line.strip().split(":")[0] for line in refused.value.why.splitlines() if line.strip()]
        assert any(name == key or name.startswith((f"{key}.", f"{key}[")) for key in keys), refused.value
    heir = folder / "heir.yaml"
    heir.write_text(f"extends: {own.name}\n")
    recipe, ignored = of(heir)
    assert [key for key in ignored if name == key.key or name.startswith(f"{key.key}[")], ignored
    assert load(heir).stages[0].recipe == recipe, "what is not read has no value"


def test_every_key_says_who_reads_it_and_is_tried_without_a_reader() -> None:
    for section in {leaf.holder for leaf in LEAVES}:
        assert READERS[section].keys() == section.model_fields.keys(), (
            f"recipe/keys.py: a row for every key of {section.__name__}"
        )
    for leaf in LEAVES:
        conditional = _conditional(leaf.path) and leaf.path not in ALWAYS_HERE
        assert (context(leaf.path).unread is not None) == conditional, f"{leaf.path}: fix its context"


def _conditional(path: str) -> bool:
    """Whether some runs do not read the key or a section that holds it."""
    section: type[Section] = Recipe
    for part in path.split("."):
        name = part.removesuffix("[]")
        if READERS[section][name] is not ALWAYS:
            return True
        section = next(
            (
                leaf.holder
                for leaf in LEAVES
                if leaf.path.startswith(path[: path.index(part) + len(part)] + ".")
            ),
            section,
        )
    return False


def test_the_reference_page_has_the_numbers() -> None:
    counts = len(LEAVES), sum(len(legal(leaf)) for leaf in LEAVES)
    assert counts == (reference_page.KEYS, reference_page.VALUES), (
        "write these numbers into recipe/reference_page.py"
    )


@pytest.mark.parametrize("name", builtin_recipes())
def test_shipped_recipes_set_nothing_that_they_do_not_read(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The recipes are copied into a user's folder, where their keys count as the user's."""
    from orchestrator.recipe.loading import recipe_files

    for file in recipe_files(builtin_recipes()[name]):
        (tmp_path / file.name).write_text(file.read_text())
    yours = ["model.path=mine", "data.train=mine.jsonl"] if name.startswith("start/") else []
    for stage in load(tmp_path / builtin_recipes()[name].name, yours).stages:
        assert not stage.ignored
