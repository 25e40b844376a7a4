"""Seconds from the command to the first forward of step 1: `orchestrator train` against TRL's script.

    python benchmarks/first_step.py --model build/SmolLM2-135M-Instruct \\
        --data tests/data/gsm8k/preferences.jsonl [--rounds 5]

Both take the same DPO step: eight pairs of at most 160 and 120 characters, fp32, one worker on all CPUs, no
held-out rows.

    cold   nothing is cached of the model, the layout or the reference; the reference log-probs of all rows
           are a pass before step 1 and reported by themselves
    warm   the same command again

TRL computes its reference in the step. Rounds are interleaved; files are in the page cache. The gates apply
to the medians without the reference pass.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GATES = {"cold": 25.0, "warm": 15.0}
REFERENCE = "reference log-probs"
STEP = ("time/data", "time/reference", "time/forward_backward", "time/optim")
RECIPE = """run: {{name: first, seed: 1, max_steps: 1}}
model: {{path: {model}}}
data: {{train: {data}}}
algorithm: {{name: dpo}}
batch: {{effective: 8}}
optimizer: {{learning_rate: 1.0e-6}}
learners: {{workers: 1, cpus_per_worker: {cpus}}}
evaluation: {{at_start: false}}
checkpoint: {{every: null, final: none}}
tracking: {{wandb: "off"}}
"""
TRL = """
import sys, time, torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
def started(*_):
    print(f"first forward {time.time()}", flush=True)
    handle.remove()
handle = model.register_forward_pre_hook(started)
rows = load_dataset("json", data_files=sys.argv[2], split="train")
options = dict(max_steps=1, per_device_train_batch_size=8, learning_rate=1e-6)
args = DPOConfig(
    output_dir=sys.argv[3], **options, report_to=[], use_cpu=True, bf16=False, save_strategy="no"
)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer).train()
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", required=True, type=Path)
    arguments.add_argument("--data", required=True, type=Path, help="JSONL with prompt, chosen, rejected")
    arguments.add_argument("--rounds", type=int, default=5)
    args = arguments.parse_args()
    results: dict[str, list[dict[str, float]]] = {"cold": [], "warm": [], "TRL": []}
    with tempfile.TemporaryDirectory(prefix="first-step-") as name:
        folder = Path(name)
        shorten(args.data, folder / "pairs.jsonl")
        for number in range(args.rounds):
            cache = folder / f"cache-{number}"
            for kind in ("cold", "warm"):
                results[kind].append(ours(folder, args.model.resolve(), cache, folder / f"{kind}-{number}"))
            results["TRL"].append(
                {"first forward": trl(folder, args.model.resolve(), folder / f"trl-{number}")}
            )
            print(
                f"round {number + 1}  "
                + "  ".join(f"{kind} {runs[-1]['first forward']:.1f} s" for kind, runs in results.items()),
                flush=True,
            )
    for kind, runs in results.items():
        each = {phase: statistics.median(run.get(phase, 0.0) for run in runs) for phase in runs[-1]}
        spread, first = [run["first forward"] for run in runs], each.pop("first forward")
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in each.items())
        print(f"{kind:<5} {first:5.1f} s ({min(spread):.1f}–{max(spread):.1f})  {phases}")
    late = [
        kind
        for kind, gate in GATES.items()
        if statistics.median(r["first forward"] - r.get(REFERENCE, 0.0) for r in results[kind]) > gate
    ]
    if late:
        sys.exit(f"above the gate of {GATES} s: {', '.join(late)}")


def shorten(data: Path, target: Path) -> None:
    """Writes the pairs as messages, cut to the lengths of a chat."""
    with target.open("w") as out:
        for line in data.read_text().rstrip("\n").split("\n"):
            row = json.loads(line)
            texts = {
                "prompt": row["prompt"][:160],
                "chosen": row["chosen"][-120:],
                "rejected": row["rejected"][-120:],
            }
            roles = {name: "user" if name == "prompt" else "assistant" for name in texts}
            out.write(
                json.dumps({name: [{"role": roles[name], "content": text}] for name, text in texts.items()})
                + "\n"
            )


def ours(folder: Path, model: Path, cache: Path, run: Path) -> dict[str, float]:
    """Seconds to the first forward of step 1, and seconds of each phase before it by the run's name for
    it."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, data=folder / "pairs.jsonl", cpus=os.cpu_count()))
    began, marks, stepped = time.time(), list[tuple[str, float]](), 0.0
    command = [sys.executable, "-m", "orchestrator", "train", str(recipe), "--output", str(run)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.rstrip().endswith(" …"):
                marks.append((line.rstrip().removesuffix(" …"), time.time() - began))
            elif line.startswith("step 1/"):
                stepped = time.time() - began
    if process.returncode:
        sys.exit(f"the run failed with {process.returncode}: see {run}")
    step = next(
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if '"time/optim"' in line
    )
    first = stepped - sum(step[name] for name in STEP)
    ends = [at for _, at in marks[1:]] + [first]
    return {"first forward": first, **{name: end - at for (name, at), end in zip(marks, ends, strict=True)}}


def trl(folder: Path, model: Path, run: Path) -> float:
    """Seconds to the first forward of TRL's shortest script."""
    script = folder / "baseline.py"
    script.write_text(TRL)
    began = time.time()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(run / "datasets")}
    command = [sys.executable, str(script), str(model), str(folder / "pairs.jsonl"), str(run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"TRL failed:\n{done.stderr[-2000:]}")
    (moment,) = (line for line in done.stdout.splitlines() if line.startswith("first forward "))
    return float(moment.removeprefix("first forward ")) - began


if __name__ == "__main__":
    main()
