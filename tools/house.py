"""Counts what makes code hard to read, each figure with its limit. Exit code 1 if a figure is above its
limit.

    python tools/house.py [--list]

--list names the places behind each figure.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "orchestrator"
WIDTH = 110
WORDS = ("mend", "mends", "mended", "anew", "is no", "goes on", "where there is none", "trouble", "told")
"""Words that read as translated. Better: fix, again, is not a, continues, if there is none, problem,
reported."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One count."""

    name: str
    value: int
    limit: int
    """The largest value that is allowed."""
    places: tuple[str, ...]
    """What was counted, worst first."""


def figures() -> Iterator[Figure]:
    """All counts of this checkout."""
    entries = tuple(sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"))
    yield Figure("entries at the package's root", len(entries), 16, entries)
    circles = tuple(sorted(" -> ".join(group) for group in import_circles(module_imports())))
    yield Figure("import circles between files", len(circles), 0, circles)
    functions = sorted(
        ((lines, place) for file in python_files(PACKAGE) for lines, place in function_lengths(file)),
        reverse=True,
    )
    yield Figure(
        "lines of the longest function",
        functions[0][0],
        55,
        tuple(f"{place}: {lines}" for lines, place in functions[:20]),
    )
    files = sorted(
        ((len(file.read_text().splitlines()), shown(file)) for file in python_files(PACKAGE)), reverse=True
    )
    yield Figure(
        "lines of the largest file",
        files[0][0],
        450,
        tuple(f"{place}: {lines}" for lines, place in files[:20]),
    )
    wide = tuple(wide_lines())
    yield Figure(f"lines over {WIDTH} columns", len(wide), 0, wide)
    words = tuple(listed_words())
    yield Figure("words of the prose list", len(words), 19, words)


def python_files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def shown(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def function_lengths(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (
                (node.end_lineno or node.lineno) - node.lineno + 1,
                f"{shown(file)}:{node.lineno} {node.name}",
            )


def wide_lines() -> Iterator[str]:
    """Lines that ruff's E501 counts: a pragma at the end, or one long word, does not."""
    pragma = re.compile(r"  # (pyright|noqa|type|fmt)\b.*")
    for folder in ("orchestrator", "tests", "tools", "benchmarks", "dashboards", "examples"):
        for file in python_files(ROOT / folder):
            for number, line in enumerate(file.read_text().splitlines(), start=1):
                text = pragma.sub("", line)
                if len(text) > WIDTH and " " in text.strip():
                    yield f"{shown(file)}:{number}"


def listed_words() -> Iterator[str]:
    """Places of the listed words in the code, the docs (docs/log.md too) and the README."""
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, WORDS))})\b", re.IGNORECASE)
    for file in [*python_files(PACKAGE), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            yield from (f"{shown(file)}:{number} {match[0]}" for match in pattern.finditer(line))


def module_imports() -> dict[str, set[str]]:
    """Modules of the package that each module imports, inside functions too."""
    modules = {module_name(file): file for file in python_files(PACKAGE) if file.stem != "__init__"}
    return {module: imported_modules(file) & modules.keys() for module, file in modules.items()}


def import_circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, over however many steps."""
    reached = {module: reachable(module, imports) for module in imports}
    in_circle = [module for module in imports if module in reached[module]]
    groups = {tuple(sorted(other for other in reached[m] if m in reached.get(other, ()))) for m in in_circle}
    return [list(group) for group in sorted(groups)]


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def imported_modules(file: Path) -> set[str]:
    """Modules that a file imports; `from a import b` may name the module a or the module a.b."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def reachable(module: str, imports: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        new = imports.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--list", action="store_true", help="name the places")
    args = arguments.parse_args()
    beyond = False
    for figure in figures():
        beyond = beyond or figure.value > figure.limit
        print(
            f"{figure.name}: {figure.value} (at most "
            f"{figure.limit}){'' if figure.value <= figure.limit else '  <--'}"
        )
        for place in figure.places if args.list else ():
            print(f"    {place}")
    return int(beyond)


if __name__ == "__main__":
    sys.exit(main())
