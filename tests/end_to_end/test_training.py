"""Whole runs on real Ray workers: the run folder, the exported model, and the variants of DPO."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from orchestrator.recipe.loading import load
from tests.running import Shared, every_line, exported, exported_hash, metrics, shared_ray, steps

pytestmark = pytest.mark.timeout(600)

SMALL = (
    "run.max_steps=4",
    "batch.effective=16",
    "learners.workers=2",
    "checkpoint.every=2",
    "evaluation.every=4",
    "optimizer.warmup_steps=0",
)
STEP_METRICS = {
    *("step", "loss", "grad_norm", "learning_rate", "num_tokens", "examples", "skipped"),
    *(
        "perf/tokens_per_s",
        "perf/mfu",
        "perf/micro_batches",
        "time/data",
        "time/forward_backward",
        "time/optim",
    ),
}
PREFERENCE_METRICS = {
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")),
    "logps/chosen",
    "logps/rejected",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with shared_ray(tmp_path_factory.mktemp("training")) as shared:
        yield shared


def same_batch(task: str) -> str:
    """As many rows as one step takes, so that every step sees the same examples and the loss must fall."""
    return f"data.train=[{{path: toy:{task}, max_rows: 16}}]"


def held_out(task: str, rows: int = 8) -> str:
    return f"data.eval=[{{path: toy:{task}, split: eval, max_rows: {rows}}}]"


def train_tiny(shared: Shared, recipe: str, task: str, folder: str, *overrides: str) -> Path:
    """The folder of a small run of a tiny recipe."""
    outcome, console = shared.train(
        f"tiny/{recipe}", folder, *SMALL, same_batch(task), held_out(task), *overrides
    )
    assert outcome.steps == 4
    assert "step 4/4" in console
    return outcome.folder


def check_folder(folder: Path, *, wandb: bool) -> None:
    """Checks the files that every run writes."""
    for name in (
        "recipe.yaml",
        "plan.json",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
        "logs/driver.log",
    ):
        assert (folder / name).is_file(), name
    assert [p.name for p in sorted((folder / "logs").glob("learner-*.log"))] == [
        "learner-0.log",
        "learner-1.log",
    ]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "LATEST",
        "step_00000002",
        "step_00000004",
    ]
    assert (folder / "checkpoints" / "LATEST").read_text() == "step_00000004\n"
    assert "<svg" in (folder / "report.html").read_text()
    assert "data" in (folder / "export" / "README.md").read_text()
    assert len(list(folder.glob("wandb/offline-run-*"))) == wandb
    assert steps(folder) == [1, 2, 3, 4]
    for line in metrics(folder):
        assert line.keys() >= STEP_METRICS
    assert [line["examples"] for line in metrics(folder)] == [16, 32, 48, 64]
    assert [line["step"] for line in every_line(folder / "metrics.jsonl") if "eval/loss" in line] == [0, 4]


def log_prob(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> float:
    """log p(completion | prompt), straight from the model's logits."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logps = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), dim=-1)
    return float(logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum())


