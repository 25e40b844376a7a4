"""Cost of accumulation: time per example and peak memory of one effective batch cut into K micro-batches.

    python benchmarks/seed_arithmetic.py [--model tiny|50m]

The first table has one effective batch and K = 1, 4, 16, 64: memory falls with the micro-batch as activations
do, and the predicted peak of `orchestrator plan` is beside the measured one. In the second table the
micro-batch stays and K grows: time per example must not grow. Each child process has one DeepSpeed rank and
one thread; the loss of every row must be the same.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

MODELS = {
    "tiny": {"architecture": "llama", "hidden_size": 128, "layers": 4, "heads": 4, "vocab_size": 4096},
    "50m": {
        "architecture": "llama",
        "hidden_size": 512,
        "layers": 12,
        "heads": 8,
        "intermediate_size": 1536,
        "vocab_size": 8192,
    },
}
EFFECTIVE = {"tiny": 64, "50m": 16}
STEPS = 3


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    effective: int
    """Examples of an optimizer step."""
    accumulations: int
    """Number of micro-batches, K."""
    micro_batch: int
    """Examples of a micro-batch."""
    parameters: int
    loss: float
    seconds: float
    """CPU seconds per example of the quickest step."""
    measured: int
    """Peak bytes beyond the bare process."""
    predicted: int
    """The plan's prediction of the same."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", choices=list(MODELS), default="tiny")
    arguments.add_argument(
        "--child", nargs=2, type=int, metavar=("EFFECTIVE", "MICRO"), help=argparse.SUPPRESS
    )
    arguments.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.child:
        print(json.dumps(asdict(measure(args.model, *args.child, args.data))))
        return
    effective = EFFECTIVE[args.model]
    with tempfile.TemporaryDirectory(prefix="seed-arithmetic-") as folder:
        data = Path(folder) / "pairs.jsonl"
        write_pairs(data, 4 * effective)
        counts = [k for k in (1, 4, 16, 64) if k <= effective]
        rows = [child(args.model, effective, effective // k, data) for k in counts]
        report(f"{effective} pairs in K micro-batches", rows)
        if max(abs(r.loss - rows[0].loss) for r in rows) > 1e-5 * abs(rows[0].loss):
            sys.exit("the loss depends on the cut")
        micro = max(1, effective // 16)
        report(
            f"micro-batches of {micro}, K of them",
            [child(args.model, micro * k, micro, data) for k in counts],
        )


def report(title: str, rows: list[Row]) -> None:
    print(f"\n{title}; {rows[0].parameters / 1e6:.1f} M parameters, one thread")
    print(
        "| K | micro-batch | ms / pair | peak MB | predicted MB | predicted / measured "
        "|\n|---:|---:|---:|---:|---:|---:|"
    )
    for r in rows:
        ratio = r.predicted / r.measured
        print(
            f"| {r.accumulations} | {r.micro_batch} | {1e3 * r.seconds:.1f} | {r.measured / 1e6:.1f} | "
            f"{r.predicted / 1e6:.1f} | {ratio:.2f} |",
            flush=True,
        )


def write_pairs(path: Path, count: int) -> None:
    """Writes pairs of random words: prompts of 60-120 bytes, answers of 40-120."""
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return "".join(draw.choice("abcdefghij ") for _ in range(draw.randint(low, high)))

    with path.open("w") as file:
        for _ in range(count):
            row = {
                "prompt": "p" + text(60, 120),
                "chosen": "c" + text(40, 120),
                "rejected": "r" + text(40, 120),
            }
            file.write(json.dumps(row) + "\n")


def child(model: str, effective: int, micro: int, data: Path) -> Row:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        __file__,
        "--model",
        model,
        "--data",
        str(data),
        "--child",
        str(effective),
        str(micro),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def measure(model: str, effective: int, micro: int, data_file: Path) -> Row:
    """Measures the steps of one rank under one cut, beside the plan's prediction."""
    import torch

    from orchestrator.algorithms.table import build
    from orchestrator.data.micro_batches import cut_step
    from orchestrator.learner.engine import ProcessGroup
    from orchestrator.learner.rank_learner import LearnerSpec, RankLearner
    from orchestrator.plan.planner import make_plan
    from orchestrator.recipe.schema import Recipe
    from orchestrator.run.inputs import read_data

    torch.set_num_threads(1)
    recipe = Recipe.model_validate(
        {
            "run": {"max_steps": STEPS},
            "model": {"tiny": MODELS[model]},
            "data": {"train": str(data_file)},
            "algorithm": {"name": "dpo"},
            "batch": {"effective": effective, "micro_batch": micro},
            "optimizer": {"learning_rate": 1e-4},
        }
    )
    algorithm = build(recipe.algorithm)
    data = read_data(recipe, algorithm)
    plan = make_plan(recipe, algorithm, data)
    device = torch.device("cpu")
    group = ProcessGroup(0, 1, "127.0.0.1", free_port(), 60.0)
    group.join(device)
    batch = cut_step(data.batches.at(0), plan.cut)
    learner = RankLearner(LearnerSpec(recipe, plan.cut, STEPS), group, device)
    batch = batch.with_reference((learner.token_logprobs(batch.micro_batches[0]),))
    losses, best, peak = [], float("inf"), 0
    for step in range(STEPS):
        started = time.process_time()
        learned = learner.forward_backward(batch.micro_batches[0], batch.units, step)
        learner.optim_step(step)
        best = min(best, time.process_time() - started)
        losses.append(learned.loss)
        peak = learned.peak_bytes  # of the last step, with the optimizer's state there
    parameters = sum(p.numel() for p in learner.scoring.parameters())
    count = len(batch.micro_batches[0])
    return Row(effective, count, micro, parameters, losses[-1], best / effective, peak, plan.memory.total)


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    main()
