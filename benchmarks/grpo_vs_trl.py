"""One GRPO step, generation included: this project against TRL's GRPOTrainer, side by side.

    python benchmarks/grpo_vs_trl.py [--data PROMPTS.jsonl] [--rounds 5]
    python benchmarks/grpo_vs_trl.py --data PROMPTS.jsonl --model FOLDER --prompts 8 --samples 8
        --room 24 --rows 64 --gate 2.5

    prompts --generate--> completions --rewards, advantages--> loss --> gradient --> AdamW
       ^                                                                              |
       '------------------------- weights to the generator --------------------------'

Both get the same random-weight Llama (one token in forty ends an answer: ragged lengths) or --model, the same
prompt tokens, temperature 1, no KL, no clipping of gradients, fp32, one optimizer step a rollout batch, a
loss divided by the batch's tokens (TRL's default), and a reward of one line of Python. Each runs in child
processes with one thread; rounds are interleaved. The gate: on recorded completions loss and gradient norm
must be equal to 1e-5 (a loss below 0.1: to 1e-6) in every round.

TRL runs with the best of the tried micro-batches (32 and 8 below) and of its two ways to generate (continuous
batching). Ours consists of what the actors of a run hold, without Ray: a RolloutWorker, a RankLearner on one
DeepSpeed rank, an OptimizerStepper, and weights transferred in checksummed buckets. It holds the model twice;
TRL holds it once.

Two shared AMD EPYC cores, transformers 5.19, 16 x 8 completions of at most 96 tokens; medians, and the
ratio's range over 5 rounds:

    tokens/cpu-s    GSM8K prompts: TRL  ours              made prompts: TRL  ours
    generation                     745  1395  1.65-1.93x                895  1607  1.74-1.88x
    learning                       327  1510  4.35-4.89x                437  1663  3.65-4.19x
    whole step                     226   708  3.04-3.27x                292   814  2.67-3.00x
    peak, MB                      2153   796  0.36-0.39x               1122   773  0.63-0.70x
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from dpo_vs_trl import free_port, learner_peak_mb

RATE = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Sizes of the batch and of the model."""

    prompts: int
    samples: int
    """Completions of each prompt."""
    room: int
    """Most new tokens of a completion."""
    hidden: int
    layers: int
    vocabulary: int
    rows: int
    """Sequences that our decoder holds at once."""


@dataclass(frozen=True)
class Setting:
    """TRL's settings."""

    micro_batch: int
    """Completions of a micro-batch."""
    paged: bool = False
    """True if TRL generates with continuous batching."""


@dataclass(frozen=True)
class Result:
    """What one contestant measured."""

    loss: float
    """Loss on the recorded completions."""
    grad_norm: float
    """Gradient norm on the recorded completions."""
    tokens: int
    """Tokens sampled in the timed step."""
    generate_s: float
    """CPU seconds of generation in that step."""
    learn_s: float
    """CPU seconds of the rest of that step."""
    peak_mb: float
    """Peak resident memory of the process."""


