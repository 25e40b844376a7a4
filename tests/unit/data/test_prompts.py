"""Prompts: how they are read, and rollout batches that are refused before anything starts."""

import json
from pathlib import Path

import pytest

from orchestrator.algorithms.table import build
from orchestrator.core.errors import ConfigError, DataError
from orchestrator.data.prompts import check_batches
from orchestrator.recipe.schema import Recipe
from orchestrator.run.inputs import read_prompts


def recipe(train: str = "toy:prompts", algorithm: dict | None = None, **sections: dict) -> Recipe:
    raw = {
        "model": {"tiny": {}},
        "data": {"train": train},
        "algorithm": algorithm or {"name": "grpo"},
        "batch": {"effective": 64},
        "optimizer": {"learning_rate": 1e-3},
        "rollouts": {"prompts": 16, "samples": 8, "max_new_tokens": 8},
    }
    return Recipe.model_validate(
        {**raw, **{name: {**raw.get(name, {}), **values} for name, values in sections.items()}}
    )


def batches(cfg: Recipe) -> int:
    return check_batches(cfg, build(cfg.algorithm, cfg.rollouts))


def test_the_arithmetic_of_rollout_batches():
    assert batches(recipe()) == 2
    assert batches(recipe(algorithm={"name": "online_dpo"}, batch={"effective": 8})) == 2
    assert batches(recipe(algorithm={"name": "ppo"}, rollouts={"samples": 1, "prompts": 64})) == 1


@pytest.mark.parametrize(
    ("sections", "pattern"),
    [
        ({"batch": {"effective": 60}}, "batch.effective=60 .* rollouts.samples=8"),
        ({"rollouts": {"prompts": 15}}, "cannot be cut into effective batches of 64"),
        ({"rollouts": {"samples": 1, "prompts": 64}}, "grpo needs rollouts.samples of at least 2"),
        (
            {"algorithm": {"name": "dapo"}, "rollouts": {"max_staleness": 1}},
            "dynamic sampling needs rollouts.max_staleness=0",
        ),
        (
            {"algorithm": {"name": "online_dpo"}, "batch": {"effective": 16}, "rollouts": {"samples": 1}},
            "online_dpo needs rollouts.samples",
        ),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused_with_a_fix(sections, pattern):
    algorithm = sections.pop("algorithm", None)
    with pytest.raises(ConfigError, match=pattern) as error:
        batches(recipe(algorithm=algorithm, **sections))
    assert error.value.fix


def load(cfg: Recipe):
    return read_prompts(cfg, build(cfg.algorithm, cfg.rollouts))


def test_every_other_column_goes_to_the_rewards(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{i}>", "answer": i, "level": "hard"} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load(recipe(str(file)))
    (first, *_) = sorted(prompts.batches.at(0), key=lambda p: p.id)
    assert first.columns["level"] == "hard" and first.columns["answer"] == rows[first.id]["answer"]
    assert len(first.ids) == len(first.text), "a byte is a token"
    longest = prompts.longest.groups[0]
    assert len(longest.branches) == 8 and {len(b.ids) for b in longest.branches} == {8}


def test_long_prompts_keep_their_end_are_dropped_or_refused(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        json.dumps({"prompt": "x" * 50 + "end>"}) + "\n" + json.dumps({"prompt": "short>"}) + "\n"
    )
    (cut, _) = load(recipe(str(file), data={"max_length": 20})).longest.groups
    assert len(cut.prompt) == 12
    assert load(recipe(str(file), data={"max_length": 20, "overlong": "drop"})).longest.report.dropped == 1
    with pytest.raises(DataError, match=":1: the prompt has 54 tokens, 12 are left"):
        load(recipe(str(file), data={"max_length": 20, "overlong": "error"}))
    with pytest.raises(ConfigError, match="leaves no room"):
        load(recipe(str(file), data={"max_length": 8}))
