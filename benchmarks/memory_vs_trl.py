"""Peak memory of a DPO run: all processes of `orchestrator train` against TRL's one.

    python benchmarks/memory_vs_trl.py --data PREFERENCES.jsonl --model FOLDER [--pairs 8]
        [--micro-batch 8] [--rounds 2] [--gate 0.6]

Both take two optimizer steps in fp32 on the same pairs (dpo_vs_trl.py's, cut to short texts). The benchmark
compares the peak of the summed PSS of all processes of a run (a page that n processes share counts 1/n in
each), sampled ten times a second: the driver, the process that workers are forked from, Ray's processes, and
the workers. TRL runs with its default of 8 pairs in a micro-batch, orchestrator as a user runs it. The exit
code is 1 if the median ratio is above --gate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dpo_vs_trl import STEPS, Job, write_pairs

MARK = "ORCHESTRATOR_MEMORY_BENCHMARK"
"""Environment variable that all processes of a run inherit, wherever they are in the tree of processes."""
EVERY_S = 0.1


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", required=True, type=Path, help="JSONL with prompt, chosen, rejected")
    arguments.add_argument(
        "--model", required=True, type=Path, help="a folder with a model, its tokenizer and chat template"
    )
    arguments.add_argument("--pairs", type=int, default=8)
    arguments.add_argument("--micro-batch", type=int, default=8, help="TRL's, in pairs")
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--gate", type=float, default=float("inf"), help="greatest ratio")
    args = arguments.parse_args()
    model = str(args.model.resolve())
    ratios = []
    with tempfile.TemporaryDirectory(prefix="memory-vs-trl-") as name:
        folder = Path(name)
        write_pairs(folder, args.data, args.pairs, model, short=True)
        job = Job(args.pairs, args.micro_batch, model, True)
        trl = [
            sys.executable,
            str(Path(__file__).resolve().with_name("dpo_vs_trl.py")),
            "--data",
            "",
            "--child",
            "trl",
            json.dumps(asdict(job)),
        ]
        for number in range(args.rounds):
            theirs = show("TRL", peak(trl, folder))
            ours = show("orchestrator", peak(train_command(folder, job, number), folder))
            ratios.append(ours / theirs)
    print(
        f"ratio {min(ratios):.2f} {statistics.median(ratios):.2f} {max(ratios):.2f} (min, median, max of "
        f"{args.rounds} rounds)"
    )
    if statistics.median(ratios) > args.gate:
        sys.exit(f"{statistics.median(ratios):.2f}x is above the gate of {args.gate}x")


def train_command(folder: Path, job: Job, number: int) -> list[str]:
    """The command of a run with one learner; its reference log-probs are not cached yet."""
    recipe = {
        "model": {"path": job.model},
        "data": {"train": str(folder / "pairs.jsonl"), "max_length": 2048},
        "algorithm": {"name": "dpo"},
        "batch": {"effective": job.pairs},
        "optimizer": {"learning_rate": job.rate, "max_grad_norm": None},
        "learners": {"workers": 1, "precision": "fp32"},
        "run": {"max_steps": STEPS},
        "tracking": {"wandb": "off"},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # which is YAML
    return [
        sys.executable,
        "-m",
        "orchestrator",
        "train",
        str(path),
        "--output",
        str(folder / f"run-{number}"),
    ]


def peak(command: Sequence[str], folder: Path) -> Counter[str]:
    """MB by kind of process, at the moment with the largest sum."""
    mark = uuid.uuid4().hex
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_MODE": "disabled",
    }
    most: Counter[str] = Counter()
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **quiet, MARK: mark},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            most = max(most, held(f"{MARK}={mark}".encode()), key=Counter.total)
            time.sleep(EVERY_S)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{command[1:]} failed:\n{output.read()[-3000:]}")
    return most


def held(mark: bytes) -> Counter[str]:
    """MB of PSS by process name, for all processes with the mark in their environment."""
    sizes: Counter[str] = Counter()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if mark not in (process / "environ").read_bytes():
                continue
            name = (process / "cmdline").read_bytes().split(b"\0")[0].split(b" ")[0].decode(errors="replace")
            pss = next(
                line
                for line in (process / "smaps_rollup").read_text().splitlines()
                if line.startswith("Pss:")
            )
        except (OSError, StopIteration):  # it has ended, or belongs to another user
            continue
        sizes[Path(name).name or process.name] += int(pss.split()[1]) // 1024
    return sizes


def show(name: str, most: Counter[str]) -> int:
    print(
        f"{name:<13}{most.total():6d} MB   "
        f"{', '.join(f'{kind} {size}' for kind, size in most.most_common(8))}",
        flush=True,
    )
    return most.total()


if __name__ == "__main__":
    main()
