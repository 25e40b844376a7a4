"""Effects of keys that only a run can show. One run has all first values, another run all second ones.

tests/end_to_end/test_settings.py makes the runs on a shared Ray, and compares their folders.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.running import every_line


@dataclass(frozen=True, slots=True)
class Run:
    """Two values of a key and what each leaves in the run folder."""

    kind: Literal["rows", "rollouts"]
    """Kind of the run."""
    values: tuple[str, str]
    """The values as YAML."""
    see: Callable[[Path], Any]
    """Reads the effect from the run folder."""
    wanted: tuple[Any, Any]
    """The effect of each value."""


def plan(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "plan.json").read_text())


def steps(folder: Path) -> list[dict[str, Any]]:
    return [
        line
        for line in every_line(folder / "metrics.jsonl")
        if not any(name.startswith("eval/") for name in line)
    ]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [
        line
        for line in every_line(folder / "metrics.jsonl")
        if any(name.startswith("eval/") for name in line)
    ]


def samples(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Samples of a kind, of the first step that has some."""
    lines = [line for line in every_line(folder / "samples.jsonl") if line["kind"] == kind]
    return [line for line in lines if line["step"] == lines[0]["step"]]


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


def kept_reference(folder: Path) -> list[str]:
    """The folder beside the run that holds its reference log-probs, by the run's name."""
    name = "first" if (folder / "export" / "README.md").read_text().count("first") else "second"
    return [
        path.name
        for path in folder.parent.glob("kept-*")
        if path.name.endswith(name) and list(path.rglob("part-*.safetensors"))
    ]


def _count(kind: str) -> Callable[[Path], int]:
    return lambda folder: len(samples(folder, kind))


def _passed(folder: Path) -> list[float]:
    return [
        value
        for name, value in evaluations(folder)[-1].items()
        if name.startswith("eval/pass@") and name != "eval/pass@1"
    ]


RUNS: Mapping[str, Run] = {
    # ---- DPO on rows
    "run.name": Run(
        "rows",
        ("first", "second"),
        lambda f: (f / "export" / "README.md").read_text().count("second") > 0,
        (False, True),
    ),
    "run.max_steps": Run("rows", ("3", "6"), lambda f: len(steps(f)), (3, 6)),
    "batch.effective": Run(
        "rows", ("8", "16"), lambda f: plan(f)["arithmetic"].split(" = ")[0], ("8 pairs", "16 pairs")
    ),
    "batch.layout": Run(
        "rows", ("padded", "prefix_shared"), lambda f: plan(f)["cut"]["layout"], ("padded", "prefix_shared")
    ),
    "learners.workers": Run(
        "rows", ("1", "2"), lambda f: len(list((f / "logs").glob("learner-*.log"))), (1, 2)
    ),
    "reference.cache_dir": Run(
        "rows", ("ROOT/kept-first", "ROOT/kept-second"), kept_reference, (["kept-first"], ["kept-second"])
    ),
    "checkpoint.every": Run("rows", ("1", "2"), lambda f: checkpoints(f)[-1] - checkpoints(f)[-2], (1, 2)),
    "checkpoint.keep": Run("rows", ("2", "3"), lambda f: len(checkpoints(f)), (2, 3)),
    "evaluation.every": Run(
        "rows",
        ("1", "3"),
        lambda f: [line["step"] for line in evaluations(f) if line["step"]],
        ([1, 2, 3], [3, 6]),
    ),
    "evaluation.at_start": Run(
        "rows", ("false", "true"), lambda f: evaluations(f)[0]["step"] == 0, (False, True)
    ),
    "evaluation.max_examples": Run("rows", ("4", "6"), lambda f: plan(f)["data"]["held_out"], (4, 6)),
    "evaluation.worst_pairs": Run("rows", ("2", "5"), _count("pair"), (2, 5)),
    "evaluation.generate.max_new_tokens": Run(
        "rows",
        ("2", "9"),
        lambda f: max(len(line["completion"]) for line in samples(f, "generation")) <= 2,
        (True, False),
    ),
    "evaluation.generate.max_prompts": Run("rows", ("2", "3"), _count("generation"), (2, 3)),
    "tracking.wandb": Run("rows", ("offline", "off"), lambda f: (f / "wandb").is_dir(), (True, False)),
    # ---- PPO
    "algorithm.epochs": Run("rollouts", ("1", "2"), lambda f: steps(f)[0]["optimizer_steps"], (1, 2)),
    "algorithm.kl.target": Run(
        "rollouts",
        ("1e-12", "1"),
        lambda f: steps(f)[1]["kl_coefficient"] > steps(f)[0]["kl_coefficient"],
        (True, False),
    ),
    "algorithm.kl.horizon": Run(
        "rollouts", ("1", "64"), lambda f: round(steps(f)[0]["kl_coefficient"], 6), (0.08, 0.09)
    ),
    "rollouts.workers": Run(
        "rollouts", ("1", "2"), lambda f: len(list((f / "logs").glob("rollout-*.log"))), (1, 2)
    ),
    "rollouts.prompts": Run(
        "rollouts", ("4", "8"), lambda f: len({line["prompt_id"] for line in samples(f, "rollout")}), (4, 8)
    ),
    "rollouts.samples": Run(
        "rollouts", ("2", "4"), lambda f: max(line["sample"] for line in samples(f, "rollout")) + 1, (2, 4)
    ),
    "rollouts.max_new_tokens": Run(
        "rollouts", ("3", "6"), lambda f: steps(f)[0]["completions/max_length"], (3.0, 6.0)
    ),
    "rollouts.bucket_mb": Run(
        "rollouts", ("256", "1e-2"), lambda f: steps(f)[0]["weights/buckets"] > 1, (False, True)
    ),
    "critic.warmup_steps": Run("rollouts", ("0", "1"), lambda f: "loss" in steps(f)[0], (True, False)),
    "critic.export": Run(
        "rollouts", ("false", "true"), lambda f: (f / "export-critic").is_dir(), (False, True)
    ),
    "evaluation.max_prompts": Run("rollouts", ("2", "3"), _count("generation"), (2, 3)),
    "evaluation.pass_at_k": Run(
        "rollouts", ("2", "3"), lambda f: "eval/pass@3" in evaluations(f)[-1], (False, True)
    ),
    "evaluation.pass_reward": Run("rollouts", ("2", "-1"), _passed, ([0.0], [1.0])),
    "rewards.functions[].name": Run(
        "rollouts", ("one", "other"), lambda f: "reward/other" in steps(f)[0], (False, True)
    ),
}
