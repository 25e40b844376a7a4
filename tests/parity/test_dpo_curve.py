"""Ten optimizer steps of DPO: the same losses and gradient norms as TRL's DPOTrainer, same model, same
batches."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orchestrator.models.tiny import build, byte_tokenizer
from orchestrator.recipe.schema import TinyModel

STEPS, EFFECTIVE, MICRO_BATCH, RATE, BETA = 10, 16, 4, 2e-3, 0.1

OURS = """
import json, sys, torch
from orchestrator.algorithms.table import build
from orchestrator.recipe.schema import Recipe
from orchestrator.data.micro_batches import cut_step
from orchestrator.run.inputs import read_data
from orchestrator.learner.engine import ProcessGroup
from orchestrator.learner.rank_learner import LearnerSpec, RankLearner
from orchestrator.learner.reference import RankReference
from orchestrator.plan.planner import make_plan
torch.set_num_threads(1)
recipe = Recipe.model_validate(json.loads(sys.argv[1]))
algorithm = build(recipe.algorithm)
data = read_data(recipe, algorithm)
cut = make_plan(recipe, algorithm, data).cut
group = ProcessGroup(0, 1, "127.0.0.1", int(sys.argv[2]), 60.0)
group.join(torch.device("cpu"))
reference = RankReference(recipe, torch.device("cpu"))
learner = RankLearner(LearnerSpec(recipe, cut, recipe.run.max_steps), group, torch.device("cpu"))
effective = recipe.batch.effective
for step in range(recipe.run.max_steps):  # in the file's order, as TRL is configured
    batch = cut_step(data.groups[step * effective : (step + 1) * effective], cut)
    batch = batch.with_reference((reference.token_logprobs(batch.micro_batches[0]),))
    learned = learner.forward_backward(batch.micro_batches[0], batch.units, step)
    print(json.dumps([learned.loss, learner.optim_step(step).grad_norm]))
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, and pairs of words of very different lengths."""
    folder = tmp_path_factory.mktemp("curve")
    build(TinyModel(architecture="llama", hidden_size=32, layers=2, heads=2), 0, _auto()).save_pretrained(
        folder / "model"
    )
    byte_tokenizer().save_pretrained(folder / "model")
    draw = random.Random(2)

    def text(low: int, high: int) -> str:
        return "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(low, high)))

    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(STEPS * EFFECTIVE):
            row = {"prompt": "p" + text(2, 30), "chosen": "c" + text(1, 40), "rejected": "r" + text(1, 40)}
            file.write(json.dumps(row) + "\n")
    return folder


def _auto() -> type:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def trl_curve(folder: Path) -> list[list[float]]:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=EFFECTIVE // MICRO_BATCH,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        beta=BETA,
        max_grad_norm=1.0,
        weight_decay=0.0,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(dataset or trainer.train_dataset)
    trainer.train()
    return [[line["loss"], line["grad_norm"]] for line in trainer.state.log_history if "num_tokens" in line]


def our_curve(folder: Path, **batch: object) -> list[list[float]]:
    recipe = {
        "run": {"max_steps": STEPS},
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "pairs.jsonl")},
        "algorithm": {"name": "dpo", "beta": BETA},
        "batch": {"effective": EFFECTIVE, **batch},
        "optimizer": {"learning_rate": RATE, "max_grad_norm": 1.0},
    }
    command = [sys.executable, "-c", OURS, json.dumps(recipe), str(_free_port())]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        json.loads(line)
        for line in done.stdout.splitlines()
        if line.startswith("[") and "WARNING" not in line
    ]


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_ten_steps_equal_trl(material: Path) -> None:
    theirs = trl_curve(material)
    assert len(theirs) == STEPS
    assert theirs[-1][0] < theirs[0][0] - 0.01, "the curve has to move for this to mean something"
    for batch in ({"micro_batch": 5}, {"micro_batch_tokens": 300}):
        ours = our_curve(material, **batch)
        assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in theirs], abs=1e-4)
        assert [norm for _, norm in ours] == pytest.approx([norm for _, norm in theirs], rel=1e-3)
