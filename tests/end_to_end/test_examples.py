"""The examples run as they stand, on Ray's workers and in one process; a loss by file is a loss by name."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.core.errors import ConfigError
from tests.running import REPOSITORY, Sandbox, metrics

EXAMPLES = REPOSITORY / "examples"
OWN = EXAMPLES / "own_loss.py"
SMALL = (
    "run.max_steps=4",
    "batch.effective=16",
    "data.train=[{path: toy:preference, max_rows: 64}]",
    "data.eval=null",
    "evaluation.every=null",
    "checkpoint.every=null",
    "checkpoint.final=none",
    "tracking.wandb=off",
)
pytestmark = pytest.mark.timeout(300)


def example(name: str, tmp_path: Path, *arguments: str) -> list[str]:
    """The lines of its steps."""
    sandbox = Sandbox(tmp_path / "sandbox")
    environment = sandbox.environment() | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    sandbox.close()
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "runs").glob("example-*/*.safetensors"))
    return [line for line in done.stdout.splitlines() if line.startswith("step ")]


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_gives_the_same_steps_on_ray_and_in_one_process(name: str, tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "here").mkdir()
    on_ray, here = example(name, tmp_path / "ray"), example(name, tmp_path / "here", "--no-ray")
    assert len(on_ray) == len(here) >= 15
    for one, other in zip(on_ray, here, strict=True):
        assert numbers(one) == pytest.approx(numbers(other), rel=1e-3, abs=2e-3)


def numbers(line: str) -> list[float]:
    return [float(word.rstrip(",:")) for word in line.split() if word.rstrip(",:").replace(".", "").isdigit()]


def test_a_loss_by_file_gives_the_curve_of_the_same_loss_by_name(tmp_path: Path) -> None:
    """In a run of two DeepSpeed workers, which load it by its path."""
    sandbox, curves = Sandbox(tmp_path / "sandbox"), []
    for name, change in (("named", ()), ("own", (f"algorithm.loss={OWN}:dpo",))):
        done = sandbox.run("train", "tiny/dpo", *SMALL, *change, "--output", tmp_path / name)
        assert done.code == 0, done.err
        lines = metrics(tmp_path / name)
        curves.append([line[key] for line in lines for key in ("loss", "grad_norm", "rewards/margins")])
    sandbox.close()
    assert curves[0] == pytest.approx(curves[1], rel=1e-6) and len(curves[0]) == 12


@pytest.mark.parametrize(("function", "code"), [("dpo", 0), ("averaged", 70)])
def test_verify_tells_a_sum_from_an_average_of_a_micro_batch(
    function: str, code: int, tmp_path: Path
) -> None:
    file = tmp_path / "loss.py"
    average = "    return losses.mean()\n"
    source = OWN.read_text()
    head = source[source.index("def dpo") : source.index("    return losses.sum()")]
    file.write_text(source.replace("def main", f"{head.replace('dpo', 'averaged')}{average}\n\ndef main"))
    sandbox = Sandbox(tmp_path / "sandbox")
    change = f"algorithm.loss={file}:{function}"
    done = sandbox.run("verify", "tiny/dpo", *SMALL, change, "--workers", "1", "--steps", "2")
    sandbox.close()
    assert done.code == code, done.out + done.err
    assert ("count of `units`" in done.err) == bool(code)


def test_rows_in_memory_and_a_callback(tmp_path: Path) -> None:
    """Twice the same call: the second resumes, and finds nothing left to do."""
    rows = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(32)]
    seen: list[Any] = []
    outcome = orchestrator.train(
        "tiny/dpo",
        *SMALL[:2],
        *SMALL[3:],
        output=tmp_path / "run",
        rows=rows,
        callbacks=[seen.append],
        in_process=True,
    )
    assert [report.step for report in seen] == [1, 2, 3, 4]
    assert math.isclose(seen[0].metrics["loss"], math.log(2.0), rel_tol=1e-5)
    assert outcome.steps == 4 and (outcome.export / "config.json").is_file()


def test_a_session_takes_the_steps_of_a_run(tmp_path: Path) -> None:
    """Over the end of an epoch, whose last batch is smaller, and with a reference of its own."""
    other = tmp_path / "other"
    tiny = orchestrator.load_recipe("tiny/dpo", "run.seed=7", *SMALL[:1])
    with orchestrator.Session(tiny, in_process=True) as session:
        session.save(other)
    changes = (*SMALL, f"model.reference={other}", "batch.effective=24", "data.remainder=use")
    recipe = orchestrator.load_recipe("tiny/dpo", *changes)
    orchestrator.train(recipe, output=tmp_path / "run", in_process=True)
    wanted = [(line["loss"], line["grad_norm"]) for line in metrics(tmp_path / "run")]
    taken = []
    with orchestrator.Session(recipe, in_process=True) as session:
        for step in range(session.steps):
            loss = session.forward_backward(session.examples(step), step).loss
            taken.append((loss, session.optim_step(step).grad_norm))
    assert taken == wanted and len(taken) == 4
    assert abs(taken[0][0] - math.log(2.0)) > 1e-3, "the policy does not start as this reference"


def test_an_online_session_takes_the_steps_of_a_run(tmp_path: Path) -> None:
    """KL in the reward too, which needs log-probs of the learner and of the reference."""
    (tmp_path / "short.py").write_text(
        "def short(completions, **_):\n    return [-len(c) for c in completions]\n"
    )
    recipe = orchestrator.load_recipe(
        {
            "run": {"max_steps": 3},
            "model": {"tiny": {"hidden_size": 32, "heads": 2, "layers": 1}},
            "data": {"train": "toy:prompts"},
            "algorithm": {"name": "rloo", "kl": {"coefficient": 0.05, "place": "reward"}},
            "batch": {"effective": 16},
            "optimizer": {"learning_rate": 1e-3},
            "learners": {"workers": 1},
            "rollouts": {"workers": 1, "prompts": 4, "samples": 4, "max_new_tokens": 6},
            "rewards": {"functions": [{"name": "short", "function": f"{tmp_path}/short.py:short"}]},
            "tracking": {"wandb": "off"},
        }
    )
    orchestrator.train(recipe, output=tmp_path / "run", in_process=True)
    wanted = [(line["loss"], line["grad_norm"], line["reward/mean"]) for line in metrics(tmp_path / "run")]
    taken = []
    with orchestrator.Session(recipe, in_process=True) as session:
        with pytest.raises(ConfigError, match=r"generate\(step\)"):
            session.examples(0)
        with pytest.raises(ConfigError, match=r"\[4, 4, 4, 4\]"):
            session.with_advantages(session.generate(0), [[1.0] * 3] * 4)
        for step in range(session.steps):
            groups = session.generate(step)
            rewards = [[-float(len(r.completion)) for r in group.rollouts] for group in groups]
            loss = session.forward_backward(session.with_advantages(groups, rewards), step).loss
            mean = sum(map(sum, rewards)) / sum(map(len, rewards))
            taken.append((loss, session.optim_step(step).grad_norm, mean))
    assert taken == wanted and len({norm for _, norm, _ in taken}) == 3


def test_recipes_come_from_mappings_too() -> None:
    recipe = orchestrator.load_recipe(
        {
            "model": {"tiny": {}},
            "data": {"train": "toy:sft"},
            "algorithm": {"name": "sft"},
            "batch": {"effective": 8},
            "optimizer": {"learning_rate": 1e-3},
        },
        "run.max_steps=3",
    )
    assert (recipe.run.max_steps, recipe.algorithm.name) == (3, "sft")
    assert orchestrator.load_recipe(recipe) == recipe
    with pytest.raises(ConfigError, match="pipeline of sft, grpo"):
        orchestrator.load_recipe("tiny/grpo")


def test_the_public_names_are_there_and_nothing_else_is_loaded() -> None:
    code = (
        "import sys, orchestrator\n"
        "print([m for m in sys.modules if m.startswith(('torch', 'ray', 'orchestrator.'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout.strip() == "[]"
    page = (REPOSITORY / "docs" / "python.md").read_text()
    for name in orchestrator.PUBLIC:
        assert getattr(orchestrator, name).__doc__ and f"`{name}`" in page, name