ROWS: dict[str, Callable[[Result], float]] = {
    "generation, tokens/cpu-s": lambda r: r.tokens / r.generate_s,
    "learning, tokens/cpu-s": lambda r: r.tokens / r.learn_s,
    "whole step, tokens/cpu-s": lambda r: r.tokens / (r.generate_s + r.learn_s),
    "peak memory, MB": lambda r: r.peak_mb,
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument(
        "--data",
        type=Path,
        help="JSONL with prompt (or question); default: generated prompts of ragged length",
    )
    arguments.add_argument("--rounds", type=int, default=5)
    for name, default in Sizes(16, 8, 96, 256, 4, 4096, 64).__dict__.items():
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--trl-micro-batches", type=int, nargs="+", default=[8, 16, 32, 128])
    arguments.add_argument(
        "--model", type=Path, help="folder with a model and its tokenizer, instead of the random one"
    )
    arguments.add_argument("--gate", type=float, default=0.0, help="least ratio of whole steps")
    arguments.add_argument("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    arguments.add_argument("--setting", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    sizes = Sizes(**{name: getattr(args, name) for name in Sizes.__dataclass_fields__})
    if args.child:
        sizes, setting = (
            Sizes(**json.loads(Path("sizes.json").read_text())),
            Setting(**json.loads(args.setting)),
        )
        print(
            json.dumps(
                asdict(
                    run_ours(Path.cwd(), sizes)
                    if args.child == "ours"
                    else run_trl(Path.cwd(), sizes, setting)
                )
            )
        )
        return
    with tempfile.TemporaryDirectory(prefix="grpo-vs-trl-") as folder:
        prepare(Path(folder), args.data, sizes, args.model)
        ratio = compare(Path(folder), args.rounds, args.trl_micro_batches)
    if ratio < args.gate:
        sys.exit(f"{ratio:.2f}x is below the gate of {args.gate}x")


def compare(folder: Path, rounds: int, micro_batches: Sequence[int]) -> float:
    """The median ratio of the whole step's speeds."""
    run = partial(child, folder)
    setting = best_setting(micro_batches, run)
    print(f"TRL runs with {setting}\n")
    results: dict[str, list[Result]] = {"TRL": [], "ours": []}
    for number in range(rounds):
        results["TRL"].append(show(f"round {number + 1} TRL", run("trl", setting)))
        results["ours"].append(show(f"round {number + 1} ours", run("ours", setting)))
        gate(results["ours"][-1], results["TRL"][-1])
    table(results["ours"], results["TRL"])
    whole = ROWS["whole step, tokens/cpu-s"]
    return statistics.median(
        whole(o) / whole(t) for o, t in zip(results["ours"], results["TRL"], strict=True)
    )


def best_setting(micro_batches: Sequence[int], run: Callable[[str, Setting], Result]) -> Setting:
    """TRL's quickest micro-batch, and the quicker of its two ways to generate. One run each."""
    tried = {size: show(f"TRL, micro-batch {size}", run("trl", Setting(size))) for size in micro_batches}
    best = min(tried, key=lambda size: tried[size].learn_s)
    paged = show("TRL, continuous batching", run("trl", Setting(best, paged=True)))
    return Setting(
        best,
        ROWS["generation, tokens/cpu-s"](paged) > max(map(ROWS["generation, tokens/cpu-s"], tried.values())),
    )


def show(name: str, result: Result) -> Result:
    seconds = f"generate {result.generate_s:5.2f} + learn {result.learn_s:5.2f} cpu-s"
    step = f"loss {result.loss:+.7f}  grad norm {result.grad_norm:.6f}"
    print(
        f"{name:<26} {step}  {result.tokens:6d} tokens  {seconds}  peak {result.peak_mb:5.0f} MB", flush=True
    )
    return result


def gate(ours: Result, trl: Result) -> None:
    """Exits unless both computed the same step."""
    # the loss is near 0 by construction: advantages add up to 0 in each group
    for name, floor in (("loss", 0.1), ("grad_norm", 0.0)):
        a, b = getattr(ours, name), getattr(trl, name)
        if abs(a - b) > 1e-5 * max(abs(b), floor):
            sys.exit(f"not the same step: {name} {a!r} (ours) against {b!r} (TRL)")


def table(ours: Sequence[Result], trl: Sequence[Result]) -> None:
    """Prints medians, and the least, median and greatest ratio of the rounds."""
    print(f"\n{'':<28}{'TRL':>8}{'ours':>8}   ratio: min median max of {len(ours)} interleaved rounds")
    for label, of in ROWS.items():
        ratios = sorted(of(o) / of(t) for o, t in zip(ours, trl, strict=True))
        medians = f"{statistics.median(map(of, trl)):>8.0f}{statistics.median(map(of, ours)):>8.0f}"
        print(f"{label:<28}{medians}   {ratios[0]:.2f} {statistics.median(ratios):.2f} {ratios[-1]:.2f}")


def child(folder: Path, name: str, setting: Setting) -> Result:
    """Runs one contestant in a separate process."""
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
        "--child",
        name,
        "--setting",
        json.dumps(asdict(setting)),
    ]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def prepare(folder: Path, data: Path | None, sizes: Sizes, own: Path | None) -> None:
    """Writes sizes.json, model/ (random Llama and its tokenizer, or a link to `own`) and recorded.json
    (prompts, their ids, completions for the gate)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from orchestrator.core.rollouts import Sampling
    from orchestrator.rollout.engines.engine import Request
    from orchestrator.rollout.engines.padded_decoder import StaticDecoder
    from orchestrator.rollout.engines.sampling import sample_seed

    texts = read_prompts(data) if data else made_prompts(sizes.prompts)
    if own is None:
        random_model(folder / "model", texts, sizes)
    else:
        (folder / "model").symlink_to(own.resolve(), target_is_directory=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    eos = model.generation_config.eos_token_id
    prompts = [tokenizer(text)["input_ids"] for text in texts[: sizes.prompts]]
    seeds = [tuple(sample_seed(0, i, 0, k, 0) for k in range(sizes.samples)) for i in range(sizes.prompts)]
    requests = [Request(np.array(p), s, sizes.room) for p, s in zip(prompts, seeds, strict=True)]
    groups = StaticDecoder(model, eos if isinstance(eos, list) else [eos], sizes.rows, str).generate(
        requests, Sampling(sizes.samples, sizes.room)
    )
    completions = [[c.ids.tolist() for c in group] for group in groups]
    (folder / "sizes.json").write_text(json.dumps(asdict(sizes)))
    (folder / "recorded.json").write_text(
        json.dumps({"texts": texts[: sizes.prompts], "prompts": prompts, "completions": completions})
    )


def random_model(folder: Path, texts: Sequence[str], sizes: Sizes) -> None:
    """Writes a random Llama and a tokenizer trained on these texts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(texts, sizes.vocabulary)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden * 11 // 4,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 64,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [
        2,
        *range(sizes.vocabulary - sizes.vocabulary // 40, sizes.vocabulary),
    ]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_prompts(data: Path) -> list[str]:
    with data.open() as lines:  # not splitlines: texts hold other line separators
        rows = [json.loads(line) for line in lines]
    return [row.get("prompt") or row["question"] for row in rows]


def made_prompts(count: int) -> list[str]:
    """Texts of 16 to 96 words of letters."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefghij"), 4)) for _ in range(2000)]
    return [" ".join(draw.choice(words, draw.integers(16, 97))) for _ in range(count)]


def train_tokenizer(texts: Sequence[str], vocabulary: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def reward(ids: Sequence[int]) -> float:
    """The share of even tokens in a completion."""
    return sum(token % 2 == 0 for token in ids) / len(ids)


def run_ours(folder: Path, sizes: Sizes) -> Result:
    """A gate step on the recorded completions, then a timed one on its own."""
    ours = Ours(folder, sizes)
    loss, norm = ours.learn(ours.recorded(), 0)
    begin = time.process_time()
    groups = ours.worker.roll_out(list(enumerate(ours.prompts)), ours.sampling, 1)
    between = time.process_time()
    ours.learn(groups, 1)
    end = time.process_time()
    tokens = sum(len(rollout.ids) for group in groups for rollout in group.rollouts)
    return Result(loss, norm, tokens, between - begin, end - between, learner_peak_mb())


class Ours:
    """The parts of an online run, called in this process."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        from orchestrator.algorithms.table import build
        from orchestrator.core.batches import Cut
        from orchestrator.core.rollouts import Prompt, Sampling
        from orchestrator.learner import engine
        from orchestrator.learner import rank_learner as learner
        from orchestrator.plan.ways import CPU_POSITIONS
        from orchestrator.recipe.schema import Recipe
        from orchestrator.rollout.worker import RolloutWorker
        from orchestrator.trainers import optimizer_step as step

        torch.set_num_threads(1)
        recipe = Recipe.model_validate(
            {
                "model": {"path": str(folder / "model")},
                "data": {"train": "none"},
                "algorithm": {"name": "grpo", "normaliser": "token", "correction": {"kind": "none"}},
                "optimizer": {"learning_rate": RATE, "max_grad_norm": None},
                "rollouts": {
                    "batching": "static",
                    "rows_at_once": sizes.rows,
                    "samples": sizes.samples,
                    "max_new_tokens": sizes.room,
                },
            }
        )
        device = torch.device("cpu")
        group = engine.ProcessGroup(0, 1, "127.0.0.1", free_port(), 60.0)
        group.join(device)
        self.cut = Cut(
            workers=1,
            examples=None,
            positions=CPU_POSITIONS,
            layout="prefix_shared",
            zero_stage=0,
            sync="no_sync",
        )
        self.rank = rank = learner.RankLearner(learner.LearnerSpec(recipe, self.cut, 2), group, device)
        self.algorithm = build(recipe.algorithm, recipe.rollouts)
        self.learner = SimpleNamespace(
            forward_backward=lambda b, at: rank.forward_backward(b.micro_batches[0], b.units, at),
            optim_step=rank.optim_step,
        )
        self.stepper = step.OptimizerStepper(
            self.algorithm, self.learner, self.cut, lambda b: b, SimpleNamespace(note=print), step.Guards()
        )
        self.worker = RolloutWorker(recipe, device)
        self.sampling = Sampling(sizes.samples, sizes.room)
        self.data = json.loads((folder / "recorded.json").read_text())
        given = zip(self.data["texts"], self.data["prompts"], strict=True)
        self.prompts = [Prompt(i, "", 0, np.array(ids), text) for i, (text, ids) in enumerate(given)]

    def recorded(self):
        from orchestrator.core.rollouts import Rollout, RolloutGroup

        def rollout(sample: int, ids: list[int]) -> Rollout:
            return Rollout(
                sample, 0, np.array(ids), np.ones(len(ids), bool), np.zeros(len(ids), np.float32), "stop", ""
            )

        given = zip(self.prompts, self.data["completions"], strict=True)
        return [
            RolloutGroup(prompt, 0, tuple(rollout(k, ids) for k, ids in enumerate(all_ids)))
            for prompt, all_ids in given
        ]

    def learn(self, groups, at: int) -> tuple[float, float]:
        """Takes one step: rewards, advantages, optimizer, weights to the generator.

        Returns (loss, gradient norm)."""
        from orchestrator.core.rollouts import RewardedGroup
        from orchestrator.learner.weights import flat_buckets
        from orchestrator.models.weight_buckets import Bucket, checksum
        from orchestrator.trainers.experience import ExperienceInputs, make_experience
        from orchestrator.trainers.optimizer_step import Clock

        scored = [
            RewardedGroup(g, np.array([reward(r.ids.tolist()) for r in g.rollouts], np.float32))
            for g in groups
        ]
        inputs, rewards = ExperienceInputs(False, False, 0.0, "k3"), [s.rewards for s in scored]
        data = make_experience(scored, rewards, self.algorithm, inputs, self.learner, None, self.cut)
        outcome = self.stepper.step(data.groups, at, Clock())
        buckets = (
            Bucket(plan.entries, flat.numpy(), checksum(flat))
            for plan, flat in flat_buckets(self.rank, 256 << 20)
        )
        self.worker.engine.load(at + 1, buckets)
        assert outcome.applied is not None, "the step was refused"
        return outcome.learned.loss, outcome.applied.grad_norm


def run_trl(folder: Path, sizes: Sizes, setting: Setting) -> Result:
    """TRL's two steps: one on the recorded completions, passed by `rollout_func`, then one on its own."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOTrainer

    torch.set_num_threads(1)
    data = json.loads((folder / "recorded.json").read_text())
    clock = trl_clock()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        reward_funcs=lambda completion_ids, **_: [reward(ids) for ids in completion_ids],
        args=trl_config(folder, sizes, setting),
        train_dataset=Dataset.from_list([{"prompt": text} for text in data["texts"]]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        rollout_func=lambda texts, _: recorded(texts, data),
        callbacks=[clock],
    )
    clock.watch(trainer, data["prompts"])
    trainer.train()
    loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    return Result(
        loss,
        clock.norms[0],
        clock.tokens,
        clock.generate_s,
        clock.step_s - clock.generate_s,
        learner_peak_mb(),
    )


def trl_config(folder: Path, sizes: Sizes, setting: Setting):
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=sizes.prompts * sizes.samples // setting.micro_batch,
        num_generations=sizes.samples,
        max_completion_length=sizes.room,
        max_steps=2,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        beta=0.0,
        shuffle_dataset=False,
        use_transformers_continuous_batching=setting.paged,
        transformers_continuous_batching_config={"page_size": 16, "num_blocks": 2048, "max_batch_tokens": 512}
        if setting.paged
        else None,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def trl_clock():
    """A callback that measures the CPU time of TRL's steps and generation, and its first gradient norm."""
    from transformers import TrainerCallback

    class TrlClock(TrainerCallback):
        tokens, generate_s, step_s, begin = 0, 0.0, 0.0, 0.0

        def watch(self, trainer, prompts: list[list[int]]) -> None:
            self.trainer, self.prompts, self.inner, self.norms = trainer, prompts, trainer._generate, []
            trainer._generate = self.generate

        def generate(self, texts):
            begin = time.process_time()
            output = self.inner(texts)
            self.generate_s += time.process_time() - begin
            self.tokens += sum(map(len, output[1]))
            if sorted(output[0]) != sorted(
                ids for ids in self.prompts for _ in range(len(texts) // len(self.prompts))
            ):
                raise AssertionError("TRL reads the prompts as other tokens")
            return output

        def on_step_begin(self, *args, **kwargs):
            self.begin = time.process_time()

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not self.norms:  # summed in double: the logged norm adds fp32 squares in a row
                self.norms.append(
                    sum(float(p.grad.double().square().sum()) for p in model.parameters()) ** 0.5
                )

        def on_step_end(self, *args, **kwargs):
            self.step_s += time.process_time() - self.begin
            if self.trainer.rollout_func is not None:  # that was the gate
                self.trainer.rollout_func, self.tokens, self.generate_s, self.step_s = None, 0, 0.0, 0.0

    return TrlClock()


def recorded(texts: Sequence[str], data: dict) -> dict:
    """What a `rollout_func` returns: for each repetition of a prompt its next recorded completion."""
    remaining = {
        text: list(completions) for text, completions in zip(data["texts"], data["completions"], strict=True)
    }
    ids = dict(zip(data["texts"], data["prompts"], strict=True))
    completions = [remaining[text].pop(0) for text in texts]
    return {
        "prompt_ids": [ids[text] for text in texts],
        "completion_ids": completions,
        "logprobs": [[0.0] * len(c) for c in completions],
    }


if __name__ == "__main__":
    main()
