"""One DPO step: this project's learner (DeepSpeed, one rank) against TRL's DPOTrainer, side by side.

    python benchmarks/dpo_vs_trl.py --data PREFERENCES.jsonl [--rounds 5] [--gate 3]
    python benchmarks/dpo_vs_trl.py --data PREFERENCES.jsonl --model FOLDER --pairs 16 --short --gate 3

Without --model both get the same random-weight Llama and tokenizer (BPE, trained here on the data), 256 pairs
and micro-batches of 8 pairs. With --model both get the model of that folder and its chat template; TRL runs
at its quickest micro-batch of those tried, the learner at the plan's. --short cuts the texts to the lengths
of dialogues: about 60 tokens of prompt and 40 of answer, some a few times that.

Both run in fp32, without clipping and activation checkpointing, with reference log-probs computed beforehand
(with --live-reference TRL computes its own in the step). TRL pads and scores every position; the learner
shares prompts, leaves out padding and scores answers only. Each contestant runs in a child process with one
thread; rounds are interleaved. A gate comes first: loss and gradient norm of step 1 must be equal to 1e-5
relative.

The benchmark reports tokens (prompt repeated for both answers, as TRL counts) per CPU second of the best
step, and the peak resident memory of the whole process. It exits with 1 if the median ratio of speeds is
below --gate.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STEPS, BETA = 2, 0.1


@dataclass(frozen=True)
class Job:
    """The step that both contestants take."""

    pairs: int
    """Pairs of one step."""
    micro_batch: int
    """TRL's micro-batch in pairs; also the learner's, unless `own`."""
    model: str
    """Folder of the model."""
    own: bool
    """True for the user's model (--model): the learner then uses the plan's micro-batch."""
    live: bool = False
    """True if TRL computes its reference in the step, as it does by default."""

    @property
    def rate(self) -> float:
        return 1e-6 if self.own else 1e-4


@dataclass(frozen=True)
class Result:
    """What one contestant measured."""

    loss: float
    """Loss of step 1."""
    grad_norm: float
    """Gradient norm of step 1."""
    tokens: int
    """Tokens of a step, prompts repeated for both answers."""
    cpu_s: float
    """CPU seconds of the quickest step."""
    peak_mb: float
    """Peak resident memory of the process."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", required=True, type=Path, help="JSONL with prompt, chosen, rejected")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--hidden", type=int, default=256)
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--vocabulary", type=int, default=8192)
    arguments.add_argument(
        "--model", type=Path, help="a folder with a model, its tokenizer and chat template"
    )
    arguments.add_argument("--pairs", type=int, default=256)
    arguments.add_argument("--short", action="store_true", help="cut texts to the lengths of dialogues")
    arguments.add_argument(
        "--micro-batches",
        type=int,
        nargs="+",
        default=[8],
        help="TRL's micro-batches in pairs; the quickest is used",
    )
    arguments.add_argument(
        "--live-reference",
        action="store_true",
        help="let TRL compute its reference in the step, as it does by default",
    )
    arguments.add_argument("--gate", type=float, default=0.0, help="least ratio of speeds")
    arguments.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.child:
        print(json.dumps(asdict(CONTESTANTS[args.child[0]](Path.cwd(), Job(**json.loads(args.child[1]))))))
        return
    with tempfile.TemporaryDirectory(prefix="dpo-vs-trl-") as folder:
        if args.model is None:
            prepare(Path(folder), args.data, args.hidden, args.layers, args.vocabulary)
        model = str((args.model or Path(folder) / "model").resolve())
        write_pairs(Path(folder), args.data, args.pairs, model if args.model else None, args.short)
        compare(
            Path(folder),
            args,
            [
                Job(args.pairs, size, model, args.model is not None, args.live_reference)
                for size in args.micro_batches
            ],
        )


def compare(folder: Path, args: argparse.Namespace, jobs: list[Job]) -> None:
    results: dict[str, list[Result]] = {"trl": [], "ours": []}
    job = min(jobs, key=lambda each: child("trl", folder, each).cpu_s) if len(jobs) > 1 else jobs[0]
    print(f"TRL's micro-batch: {job.micro_batch} pairs", flush=True)
    for round_number in range(args.rounds):
        for name in results:
            result = child(name, folder, job)
            results[name].append(result)
            print(
                f"round {round_number + 1} {name:<5} loss {result.loss:.7f}  grad norm "
                f"{result.grad_norm:.6f}  {result.cpu_s:6.2f} cpu-s  "
                f"{result.tokens / result.cpu_s:8.0f} tok/cpu-s  peak {result.peak_mb:6.0f} MB",
                flush=True,
            )
        gate(results["ours"][-1], results["trl"][-1])
    speed = {name: statistics.median(r.tokens / r.cpu_s for r in rs) for name, rs in results.items()}
    memory = {name: statistics.median(r.peak_mb for r in rs) for name, rs in results.items()}
    ratios = [
        o.tokens / o.cpu_s / (t.tokens / t.cpu_s)
        for o, t in zip(results["ours"], results["trl"], strict=True)
    ]
    print(f"\n{'':<14}{'tok/cpu-s':>10}{'peak MB':>9}   (medians of {args.rounds} interleaved rounds)")
    print(f"{'TRL':<14}{speed['trl']:>10.0f}{memory['trl']:>9.0f}")
    print(f"{'orchestrator':<14}{speed['ours']:>10.0f}{memory['ours']:>9.0f}")
    print(
        f"{'ratio':<14}{speed['ours'] / speed['trl']:>9.2f}x{memory['ours'] / memory['trl']:>8.2f}x", end=""
    )
    print(f"   speed by round {min(ratios):.2f}-{max(ratios):.2f}x; same loss and gradient norm")
    if statistics.median(ratios) < args.gate:
        sys.exit(f"{statistics.median(ratios):.2f}x is below the gate of {args.gate}x")


