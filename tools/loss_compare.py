"""Compares loss, gradient norm, reward and exported weights of the tiny recipes' first four steps: a change
that claims to leave the numbers alone shows it.

    # runs the recipes with this checkout and writes FOLDER/RECIPE.json
    python tools/loss_compare.py record FOLDER [RECIPE ...]
    # compares to the last digit; exit code 1 and the differences if they differ
    python tools/loss_compare.py compare A B [RECIPE ...]

A and B are folders of recorded curves, or checkouts, whose recipes are then run. Equal digits need one
machine; use `--rel 1e-5` for curves of two machines. Every stage of a pipeline takes four steps. An untrained
model's answers earn no reward by exact match, so the online recipes get a dense reward function
(tests/golden/near.py).
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = ("sft", "reward", "dpo", "kto", "demo", "grpo", "grpo_tool", "ppo", "rloo", "online_dpo", "rlhf")
ONLINE = {"grpo": "grpo", "grpo_tool": "grpo", "ppo": "ppo", "rloo": "rloo", "online_dpo": "online_dpo"}
"""The stage that samples, by recipe. rlhf is missing: its reward model is dense already."""
SMALL = (
    "run.max_steps=4",
    "evaluation.every=null",
    "evaluation.at_start=false",
    "checkpoint.every=null",
    "checkpoint.final=none",
    "tracking.wandb=off",
)
COMPARED = ("loss", "grad_norm", "reward/mean")
LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Curve:
    """One stage of a recipe."""

    stage: str
    """Name of the stage; empty for a recipe that is not a pipeline."""
    steps: list[dict[str, float]]
    """The compared metrics of each step."""
    sha256: str
    """Digest of the exported weights."""
    norm: float
    """Norm of the exported weights."""


def record(recipe: str, checkout: Path = REPOSITORY) -> list[Curve]:
    """Runs a tiny recipe with a checkout's code in separate processes. Raises RuntimeError with the end of
    its output if it fails."""
    overrides = list(SMALL)
    if recipe in ONLINE:
        near = f"{{name: near, function: {REPOSITORY / 'tests' / 'golden' / 'near.py'}:near}}"
        overrides.append(f"{ONLINE[recipe]}:rewards.functions=[{near}]")
    with tempfile.TemporaryDirectory(prefix="curves-") as name:
        output = Path(name) / "run"
        environment = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": name,
        }
        command = [
            sys.executable,
            "-m",
            "orchestrator",
            "train",
            f"tiny/{recipe}",
            *overrides,
            "--output",
            str(output),
        ]
        done = subprocess.run(
            command, cwd=name, env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"tiny/{recipe} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
        stages = sorted(
            {path.parent for path in output.rglob("metrics.jsonl")}, key=lambda path: path.stat().st_ctime
        )
        return [_curve(stage, "" if stage == output else stage.name) for stage in stages]


def _curve(run: Path, stage: str) -> Curve:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [{name: line[name] for name in COMPARED if name in line} for line in lines if "loss" in line]
    digest, squares = hashlib.sha256(), 0.0
    for path in sorted((run / "export").glob("*.safetensors")):
        digest.update(path.read_bytes())
        squares += sum(float(np.square(value, dtype=np.float64).sum()) for value in load_file(path).values())
    return Curve(stage, steps, digest.hexdigest(), math.sqrt(squares))


def read(path: Path) -> list[Curve]:
    """The curves in a recorded file."""
    return [Curve(**curve) for curve in json.loads(path.read_text())]


def write(path: Path, curves: Sequence[Curve]) -> None:
    """Writes curves; floats keep every bit."""
    path.write_text(json.dumps([asdict(curve) for curve in curves], indent=1) + "\n")


def differences(first: Sequence[Curve], second: Sequence[Curve], rel: float) -> Iterator[str]:
    """Yields what differs by more than `rel` of the number; with rel 0 every bit counts, also of the
    weights."""
    if [curve.stage for curve in first] != [curve.stage for curve in second]:
        yield f"stages {[curve.stage for curve in first]} and {[curve.stage for curve in second]}"
        return
    for a, b in zip(first, second, strict=True):
        for step, (x, y) in enumerate(zip(a.steps, b.steps, strict=True), start=1):
            yield from (f"{a.stage} step {step}: {difference}" for difference in _differing(x, y, rel))
        yield from (
            f"{a.stage} export: {difference}"
            for difference in _differing({"norm": a.norm}, {"norm": b.norm}, rel)
        )
        if rel == 0 and a.sha256 != b.sha256:
            yield f"{a.stage} export: sha256 {a.sha256[:12]} and {b.sha256[:12]}"


def _differing(a: dict[str, float], b: dict[str, float], rel: float) -> Iterator[str]:
    for name in sorted(a.keys() | b.keys()):
        x, y = a.get(name), b.get(name)
        if x is None or y is None or not (x == y or math.isclose(x, y, rel_tol=rel, abs_tol=rel)):
            yield f"{name} {x!r} and {y!r}"


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = arguments.add_subparsers(dest="verb", required=True)
    recording, comparing = verbs.add_parser("record"), verbs.add_parser("compare")
    recording.add_argument("folder", type=Path)
    comparing.add_argument("a", type=Path, metavar="A")
    comparing.add_argument("b", type=Path, metavar="B")
    comparing.add_argument(
        "--rel", type=float, default=0.0, help="relative difference that is allowed (default 0)"
    )
    for verb in (recording, comparing):
        verb.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"default: {' '.join(RECIPES)}")
    args = arguments.parse_args()
    recipes: Any = args.recipes or RECIPES
    if unknown := set(recipes) - set(RECIPES):
        arguments.error(f"no tiny recipe {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    if args.verb == "record":
        args.folder.mkdir(parents=True, exist_ok=True)
        for recipe in recipes:
            write(args.folder / f"{recipe}.json", record(recipe))
            print(f"{recipe}: recorded", flush=True)
        return 0
    failed = False
    for recipe in recipes:
        first, second = (
            record(recipe, side.resolve())
            if (side / "orchestrator").is_dir()
            else read(side / f"{recipe}.json")
            for side in (args.a, args.b)
        )
        lines = list(differences(first, second, args.rel))
        failed = failed or bool(lines)
        print(f"{recipe}: {'; '.join(lines) or 'equal'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
