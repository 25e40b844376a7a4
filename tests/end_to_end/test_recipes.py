"""Every shipped recipe takes two steps: its own loss and schedule, on a small model and rows that are here.

tests/golden runs the tiny ones, as they stand.
"""

import json
import math
from pathlib import Path

import pytest

from orchestrator.recipe.files import builtin_recipes
from orchestrator.recipe.loading import load
from orchestrator.recipe.schema import ONLINE
from tests.running import Sandbox, metrics
from tools.loss_compare import RECIPES

LARGE = tuple(name for name in builtin_recipes() if not name.startswith("tiny/"))
HERE = (
    "model.tiny={architecture: llama, hidden_size: 32, layers: 2, heads: 4}",
    "run.max_steps=2",
    "learners.gpus_per_worker=0",
    "learners.precision=fp32",
    "learners.workers=1",
    "checkpoint.every=null",
    "checkpoint.final=none",
    "evaluation.at_start=false",
    "tracking.wandb=off",
)
"""What the machine and the missing network ask for."""
SAMPLED = (
    "rollouts.engine=transformers",
    "rollouts.workers=1",
    "rollouts.gpus_per_worker=0",
    "rollouts.prompts=16",
    "rollouts.samples=4",
    "rollouts.max_new_tokens=8",
    "batch.effective=32",
)


def test_the_tiny_ones_have_their_curves() -> None:
    assert {f"tiny/{name}" for name in RECIPES} == set(builtin_recipes()) - set(LARGE)


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_takes_two_steps(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    own = ["model.tiny={}", f"data.train={file}", "data.eval=null"]
    algorithm = load(name, own).stages[0].recipe.algorithm.name
    file.write_text("".join(json.dumps(row(algorithm, n)) + "\n" for n in range(40)))
    changes = [*HERE, f"data.train=[{{path: {file}}}]", "data.eval=null", "evaluation.every=null"]
    changes += [*SAMPLED, "data.columns={}"] if algorithm in ONLINE else ["batch.effective=16"]
    sandbox = Sandbox(tmp_path / "sandbox")
    done = sandbox.run("train", name, *changes, "--in-process", "--output", tmp_path / "run")
    sandbox.close()
    assert done.code == 0, done.out + done.err
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert (tmp_path / "run" / "export" / "config.json").is_file()


def row(algorithm: str, n: int) -> dict[str, str]:
    """A row that the algorithm reads."""
    if algorithm in ONLINE:
        return {"prompt": f"{n}+1=", "answer": str(n + 1)}
    if algorithm == "sft":
        return {"prompt": f"{n}+1=", "completion": str(n + 1)}
    return {"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": str(n)}
