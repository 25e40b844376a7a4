"""Checks docs/coming-from.md: three steps of TRL's trainer, and of the recipe that the page maps it to.

    rows, a start model --TRL's trainer-------------> weights ─┐
    the same            --mapped recipe, our learner--> weights ┴─> difference of the updates / TRL's update

Weight decay, warm-up, decay of the learning rate and clipping are all on. Every other setting is TRL's own
default, or is named here.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.utils.data import SequentialSampler

from orchestrator.core.rollouts import Sampling
from orchestrator.models.tiny import build, byte_tokenizer
from orchestrator.recipe.schema import TinyModel
from orchestrator.rollout.engines.engine import Request
from orchestrator.rollout.engines.padded_decoder import StaticDecoder

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "coming-from.md"
STEPS, EFFECTIVE, SAMPLES = 3, 8, 4
BOUND = 1e-3
"""Largest difference of a tensor's update, as a share of the norm of TRL's."""
QUIET = {
    **{
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    },
    **{"gradient_checkpointing": False},
}
"""Settings of TRL that do not change a step."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of TRL's and the key of the recipe that the page maps it to. name None: implied, as the page
    says in words."""

    name: str
    value: Any
    key: str
    ours: Any = None

    @property
    def mapped(self) -> Any:
        return self.value if self.ours is None else self.ours


COMMON = (
    Setting("per_device_train_batch_size", EFFECTIVE, "batch.effective"),
    Setting("max_steps", STEPS, "run.max_steps"),
    Setting("learning_rate", 2e-3, "optimizer.learning_rate"),
    Setting("lr_scheduler_type", "cosine", "optimizer.schedule"),
    Setting("warmup_steps", 1, "optimizer.warmup_steps"),
    Setting("weight_decay", 0.1, "optimizer.weight_decay"),
    Setting("max_grad_norm", 0.05, "optimizer.max_grad_norm"),
)
SAMPLED = (
    Setting("num_generations", SAMPLES, "rollouts.samples"),
    Setting("max_completion_length", 12, "rollouts.max_new_tokens"),
    Setting("temperature", 0.8, "rollouts.temperature"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """A trainer of TRL's with the settings that are named, and what the recipe says besides: the algorithm,
    where they stand for it."""

    algorithm: Mapping[str, Any]
    settings: tuple[Setting, ...] = ()
    online: bool = False
    head: str = "lm"
    more: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "sft": Case({"name": "sft"}),
    "dpo": Case({"name": "dpo"}, (Setting("beta", 0.2, "algorithm.beta"),)),
    "reward": Case({"name": "reward"}, head="scalar"),
    "kto": Case({"name": "kto"}, (Setting("beta", 0.2, "algorithm.beta"),)),
    "grpo": Case(
        {"name": "grpo", "correction": {"kind": "none"}},
        (
            *SAMPLED,
            Setting("beta", 0.1, "algorithm.kl.coefficient"),
            Setting("loss_type", "dapo", "algorithm.normaliser", "token"),
        ),
        online=True,
    ),
    "rloo": Case(
        {"name": "rloo", "correction": {"kind": "none"}, "kl": {"place": "reward"}},
        (*SAMPLED, Setting("beta", 0.05, "algorithm.kl.coefficient")),
        online=True,
    ),
}


# ---- material


def text(draw: random.Random, low: int, high: int) -> str:
    return "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(low, high)))


def rows_of(name: str) -> list[dict[str, Any]]:
    """Rows of very different lengths, no two prompts alike."""
    draw = random.Random(5)
    rows = []
    for i in range(STEPS * EFFECTIVE):
        prompt, good, bad = f"p{i}" + text(draw, 2, 20), "c" + text(draw, 1, 30), "r" + text(draw, 1, 30)
        rows.append(
            {
                "sft": {"prompt": prompt, "completion": good},
                "kto": {"prompt": prompt, "completion": good, "label": i % 3 > 0},
                "grpo": {"prompt": prompt},
                "rloo": {"prompt": prompt},
            }.get(name, {"prompt": prompt, "chosen": good, "rejected": bad})
        )
    return rows


def start(folder: Path, head: str) -> None:
    """A start model with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    options: dict[str, Any] = {} if head == "lm" else {"num_labels": 1}
    build(
        TinyModel(architecture="llama", hidden_size=32, layers=2, heads=2), 0, auto, **options
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def reward(completion: str) -> float:
    return len(set(completion)) / 8 + 0.3 * completion.count("a") - 0.05 * len(completion)


def rewards(completions: Sequence[str], **_: Any) -> list[float]:
    """TRL's signature."""
    return [reward(completion) for completion in completions]


def our_completions(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """By step and prompt: what our decoder samples from the start model, with its rewards."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), byte_tokenizer()
    decoder, prompts = (
        StaticDecoder(model, [tokenizer.eos_token_id], 64, tokenizer.decode),
        EFFECTIVE // SAMPLES,
    )
    steps = []
    for step in range(STEPS):
        chosen = [row["prompt"] for row in rows[step * prompts : (step + 1) * prompts]]
        ids = [np.array(tokenizer(prompt)["input_ids"], np.int64) for prompt in chosen]
        seeds = [tuple(1000 * step + 100 * i + k for k in range(SAMPLES)) for i in range(prompts)]
        asked = [Request(i, s, 12) for i, s in zip(ids, seeds, strict=True)]
        made = decoder.generate(asked, Sampling(SAMPLES, 12, temperature=0.8))
        steps.append(
            [
                {
                    "prompt": prompt,
                    "prompt_ids": request.prompt.tolist(),
                    "completion_ids": [c.ids.tolist() for c in completions],
                    "logprobs": [c.logprobs.tolist() for c in completions],
                    "rewards": [
                        reward(tokenizer.decode(c.ids.tolist(), skip_special_tokens=True))
                        for c in completions
                    ],
                }
                for prompt, request, completions in zip(chosen, asked, made, strict=True)
            ]
        )
    return steps


# ---- TRL's side


def train_with_trl(
    name: str, folder: Path, rows: list[dict[str, Any]], completions: list[list[dict[str, Any]]] | None
) -> dict[str, np.ndarray]:
    """The weights after three steps of TRL's trainer."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    case = CASES[name]
    kind = {"sft": "SFT", "dpo": "DPO", "reward": "Reward", "kto": "KTO", "grpo": "GRPO", "rloo": "RLOO"}[
        name
    ]
    config, trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    auto: Any = AutoModelForCausalLM if case.head == "lm" else AutoModelForSequenceClassification
    args = config(
        output_dir=str(folder / "trl"), **QUIET, **{s.name: s.value for s in (*COMMON, *case.settings)}
    )
    common = {"args": args, "train_dataset": Dataset.from_list(rows), "processing_class": byte_tokenizer()}
    model = auto.from_pretrained(folder, dtype=torch.float32)
    if completions is None:
        taken = trainer(model=model, **common)
        taken._get_train_sampler = lambda dataset=None: SequentialSampler(dataset or taken.train_dataset)
    else:
        args.shuffle_dataset = False
        taken = _given(trainer, completions)(model=model, reward_funcs=rewards, **common)
    taken.train()
    assert taken.state.global_step == STEPS
    norms = [line["grad_norm"] for line in taken.state.log_history if "grad_norm" in line]
    assert len(norms) == STEPS and min(norms) > 0.05, (
        "every step has to be clipped for the clipping to be seen"
    )
    return {n: p.detach().numpy() for n, p in taken.accelerator.unwrap_model(taken.model).named_parameters()}


def _given(trainer: type, completions: list[list[dict[str, Any]]]) -> type:
    """A trainer that takes our completions in place of its generation."""
    steps = iter(completions)

    class Given(trainer):
        def _generate_single_turn(self, prompt_ids: Any, *_: Any) -> Any:
            now = next(steps)
            assert prompt_ids == [one["prompt_ids"] for one in now for _ in range(SAMPLES)], (
                "TRL asks for other prompts"
            )
            ids = [ids for one in now for ids in one["completion_ids"]]
            return (ids, None) if trainer.__name__ == "GRPOTrainer" else ids

    Given.__name__ = trainer.__name__
    return Given


# ---- ours


def mapped_recipe(case: Case, folder: Path, data: str) -> dict[str, Any]:
    """The recipe that the page maps the settings to."""
    recipe: dict[str, Any] = {
        "model": {"path": str(folder)},
        "data": {"train": data},
        "algorithm": json.loads(json.dumps(case.algorithm)),
        "reference": {"cache_dir": str(folder / "cache")},
        **({"rollouts": {"prompts": EFFECTIVE // SAMPLES}} if case.online else {}),
    }
    for setting in (*COMMON, *case.settings):
        *sections, key = setting.key.split(".")
        at = recipe
        for section in sections:
            at = at.setdefault(section, {})
        at[key] = setting.mapped
    return recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, np.ndarray], ...]]:
    """By trainer: (start, TRL's, our) weights. TRL trains here, we in one process of our own: DeepSpeed has a
    process group."""
    root, jobs, theirs = tmp_path_factory.mktemp("three"), [], {}
    for name, case in CASES.items():
        folder, rows = root / name, rows_of(name)
        folder.mkdir()
        start(folder, case.head)
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        completions = our_completions(folder, rows) if case.online else None
        theirs[name] = train_with_trl(name, folder, rows, completions)
        recipe = mapped_recipe(case, folder, "toy:arithmetic" if case.online else str(data))
        jobs.append({"name": name, "recipe": recipe, "folder": str(folder), "rollouts": completions})
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.parity.three_steps", str(root / "jobs.json")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        name: (
            load_file(root / name / "model.safetensors"),
            theirs[name],
            load_file(root / name / "ours.safetensors"),
        )
        for name in CASES
    }


@pytest.mark.parametrize("name", CASES)
def test_three_steps_move_every_tensor_as_trl_does(
    trained: Mapping[str, tuple[Mapping[str, np.ndarray], ...]], name: str
) -> None:
    before, theirs, ours = trained[name]
    assert theirs.keys() == ours.keys() and len(ours) > 20
    found = {}
    for tensor, weight in ours.items():
        update = theirs[tensor] - before[tensor]
        size = float(np.linalg.norm(update))
        assert size > 0.0, tensor
        found[tensor] = float(np.linalg.norm(weight - theirs[tensor])) / size
    worst = max(found, key=lambda tensor: found[tensor])
    print(f"{name}: largest difference of the updates {found[worst]:.1e} of the update, at {worst}")
    assert found[worst] < BOUND, (worst, found[worst])


@pytest.mark.parametrize("name", CASES)
def test_the_page_maps_every_setting_that_was_compared(name: str) -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    for setting in (*COMMON, *CASES[name].settings):
        named = [
            row
            for row in rows
            if f"`{setting.name}" in row.split("|")[1] and f"`{setting.key}" in row.split("|")[2]
        ]
        assert named, f"no row of the page maps {setting.name} to {setting.key}"