def check_preference_export(folder: Path) -> None:
    """Checks that the exported folder gives the log-probs that the run reported last."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from orchestrator.data.toy import toy_rows

    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    sums = {"chosen": 0.0, "rejected": 0.0}
    rows = list(toy_rows("preference", "eval", 8))
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        for side in sums:
            completion = tokenizer(row[side], add_special_tokens=False).input_ids
            sums[side] += log_prob(model, prompt, [*completion, tokenizer.eos_token_id])
    last = [line for line in every_line(folder / "metrics.jsonl") if "eval/loss" in line][-1]
    for side, total in sums.items():
        assert total / len(rows) == pytest.approx(last[f"eval/logps/{side}"], rel=1e-5)


def test_dpo(shared: Shared) -> None:
    folder = train_tiny(shared, "dpo", "preference", "dpo")
    check_folder(folder, wandb=True)
    lines = metrics(folder)
    assert lines[0].keys() >= PREFERENCE_METRICS
    assert abs(lines[0]["loss"] - math.log(2)) < 1e-5
    assert lines[-1]["loss"] < lines[0]["loss"]
    check_preference_export(folder)
    kinds = {line["kind"] for line in every_line(folder / "samples.jsonl")}
    assert kinds == {"pair", "generation"}

    before = exported_hash(folder), (folder / "metrics.jsonl").read_text()
    _, console = shared.train("tiny/dpo", "dpo", *SMALL, same_batch("preference"), held_out("preference"))
    assert console.count("step 4/4") == 1, "the same command again took a step"
    assert "all 4 steps are done already" in console
    assert (exported_hash(folder), (folder / "metrics.jsonl").read_text()) == before


def test_sft(shared: Shared) -> None:
    folder = train_tiny(shared, "sft", "sft", "sft")
    check_folder(folder, wandb=True)
    lines = metrics(folder)
    assert lines[0]["loss"] == pytest.approx(math.log(259), rel=0.1), (
        "random weights know nothing about the next byte"
    )
    assert lines[-1]["loss"] < lines[0]["loss"]
    samples = every_line(folder / "samples.jsonl")
    assert {line["step"] for line in samples} == {0, 4}
    assert all(line["prompt"].endswith(">") and len(line["answer"]) == 4 for line in samples)


def test_reward_model(shared: Shared) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from orchestrator.data.toy import toy_rows

    folder = train_tiny(shared, "reward", "reward", "reward")
    check_folder(folder, wandb=True)
    assert metrics(folder)[-1]["loss"] < metrics(folder)[0]["loss"]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    model.requires_grad_(False)
    rewards = []
    for row in toy_rows("reward", "eval", 8):
        for side in ("chosen", "rejected"):
            ids = [
                *tokenizer(row["prompt"] + row[side], add_special_tokens=False).input_ids,
                tokenizer.eos_token_id,
            ]
            rewards.append(float(model(input_ids=torch.tensor([ids])).logits))
    last = every_line(folder / "metrics.jsonl")[-1]
    assert (
        sum(a > b for a, b in zip(rewards[::2], rewards[1::2], strict=True)) / 8
        == last["eval/rewards/accuracies"]
    )


@pytest.mark.slow
def test_kto(shared: Shared) -> None:
    folder = train_tiny(shared, "kto", "unpaired", "kto")
    check_folder(folder, wandb=True)
    lines = metrics(folder)
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-5), "policy == reference: 1 - sigmoid(0)"
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_lora_with_activation_checkpointing(shared: Shared) -> None:
    """Frozen inputs have no gradient that would keep the graph of a checkpointed layer."""
    from orchestrator.models.load import load as load_model

    extra = (
        "model.lora={rank: 4}",
        "learners.activation_checkpointing=selective",
        "optimizer.learning_rate=1e-2",
    )
    folder = train_tiny(shared, "dpo", "preference", "lora", *extra)
    check_folder(folder, wandb=True)
    assert (folder / "export" / "adapter" / "adapter_model.safetensors").is_file()
    assert metrics(folder)[-1]["loss"] < metrics(folder)[0]["loss"]
    check_preference_export(folder)
    start = load_model(load("tiny/dpo").stages[0].recipe.model, seed=0, head="lm").model.state_dict()
    moved = {name for name, weight in exported(folder).items() if (weight != start[name].numpy()).any()}
    assert moved and all("_proj" in name for name in moved), "only the adapted layers may move"


def test_tr_dpo_without_wandb(shared: Shared) -> None:
    extra = (
        "algorithm.reference_sync_every=2",
        "algorithm.reference_sync_alpha=1.0",
        "tracking.wandb=off",
        "optimizer.learning_rate=1e-2",
    )
    folder = train_tiny(shared, "dpo", "preference", "tr", *extra)
    check_folder(folder, wandb=False)
    losses = [line["loss"] for line in metrics(folder)]
    assert abs(losses[0] - math.log(2)) < 1e-5
    assert abs(losses[1] - math.log(2)) > 1e-5
    assert abs(losses[2] - math.log(2)) < 1e-5, "the reference is the policy again after two steps"
    check_preference_export(folder)


@pytest.mark.slow
def test_aot_couples_the_batch(shared: Shared) -> None:
    """The loss sorts the whole step, so a cut step takes two passes."""
    folder = train_tiny(shared, "dpo", "preference", "aot", "algorithm.loss=aot", "batch.micro_batch=2")
    check_folder(folder, wandb=True)
    lines = metrics(folder)
    assert {line["perf/micro_batches"] for line in lines} == {4}
    assert "time/first_pass" in lines[0]
    assert abs(lines[0]["loss"] - math.log(2)) < 1e-5
    assert lines[-1]["loss"] < lines[0]["loss"]
