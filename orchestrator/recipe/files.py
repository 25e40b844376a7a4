"""Recipe files and overrides as they are written: found, parsed, each key with the place where it was
written."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.errors import ConfigError, MissingInput
from orchestrator.recipe.schema import Key
from orchestrator.recipe.strict_yaml import parse

PIPELINE = "pipeline"
SHARED_PART = re.compile(
    r"(.*-)?base"
)  # shipped files of these names are extended by recipes and are no recipes by themselves
_OVERRIDE = re.compile(
    r"(?:(?P<stage>[A-Za-z0-9][A-Za-z0-9._-]*):)?(?P<key>[A-Za-z_]\w*(?:\.\w+)*)=(?P<value>.*)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Override:
    """text: as the user wrote it. stage: None for every stage."""

    text: str
    stage: str | None
    keys: tuple[str, ...]
    value: Any


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a key was written: "file:line" or "override `a.b=c`". own: in the file that the user named or on
    the command line, not in one that it extends or that comes with the program."""

    text: str
    own: bool
    change: Override | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Draft:
    """A mapping before validation, and where each of its keys was written."""

    data: dict[str, Any]
    origins: dict[Key, Origin]


def find(name: str | Path) -> Path:
    """The recipe file of a path or a built-in name; MissingInput with close matches if there is none."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = builtin_recipes()
    key = path.as_posix().removesuffix(".yaml")
    if key in shipped:
        return shipped[key]
    close = neighbours(path) or difflib.get_close_matches(key.removeprefix("recipes/"), shipped)
    raise MissingInput(
        f"no recipe {name}" + (" (it is a folder)" if path.is_dir() else ""),
        fix=f"did you mean {', '.join(close)}?"
        if close
        else "`orchestrator recipes ls` lists the built-in recipes",
    )


def neighbours(missing: Path) -> list[str]:
    """Recipe files beside `missing` that are named nearly so."""
    files = {file.stem: str(file) for file in missing.parent.glob("*.yaml")}
    return [files[stem] for stem in difflib.get_close_matches(missing.stem, files)]


def builtin_recipes() -> Mapping[str, Path]:
    """Name -> file of the recipes that come with the program, e.g. `tiny/dpo`, sorted by name."""
    root = shipped_folder()
    files = (f for f in root.rglob("*.yaml") if SHARED_PART.fullmatch(f.stem) is None)
    return dict(sorted((f.relative_to(root).with_suffix("").as_posix(), f) for f in files))


def shipped_folder() -> Path:
    """The folder of the recipes that come with the program."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "_recipes"  # a wheel has them inside the package, a checkout beside it
    return packaged if packaged.is_dir() else package.parent / "recipes"


def parse_file(file: Path, *, own: bool) -> Draft:
    try:
        data, origins = parse(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 at byte {error.start}", fix="save the file as UTF-8") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{file}: holds no recipe",
            why="a recipe is a mapping of sections",
            fix="see `orchestrator recipes show tiny/dpo`",
        )
    return Draft(data, {key: Origin(text, own) for key, text in origins.items()})


def parse_override(text: str) -> Override:
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"override `{text}` is not of the form key=value",
            fix="write e.g. batch.effective=64; give a list as a whole",
        )
    value, _ = parse(match["value"], f"override `{text}`")
    return Override(text, match["stage"], tuple(match["key"].split(".")), value)
