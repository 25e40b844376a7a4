"""Recipe files and overrides: how they are found and parsed, with the place of every key."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.errors import ConfigError, MissingInput
from orchestrator.recipe.section import KeyPath
from orchestrator.recipe.strict_yaml import parse

PIPELINE = "pipeline"
SHARED_PART = re.compile(r"(.*-)?base")
"""Names of shipped files that recipes extend, and that are not recipes themselves."""
_OVERRIDE = re.compile(
    r"(?:(?P<stage>[A-Za-z0-9][A-Za-z0-9._-]*):)?(?P<key>[A-Za-z_]\w*(?:\.\w+)*)=(?P<value>.*)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Override:
    """One change on the command line. Example: sft:batch.effective=64."""

    text: str
    """The change as the user wrote it."""
    stage: str | None
    """Name of the stage that it changes; None: every stage."""
    keys: tuple[str, ...]
    """Path of the key. Example: ("batch", "effective")."""
    value: Any
    """The parsed value. Example: 64."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The place where a key was written."""

    text: str
    """The place in messages. Example: "dpo.yaml:12", "override `a.b=c`"."""
    own: bool
    """True for the file that the user named and for the command line; False for extended and shipped
    files."""
    change: Override | None = None
    """The override, if it was written on the command line."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Draft:
    """A recipe before validation."""

    data: dict[str, Any]
    """The mapping of a file, with what it extends and the overrides."""
    origins: dict[KeyPath, Origin]
    """The place of each key."""


def find(name: str | Path) -> Path:
    """The recipe file of a path or a built-in name. Raises MissingInput, with close matches, if there is
    none."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = builtin_recipes()
    key = path.as_posix().removesuffix(".yaml")
    if key in shipped:
        return shipped[key]
    close = neighbours(path) or difflib.get_close_matches(key.removeprefix("recipes/"), shipped)
    raise MissingInput(
        f"recipe {name} does not exist"
        if not path.is_dir()
        else f"recipe {name} is not a file: it is a folder",
        fix=f"did you mean {', '.join(close)}?"
        if close
        else "run `orchestrator recipes ls` to list the built-in recipes",
    )


def neighbours(missing: Path) -> list[str]:
    """Recipe files beside `missing` with similar names."""
    files = {file.stem: str(file) for file in missing.parent.glob("*.yaml")}
    return [files[stem] for stem in difflib.get_close_matches(missing.stem, files)]


def builtin_recipes() -> Mapping[str, Path]:
    """File of each recipe that comes with the program, sorted by name. Example of a name: `tiny/dpo`."""
    root = shipped_folder()
    files = (f for f in root.rglob("*.yaml") if SHARED_PART.fullmatch(f.stem) is None)
    return dict(sorted((f.relative_to(root).with_suffix("").as_posix(), f) for f in files))


def shipped_folder() -> Path:
    """The folder of the recipes that come with the program."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "_recipes"  # inside the package in a wheel, beside it in a checkout
    return packaged if packaged.is_dir() else package.parent / "recipes"


def parse_file(file: Path, *, own: bool) -> Draft:
    """The mapping of a recipe file. own: whether the user named the file. Raises ConfigError."""
    try:
        data, origins = parse(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}: the file is not UTF-8 at byte {error.start}", fix="save the file as UTF-8"
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{file}: the file does not hold a recipe",
            why="a recipe is a mapping of sections",
            fix="run `orchestrator recipes show tiny/dpo` to see one",
        )
    return Draft(data, {key: Origin(text, own) for key, text in origins.items()})


def parse_override(text: str) -> Override:
    """The override of a text such as `a.b=c` or `NAME:a.b=c`. Raises ConfigError."""
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"override `{text}` does not have the form key=value",
            fix="write e.g. batch.effective=64; write a list as a whole",
        )
    value, _ = parse(match["value"], f"override `{text}`")
    return Override(text, match["stage"], tuple(match["key"].split(".")), value)
