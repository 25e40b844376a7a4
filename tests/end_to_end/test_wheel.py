"""The wheel, installed without a checkout, has all that it needs, and trains."""

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.running import FEW, REPOSITORY, Sandbox, steps

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True, slots=True)
class Installed:
    """An environment with the wheel; a path file adds the dependencies of the tests' environment."""

    wheel: Path
    python: Path
    sandbox: Sandbox

    def run(self, *command: str | Path, timeout: float = 120) -> str:
        """Runs a command in a folder without a checkout, and returns what it printed."""
        folder = self.sandbox.root / "elsewhere"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            [str(part) for part in command],
            cwd=folder,
            env=self.sandbox.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def program(self, *arguments: str, timeout: float = 120) -> str:
        return self.run(self.python.parent / "orchestrator", *arguments, timeout=timeout)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """The wheel, built and installed without the network."""
    root = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(root)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    (wheel,) = root.glob("*.whl")
    venv.create(root / "venv", symlinks=True)
    python = root / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--quiet", str(wheel)], check=True)
    (packages,) = (root / "venv").glob("lib/python*/site-packages")
    # This is a path alone, so the editable install in that folder is not followed.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    sandbox = Sandbox(root / "sandbox")
    yield Installed(wheel, python, sandbox)
    sandbox.close()


def test_what_the_wheel_holds(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    assert "orchestrator/py.typed" in names
    recipes = {
        path.relative_to(REPOSITORY / "recipes").as_posix()
        for path in (REPOSITORY / "recipes").rglob("*.yaml")
    }
    assert {name.removeprefix("orchestrator/_recipes/") for name in names if "/_recipes/" in name} == recipes
    assert not [name for name in names if name.startswith(("tests/", "docs/")) or "__pycache__" in name]
    where = installed.run(installed.python, "-c", "import orchestrator, sys; print(orchestrator.__file__)")
    assert Path(where.strip()).is_relative_to(installed.python.parents[1])


def test_the_recipes_are_there_without_a_checkout(installed: Installed) -> None:
    listed = installed.program("recipes", "ls")
    assert "tiny/dpo" in listed and "dpo/llama-3-8b" in listed
    assert "extends: base.yaml" in installed.program("recipes", "show", "tiny/dpo")


@pytest.mark.slow
def test_it_trains(installed: Installed) -> None:
    overrides = (
        f"data.train={FEW % 'preference'}",
        "data.eval=null",
        "batch.effective=16",
        "run.max_steps=3",
        "learners.cpus_per_worker=0.5",
    )
    folder = installed.sandbox.root / "elsewhere" / "runs" / "tiny-dpo"
    installed.program("train", "tiny/dpo", *overrides, timeout=300)
    assert steps(folder) == [1, 2, 3]
    assert json.loads((folder / "export" / "config.json").read_text())["model_type"] == "llama"
