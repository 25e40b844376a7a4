"""Every block of commands in the README and in docs/ is run here, or a mark above it says why not.

    <!-- run -->                         as it stands, in the default suite
    <!-- run: slow -->                   as it stands, among the slow tests
    <!-- run: slow; with a.b=c -->       the same, with a.b=c added to each `orchestrator train`
    <!-- run: imports -->                Python, as it stands
    <!-- run: after the block above -->  Python that needs a file from the block before
    <!-- not run: reason -->

The blocks of a page are run in their order in one folder that is empty at first, with a separate home,
without the network.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.recipe.schema import Recipe
from orchestrator.recipe.validation import all_keys
from tests.running import REPOSITORY, Sandbox

pytestmark = pytest.mark.timeout(1800)

JOURNEYS = tuple(sorted((REPOSITORY / "docs" / "journeys").glob("*.md")))
"""Pages that test_journeys.py runs with a real model."""
PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), *JOURNEYS)
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>bash|sh|shell|python)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
MARK = re.compile(
    r"run|run: (?P<how>slow|imports|after the block above)(?:; with (?P<extra>\S+))?|not run: "
    r"(?P<reason>.{10,})"
)
INLINE = re.compile(r"`([a-z_]+\.[a-z_.]+)(?:=[^`]*)?`")


PROGRAMS = "orchestrator|python|ray|make|pip|kubectl|sbatch|sky|docker|wandb|launch/|export|source"
INDENTED = re.compile(rf"(?<=\n\n)    (?:\$ )?(?:\w+=\S+ )*(?:{PROGRAMS})\b")
"""A block of commands that is indented instead of fenced: it cannot have a mark."""
FILES = re.compile(r"`((?:tests|orchestrator|benchmarks|recipes|launch|docker|docs)/[\w./-]+)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of commands or Python."""

    place: str
    """Example: README.md:12"""
    language: str
    text: str
    mark: str | None
    """The text of the comment above the block; None without one."""

    @property
    def runs(self) -> bool:
        return self.mark is not None and self.mark.startswith("run")

    @property
    def slow(self) -> bool:
        return self.mark is not None and self.mark.startswith("run: slow")

    def script(self) -> str:
        """The block with the addition that its mark names."""
        extra = self.mark.partition("; with ")[2] if self.mark else ""
        return (
            re.sub(r"^(orchestrator train .*)$", rf"\1 {extra}", self.text, flags=re.MULTILINE)
            if extra
            else self.text
        )


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    result = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        result.append(Block(f"{page.name}:{line}", match["language"], match["text"], match["mark"]))
    return result


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    assert not INDENTED.search(page.read_text()), f"{page.name}: put commands into a ```bash block"
    for block in blocks(page):
        assert block.mark and MARK.fullmatch(block.mark), (
            f"{block.place}: no mark, or one that is not understood: {block.mark}"
        )


def run_page(page: Path, root: Path, slow: bool) -> Iterator[str]:
    """Runs the page's blocks in their order, slow ones only if `slow`. Yields what failed."""
    folder = root / "here"
    folder.mkdir()
    sandbox = Sandbox(root / "sandbox")
    try:
        for block in blocks(page):
            if not block.runs or (block.slow and not slow):
                continue
            done = run_block(block, folder, sandbox)
            if done.returncode:
                yield (
                    f"{block.place} ended with "
                    f"{done.returncode}:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
                )
    finally:
        sandbox.close()
        shutil.rmtree(folder, ignore_errors=True)


def run_block(block: Block, folder: Path, sandbox: Sandbox, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a block in `folder` as a reader does, with `more` environment variables."""
    environment = sandbox.environment() | {
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "PYTHONPATH": str(folder),
        **more,
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = (
        ["bash", "-euo", "pipefail", "-c", block.script()]
        if block.language == "bash"
        else [sys.executable, "-c", block.text]
    )
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


def with_blocks(slow: bool) -> list[Path]:
    return [
        page
        for page in PAGES
        if page not in JOURNEYS
        and any(block.slow if slow else block.runs and not block.slow for block in blocks(page))
    ]


@pytest.mark.parametrize("page", with_blocks(slow=False), ids=lambda page: page.name)
def test_quick_blocks_work(page: Path, tmp_path: Path) -> None:
    assert not list(run_page(page, tmp_path, slow=False))


@pytest.mark.slow
@pytest.mark.parametrize("page", with_blocks(slow=True), ids=lambda page: page.name)
def test_all_blocks_work(page: Path, tmp_path: Path) -> None:
    assert not list(run_page(page, tmp_path, slow=True))


def test_the_marks_are_needed(tmp_path: Path) -> None:
    """A block without a mark is found, and so is a mark without a reason."""
    page = tmp_path / "page.md"
    shortened = "<!-- run: slow; with run.max_steps=2 -->\n```bash\norchestrator train x\n```\n"
    page.write_text("```bash\nls\n```\n\n<!-- not run: no -->\n```bash\nls\n```\n\n" + shortened)
    marked = blocks(page)
    assert INDENTED.search("Do:\n\n    A=b orchestrator plan x\n") and not INDENTED.search(page.read_text())
    assert [bool(block.mark and MARK.fullmatch(block.mark)) for block in marked] == [False, False, True]
    assert marked[2].script() == "orchestrator train x run.max_steps=2\n" and marked[2].place == "page.md:11"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_key_that_is_named_exists(page: Path) -> None:
    keys = set(all_keys(Recipe, ""))
    wrong = []
    for line in page.read_text().splitlines():
        cells = (
            [cell for cell in line.split("|") if "(verl's" not in cell]
            if page.name == "coming-from.md"
            else [line]
        )
        named = [
            key for cell in cells for key in INLINE.findall(cell) if key.split(".")[0] in Recipe.model_fields
        ]
        wrong += [
            key for key in named if key not in keys and not key.endswith((".py", ".yaml", ".jsonl", ".json"))
        ]
    assert not wrong, f"{page.name} names keys that no recipe has: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    missing = [name for name in FILES.findall(page.read_text()) if not (REPOSITORY / name).exists()]
    assert not missing