def gate(ours: Result, trl: Result) -> None:
    """Exits unless both computed the same step."""
    for name in ("loss", "grad_norm", "tokens"):
        a, b = getattr(ours, name), getattr(trl, name)
        if abs(a - b) > 1e-5 * abs(b):
            sys.exit(f"not the same step: {name} {a!r} (ours) against {b!r} (TRL)")


def child(name: str, folder: Path, job: Job) -> Result:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_MODE": "disabled",
    }
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--data",
        "",
        "--child",
        name,
        json.dumps(asdict(job)),
    ]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def prepare(folder: Path, data: Path, hidden: int, layers: int, vocabulary: int) -> None:
    """Writes model/: a random Llama and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = [json.loads(line) for line in data.read_text().rstrip("\n").split("\n")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        (text for row in rows for text in row.values() if isinstance(text, str)), trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")


def write_pairs(folder: Path, data: Path, pairs: int, chat: str | None, short: bool) -> None:
    """Writes pairs.jsonl; rows are messages if `chat` names the folder of a model with a chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat or folder / "model")
    draw = random.Random(0)
    rows = [json.loads(line) for line in data.read_text().rstrip("\n").split("\n")]
    if len(rows) < pairs:
        sys.exit(f"{data} has {len(rows)} rows, not {pairs}")
    with (folder / "pairs.jsonl").open("w") as file:
        for row in rows[:pairs]:
            texts = {name: row[name] for name in ROLES}
            if short:  # median lengths; the mean is a fifth above
                texts = {
                    name: shortened(tokenizer, text, draw.lognormvariate(0, 0.6) * ROLES[name][1])
                    for name, text in texts.items()
                }
            given = {
                name: [{"role": ROLES[name][0], "content": text}] if chat else text
                for name, text in texts.items()
            }
            file.write(json.dumps(given) + "\n")


ROLES = {"prompt": ("user", 50), "chosen": ("assistant", 33), "rejected": ("assistant", 33)}
"""Role and tokens of a short text, by column."""


def shortened(tokenizer: Any, text: str, tokens: float) -> str:
    return tokenizer.decode(tokenizer(text)["input_ids"][: max(4, round(tokens))])


def run_ours(folder: Path, job: Job) -> Result:
    """The learner as the program uses it, on one DeepSpeed rank in this process."""
    import torch

    from orchestrator.algorithms.table import build
    from orchestrator.core.batches import Cut
    from orchestrator.data.micro_batches import cut_step
    from orchestrator.learner.engine import ProcessGroup
    from orchestrator.learner.rank_learner import LearnerSpec, RankLearner
    from orchestrator.learner.reference import RankReference
    from orchestrator.plan.ways import CPU_POSITIONS
    from orchestrator.recipe.schema import Recipe
    from orchestrator.run.inputs import read_data

    torch.set_num_threads(1)
    recipe = Recipe.model_validate(
        {
            "model": {"path": job.model},
            "data": {"train": str(folder / "pairs.jsonl"), "max_length": 2048},
            "algorithm": {"name": "dpo", "beta": BETA},
            "batch": {"effective": job.pairs},
            "optimizer": {"learning_rate": job.rate, "max_grad_norm": None},
        }
    )
    data = read_data(recipe, build(recipe.algorithm))
    cut = Cut(
        1,
        *((None, CPU_POSITIONS) if job.own else (job.micro_batch, None)),
        layout="prefix_shared",
        zero_stage=0,
        sync="no_sync",
    )
    batch = cut_step(data.groups, cut)
    share, device = batch.micro_batches[0], torch.device("cpu")
    group = ProcessGroup(0, 1, "127.0.0.1", free_port(), 60.0)
    group.join(device)
    reference = RankReference(recipe, device).token_logprobs(share)
    share = batch.with_reference((reference,)).micro_batches[0]
    learner = RankLearner(LearnerSpec(recipe, cut, STEPS), group, device)
    first, best = None, float("inf")
    for step in range(STEPS):
        started = time.process_time()
        learned = learner.forward_backward(share, batch.units, step)
        applied = learner.optim_step(step)
        best = min(best, time.process_time() - started)
        first = first or (learned.loss, applied.grad_norm)
    assert first is not None
    return Result(*first, batch.tokens, best, learner_peak_mb())


def run_trl(folder: Path, job: Job) -> Result:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(1)
    times: list[float] = []
    norms: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(time.process_time())

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not norms:  # summed in double: the logged norm adds fp32 squares in a row and is 2e-5 off here
                norms.append(sum(float(p.grad.double().square().sum()) for p in model.parameters()) ** 0.5)

        def on_step_end(self, *args, **kwargs):
            times.append(time.process_time())

    config = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.pairs // job.micro_batch,
        max_steps=STEPS,
        learning_rate=job.rate,
        lr_scheduler_type="constant",
        beta=BETA,
        max_length=2048,
        max_grad_norm=0.0,
        weight_decay=0.0,
        precompute_ref_log_probs=not job.live,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    trainer = DPOTrainer(
        model=model,
        args=config,
        train_dataset=load_dataset(
            "json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=str(folder / "cache")
        ),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[Clock()],
    )
    trainer.train()
    first = next(line for line in trainer.state.log_history if "num_tokens" in line)
    best = min(end - begin for begin, end in zip(times[::2], times[1::2], strict=True))
    return Result(first["loss"], norms[0], int(first["num_tokens"]), best, learner_peak_mb())


def learner_peak_mb() -> float:
    """Highest resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


CONTESTANTS = {"ours": run_ours, "trl": run_trl}

if __name__ == "__main__":
    main()
