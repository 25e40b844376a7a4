"""A real instruct model on real rows: the first step's loss and gradient norm are TRL's, and what is exported
answers in plain transformers.

    make real-model      # SmolLM2-135M-Instruct, once
    GSM8K rows --orchestrator's run of three steps--> metrics.jsonl, export
       │  (GRPO: its completions)                        │ first line
       └──────────TRL's trainer, one step──────────> loss, grad_norm

All rows are one effective batch, so the first step's numbers are of the same examples in whatever order they
are taken.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orchestrator.models.load import load
from orchestrator.recipe.schema import Lora, Model
from tests.running import REPOSITORY, Shared, every_line, metrics, shared_ray, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MODEL = REPOSITORY / "build" / "SmolLM2-135M-Instruct"
ROWS = REPOSITORY / "tests" / "data" / "gsm8k"
EFFECTIVE, STEPS, SAMPLES, TOKENS, SEED = 8, 3, 4, 48, 3
LORA = Lora(rank=8, alpha=16, target_modules=["q_proj", "v_proj"])  # pyright: ignore[reportCallIssue]
QUIET = {
    **{
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    },
    **{
        "gradient_checkpointing": False,
        "max_steps": 1,
        "per_device_train_batch_size": EFFECTIVE,
        "learning_rate": 1e-6,
    },
}
"""Of TRL: what decides no first gradient, and one batch of all rows."""
REWARD = """
def digits(completions, **_):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(letter.isdigit() for letter in text) / 16 - abs(len(text) - 100) / 400 for text in texts]
"""


@dataclass(frozen=True, slots=True)
class Case:
    """The same step in both programs. trl: settings of its config; ours: sections of the recipe."""

    kind: str
    trl: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    head: str = "lm"
    lora: bool = False


CASES = {
    "sft": Case("SFT", {}, {"algorithm": {"name": "sft"}}),
    "dpo": Case("DPO", {"beta": 0.1}, {"algorithm": {"name": "dpo", "beta": 0.1}}),
    "lora-dpo": Case("DPO", {"beta": 0.1}, {"algorithm": {"name": "dpo", "beta": 0.1}}, lora=True),
    "reward": Case("Reward", {}, {"algorithm": {"name": "reward"}}, head="scalar"),
    "grpo": Case(
        "GRPO",
        {
            "num_generations": SAMPLES,
            "max_completion_length": TOKENS,
            "temperature": 0.8,
            "beta": 0.1,
            "loss_type": "dapo",
        },
        {
            "algorithm": {
                "name": "grpo",
                "normaliser": "token",
                "correction": {"kind": "none"},
                "kl": {"coefficient": 0.1},
            },
            "rollouts": {
                "prompts": EFFECTIVE // SAMPLES,
                "samples": SAMPLES,
                "max_new_tokens": TOKENS,
                "temperature": 0.8,
            },
        },
    ),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    if not MODEL.is_dir():
        pytest.fail("no real model: run `make real-model` first")
    with shared_ray(tmp_path_factory.mktemp("real")) as shared:
        yield shared


def rows(file: str, count: int) -> list[dict[str, Any]]:
    """The first rows of a file, whose text may hold line separators of other kinds."""
    return [json.loads(line) for line in (ROWS / file).read_text().split("\n")[:count]]


def rows_of(name: str) -> list[dict[str, Any]]:
    """Conversations, as both programs render them by the model's template."""
    user, assistant = (
        (lambda text: [{"role": "user", "content": text}]),
        (lambda text: [{"role": "assistant", "content": text}]),
    )
    if name == "grpo":
        return [{"prompt": user(row["prompt"])} for row in rows("train.jsonl", EFFECTIVE // SAMPLES)]
    if name == "sft":
        return [
            {"prompt": user(r["prompt"]), "completion": assistant(r["completion"])}
            for r in rows("train.jsonl", EFFECTIVE)
        ]
    pairs = rows("preferences.jsonl", EFFECTIVE)
    return [
        {"prompt": user(r["prompt"]), "chosen": assistant(r["chosen"]), "rejected": assistant(r["rejected"])}
        for r in pairs
    ]


def start_model(case: Case, folder: Path) -> Path:
    """The real model; with a new head of its own for rewards, the same for both."""
    if case.head == "lm":
        return MODEL
    loaded = load(Model(path=str(MODEL)), seed=SEED, head="scalar")  # pyright: ignore[reportCallIssue]
    loaded.model.save_pretrained(folder / "start")  # pyright: ignore[reportCallIssue]
    loaded.tokenizer.save_pretrained(folder / "start")
    return folder / "start"


# ---- ours


def our_run(shared: Shared, name: str, model: Path, folder: Path) -> Path:
    """Trains as a user would, and returns the run folder."""
    case = CASES[name]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(name)))
    (folder / "rewards.py").write_text(REWARD)
    recipe = {
        "run": {"max_steps": STEPS, "seed": SEED},
        "model": {"path": str(model), **({"lora": LORA.model_dump(exclude_unset=True)} if case.lora else {})},
        "data": {"train": str(folder / "rows.jsonl")},
        "batch": {"effective": EFFECTIVE},
        "optimizer": {"learning_rate": 1e-5},
        "learners": {"workers": 1},
        "tracking": {"wandb": "off"},
        **case.ours,
        **(
            {"rewards": {"functions": [{"name": "digits", "function": f"{folder}/rewards.py:digits"}]}}
            if name == "grpo"
            else {}
        ),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    offline = name in ("dpo", "lora-dpo")
    cache = [f"reference.cache_dir={shared.root / 'reference'}"] if offline else []
    out = shared.sandbox.run(
        "train", folder / "recipe.yaml", *cache, "--output", folder / "run", timeout=900.0
    )
    assert out.code == 0 and "held out" not in out.out, out.out[-2000:] + out.err[-2000:]
    return folder / "run"


# ---- TRL's


def trl_step(name: str, model_path: Path, run: Path, folder: Path) -> tuple[float, float]:
    """(loss, gradient norm) of TRL's first step."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    case = CASES[name]
    auto: Any = AutoModelForCausalLM if case.head == "lm" else AutoModelForSequenceClassification
    config, trainer = getattr(trl, f"{case.kind}Config"), getattr(trl, f"{case.kind}Trainer")
    more: dict[str, Any] = {}
    if case.lora:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(
            r=LORA.rank, lora_alpha=LORA.alpha, target_modules=LORA.target_modules, lora_dropout=0.0
        )
    if name == "grpo":
        scope: dict[str, Any] = {}
        exec(REWARD, scope)
        trainer, more = given(trainer, run), {"reward_funcs": scope["digits"]}
    taken = trainer(
        model=auto.from_pretrained(model_path, dtype=torch.float32),
        args=config(output_dir=str(folder / "trl"), **QUIET, **case.trl),
        train_dataset=Dataset.from_list(rows_of(name)),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        **more,
    )
    if case.lora:
        take_adapter(taken.model)
    taken.train()
    (line,) = [line for line in taken.state.log_history if "grad_norm" in line]
    return line["loss"], line["grad_norm"]


def take_adapter(theirs: torch.nn.Module) -> None:
    """Our draw of the adapter's first matrices in place of TRL's."""
    ours = load(Model(path=str(MODEL), lora=LORA), seed=SEED, head="lm").model  # pyright: ignore[reportCallIssue]
    drawn = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(drawn.pop(name))
    assert not drawn, "the two programs adapt different layers"


def given(trainer: type, run: Path) -> type:
    """A trainer that takes the completions of our first step in place of its generation."""
    completions = [
        line for line in every_line(run / "samples.jsonl") if line["kind"] == "rollout" and line["step"] == 1
    ]

    class Given(trainer):
        def _generate_single_turn(self, prompt_ids: Sequence[Sequence[int]], *_: Any) -> Any:
            left = list(completions)
            return [take(left, list(ids)) for ids in prompt_ids], None

    def take(left: list[dict[str, Any]], prompt: list[int]) -> list[int]:
        line = next(line for line in left if line["tokens"]["prompt"] == prompt)
        left.remove(line)
        return line["tokens"]["ids"]

    Given.__name__ = trainer.__name__
    return Given


@pytest.mark.parametrize("name", CASES)
def test_the_first_step_is_trls_and_the_export_answers(shared: Shared, tmp_path: Path, name: str) -> None:
    model = start_model(CASES[name], tmp_path)
    run = our_run(shared, name, model, tmp_path)
    lines = metrics(run)
    assert steps(run) == [1, 2, 3] and all(math.isfinite(line["loss"]) for line in lines)
    loss, norm = trl_step(name, model, run, tmp_path)
    print(
        f"{name}: loss {lines[0]['loss']:.7f}, TRL {loss:.7f}; gradient norm {lines[0]['grad_norm']:.6f}, "
        f"TRL {norm:.6f}"
    )
    assert lines[0]["loss"] == pytest.approx(loss, rel=1e-5, abs=2e-6)
    assert lines[0]["grad_norm"] == pytest.approx(norm, rel=1e-3)
    answers(run / "export", CASES[name].head)


def answers(folder: Path, head: str) -> None:
    """Plain transformers: a chat, or a score of one."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    if head == "lm":
        made = AutoModelForCausalLM.from_pretrained(folder).generate(
            **ids, max_new_tokens=16, do_sample=False
        )
        print(tokenizer.decode(made[0, ids["input_ids"].shape[1] :]))
        labels = made.clone()
        labels[:, : ids["input_ids"].shape[1]] = -100
        surprise = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)(
            input_ids=made, labels=labels
        ).loss
        assert labels[0, -1] != -100 and surprise < 3.0, "to the start model it is language, not noise"
    else:
        assert AutoModelForSequenceClassification.from_pretrained(folder)(**ids).logits.shape == (1, 1)
