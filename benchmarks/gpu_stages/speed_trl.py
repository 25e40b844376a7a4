"""Stage 4, second part: TRL's DPOTrainer on the same weights and pairs, at the best of some settings.

TRL runs with bf16 autocast over fp32 weights on a GPU (pure bf16 weights would lose the updates of such
learning rates, which is another training), SDPA, padded rows, TRL's fused head, reference log-probs computed
beforehand, fused AdamW, no clipping. Liger's kernels are not tried.
"""

import time
from typing import Any

import torch

from gpu_stages.bench import Bench, Speed, first_line, read
from gpu_stages.device import peak_flops, release, reserved, settle
from gpu_stages.shapes import BETA, Shape, on_device, shapes
from gpu_stages.table import EQUAL, best, difference, latest
from orchestrator.learner.memory import current_bytes, is_out_of_memory, peak_bytes, reset_peak
from orchestrator.models.tiny import byte_tokenizer

STEPS = 2
"""Steps in total: one warms up and one is timed."""
SETTINGS = ((2, False), (4, False), (1, False), (4, True), (2, True))
"""(pairs at once, gradient checkpointing), the most promising first."""
MFU_GOAL, RATIO_GOAL = 0.45, 2.0


def run(bench: Bench) -> None:
    device, peak = torch.device(bench.device), peak_flops(torch.device(bench.device))
    every = shapes(bench.device)
    for index, shape in enumerate(every):
        ends = bench.left_s * (len(every) - index - 1) / (len(every) - index)
        for pairs, checkpointing in SETTINGS[:2] if bench.small else SETTINGS:
            label = f"{pairs} pairs, {'checkpointing' if checkpointing else 'no checkpointing'}"
            if bench.left_s <= ends:
                bench.note(f"{shape.name}, TRL, {label}", "left out: no time")
                continue
            with bench.attempt(f"{shape.name}, TRL, {label}"):
                measure(bench, shape, device, pairs, checkpointing, label, peak)
            release(device)
        compare(bench, shape)


def measure(
    bench: Bench, shape: Shape, device: torch.device, pairs: int, checkpointing: bool, label: str, peak: float
) -> None:
    """Measures one setting; a setting that does not fit is noted."""
    try:
        step_s, losses, norm, gb = train(bench, shape, device, pairs, checkpointing)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        bench.note(f"{shape.name}, TRL, {label}", f"out of memory: {first_line(error)[:80]}")
        return
    mfu = shape.flops(bench.device, shared=False) / step_s / peak
    bench.add(
        Speed(
            bench.stage,
            shape.name,
            "TRL",
            label,
            shape.tokens / step_s,
            step_s,
            mfu,
            gb,
            reserved(device) / 1e9,
            losses,
            norm,
        )
    )


def train(
    bench: Bench, shape: Shape, device: torch.device, pairs: int, checkpointing: bool
) -> tuple[float, tuple[float, ...], float, float]:
    """(seconds of the last step, losses, norm of the first gradient, peak GB)."""
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig
    from trl.trainer import dpo_trainer

    # the hash only names a cache of this process; hashing gigabytes would take the time
    dpo_trainer.hash_module = lambda module: shape.name

    class Tokenized(dpo_trainer.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # these pairs are tokens already

    gpu, clock, before = bench.device == "cuda", clock_of(device), current_bytes(device)
    config = DPOConfig(
        output_dir=str(bench.work / "trl"),
        per_device_train_batch_size=pairs,
        gradient_accumulation_steps=shape.pairs // pairs,
        max_steps=STEPS,
        learning_rate=shape.rate,
        lr_scheduler_type="constant",
        beta=BETA,
        max_length=None,
        max_grad_norm=0.0,
        weight_decay=0.0,
        precompute_ref_log_probs=True,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        optim="adamw_torch_fused",
        use_cpu=not gpu,
        bf16=gpu,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    reset_peak(device)
    trainer = Tokenized(
        # fp32 weights, which start with the values of ours
        model=on_device(shape.recipe(bench.device), device).model.float(),
        args=config,
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt_ids": g.prompt.tolist(),
                    "chosen_ids": g.branches[0].ids.tolist(),
                    "rejected_ids": g.branches[1].ids.tolist(),
                }
                for g in shape.groups()
            ]
        ),
        processing_class=byte_tokenizer(),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = tuple(line["loss"] for line in trainer.state.log_history if "loss" in line)
    return clock.times[-1], losses, clock.norm, (peak_bytes(device) - before) / 1e9


def clock_of(device: torch.device) -> Any:
    """A callback that times TRL's steps and takes the norm of the first gradient, summed in double."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.norm, self.started = float("nan"), 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            settle(device)
            self.started = time.perf_counter()

        def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
            if not self.times:
                self.norm = (
                    sum(
                        float(p.grad.double().square().sum())
                        for p in model.parameters()
                        if p.grad is not None
                    )
                    ** 0.5
                )

        def on_step_end(self, *_: Any, **__: Any) -> None:
            settle(device)
            self.times.append(time.perf_counter() - self.started)

    return StepClock()


def compare(bench: Bench, shape: Shape) -> None:
    """Checks that the steps are equal, then the goals, which on a CPU are only reported."""
    records = latest(read(bench.out))
    ours, theirs = best(records, shape.name, "ours"), best(records, shape.name, "TRL")
    if ours is None or theirs is None:
        bench.holds(
            f"{shape.name}: both contestants ran", False, "no" if ours or theirs else "neither", "both"
        )
        return
    bench.below(
        f"{shape.name}: loss and gradient norm, off TRL's",
        difference(ours, theirs, bench.device),
        EQUAL[bench.device],
    )
    bench.above(
        f"{shape.name}: tokens/s against TRL", ours.tokens_per_s / theirs.tokens_per_s, RATIO_GOAL, goal=True
    )
    if shape.name.startswith("7B"):
        bench.above(f"{shape.name}: MFU", ours.mfu, MFU_GOAL, goal=True)
