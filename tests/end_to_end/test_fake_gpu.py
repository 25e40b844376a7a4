"""Every tiny recipe on a machine where torch.cuda.is_available() is true and nothing is placed on a GPU.

tests/fake_gpu forges the answer in all processes, Ray's workers too, and for all libraries. Such a run fails
in a module that asks whether the machine has a GPU instead of which device it computes on. (Once no command
worked on a GPU host for this reason.)
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import FEW, REPOSITORY, Sandbox, steps

pytestmark = pytest.mark.timeout(600)

FAKE = {"PYTHONPATH": str(REPOSITORY / "tests" / "fake_gpu")}
TINY = sorted(p.stem for p in (REPOSITORY / "recipes" / "tiny").glob("*.yaml") if "base" not in p.stem)
DEFAULT = ("dpo",)
"""Recipes of the default suite; the others take the same paths and are slow tests."""

LOOK = """
import sys
import torch
from typer.testing import CliRunner
from orchestrator.cli.main import app
assert torch.cuda.is_available()
for recipe in sys.argv[1:]:
    for command in (["plan", recipe], ["inspect", recipe]):
        done = CliRunner().invoke(app, command)
        print(recipe, command[0], done.exit_code, repr(done.exception), flush=True)
"""


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", FAKE["PYTHONPATH"])
    monkeypatch.delenv("FAKE_GPU_FOR", raising=False)  # set if the suite itself runs with the fake GPU
    box = Sandbox(tmp_path)
    yield box
    box.close()


def test_every_process_sees_the_fake_gpu() -> None:
    code = "import torch, subprocess, sys; print(torch.cuda.is_available()); " + (
        "sys.stdout.flush(); subprocess.run([sys.executable, '-c', 'import torch.cuda; "
        "print(torch.cuda.is_available())'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": "", **FAKE}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "True"]


def test_every_tiny_recipe_is_planned_and_its_first_batch_shown(sandbox: Sandbox) -> None:
    recipes = [f"tiny/{name}" for name in TINY]
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *recipes],
        env=sandbox.environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = done.stdout.splitlines()
    failed = [line for line in lines if " 0 None" not in line]
    assert done.returncode == 0 and len(lines) == 2 * len(recipes), done.stderr[-3000:]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    "name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in TINY]
)
def test_every_tiny_recipe_trains_a_step_on_the_cpu(sandbox: Sandbox, tmp_path: Path, name: str) -> None:
    command = ["train", f"tiny/{name}", "tracking.wandb=off", "--output", tmp_path / "run"]
    overrides = ["evaluation.at_start=false", "run.max_steps=1"]
    pipeline = name in ("demo", "rlhf")  # its keys belong to stages
    done = sandbox.run(*command, *([] if pipeline else overrides), timeout=500)
    assert done.code == 0, done.err
    runs = [file.parent for file in (tmp_path / "run").rglob("metrics.jsonl")]
    assert runs and all(steps(run)[-1] >= 1 for run in runs)


@pytest.mark.slow
def test_evaluate_and_verify_compute_on_the_cpu(sandbox: Sandbox) -> None:
    few = (f"data.train={FEW % 'preference'}", "batch.effective=16", "learners.cpus_per_worker=0.5")
    evaluated = sandbox.run("evaluate", "tiny/dpo", "evaluation.max_examples=16")
    assert evaluated.code == 0 and "preference_accuracy" in evaluated.out, evaluated.err
    verified = sandbox.run("verify", "tiny/dpo", *few, "--steps", "1", timeout=400)
    assert verified.code == 0, verified.err
