"""The plan as it is printed."""

import json
from io import StringIO

import pytest
from rich.console import Console

from orchestrator.algorithms.table import build
from orchestrator.plan.planner import make_plan
from orchestrator.plan.view import not_read, render, set_keys
from orchestrator.recipe.loading import load
from orchestrator.run.inputs import read_data
from orchestrator.run.planned_run import plan_run


def printed(*overrides, width=160):
    recipe = (
        load("recipes/tiny/dpo.yaml", ["data.train=[{path: toy:preference, max_rows: 64}]", *overrides])
        .stages[0]
        .recipe
    )
    algorithm = build(recipe.algorithm)
    console = Console(record=True, width=width, file=StringIO())
    console.print(render(make_plan(recipe, algorithm, read_data(recipe, algorithm))))
    return console.export_text()


def test_everything_a_user_asks_is_there():
    text = printed(
        "batch.effective=64",
        "batch.micro_batch=8",
        "data.eval=[{path: toy:preference, split: eval, max_rows: 8}]",
    )
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0] == "64 pairs = 2 workers × 4 micro-batches × 8 pairs"
    assert lines[1] == "100 optimizer steps of dpo"
    for words in (
        "prefix_shared  each prompt is computed once for its branches",
        "the lowest stage whose state fits: fewest collectives",
        "one reduction instead of one per micro-batch",
        "8 examples  set in the recipe",
        "data: 64 rows of toy:preference (preference, text); 64 kept, 8 held out",
        "bad rows 0, too long: 0 dropped, 0 truncated",
        "tokens: min 10, median 10, p95 10, max 10",
        "predicted memory per worker",
        "others",
        " a worker may use",
        "traffic per worker and step: 0.5 MB reduced, 0.0 MB gathered",
    ):
        assert any(words in line for line in lines), words
    assert "cut evenly" not in text


def test_the_neighbours_of_a_batch_that_does_not_divide():
    assert "batch.effective 48 or 64" in printed("batch.effective=50", "batch.micro_batch=8")


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_loses_no_number(width):
    text = printed("batch.effective=64", "batch.micro_batch=8", width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    for number in ("64 pairs = 2 workers", "8 examples", "p95 10", "0.5 MB"):
        assert number in text


def test_keys_that_are_inherited_and_not_read_are_listed():
    stage = load("recipes/tiny/dpo.yaml", ["data.eval=null", "batch.micro_batch_tokens=512"]).stages[0]
    console = Console(record=True, width=200, file=StringIO())
    console.print(not_read(stage.ignored))
    lines = console.export_text().splitlines()
    assert lines[0].startswith("inherited keys")
    (micro_batch,) = [line.rstrip() for line in lines if line.startswith("  batch.micro_batch (")]
    assert micro_batch.endswith("read only if batch.micro_batch_tokens is not set")
    assert any(line.startswith("  evaluation.every (") for line in lines)
    silent = Console(record=True, file=StringIO())
    silent.print(not_read(()))
    assert not silent.export_text().strip()


def test_what_nothing_reads_and_what_else_there_is_to_know_of_the_data_is_told(tmp_path):
    rows = [
        {"prompt": f"{i}>", "chosen": "a", "rejected": "b", "made at": "now", "margin": None}
        for i in range(4)
    ]
    for name, some in (("train", rows), ("eval", [rows[0], {**rows[0], "chosen": "c"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    text = printed(
        f"data.train={tmp_path}/train.jsonl",
        f"data.eval={tmp_path}/eval.jsonl",
        "batch.effective=4",
        width=400,
    )
    assert "\nunused columns: made at\n" in text
    assert f"1 of 2 held-out rows are trained on too, the first at {tmp_path}/eval.jsonl:1" in text


@pytest.mark.parametrize(
    "name", ["start/dpo", "start/lora-dpo", "start/sft", "start/reward", "start/grpo", "tiny/dpo"]
)
def test_a_plan_fits_a_screen_and_says_what_was_set_and_what_was_decided(tmp_path, name):
    rows = {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5", "completion": "4", "answer": "4"}
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(rows | {"prompt": f"{'x' * i} 2 + 2 = "}) + "\n" for i in range(64))
    )
    mine = ["model.tiny={}", f"data.train={tmp_path}/rows.jsonl"] if name.startswith("start/") else []
    given = load(name, [*mine, "optimizer.warmup_steps=900"]).stages[0].recipe
    plan = plan_run(given, Console(quiet=True)).plan
    console = Console(record=True, width=100, file=StringIO())
    console.print(render(plan, given))
    text = console.export_text()
    assert len(text.splitlines()) <= 40, text
    assert "warning: optimizer.warmup_steps=900 warms up for 900 of" in text
    for section, keys in set_keys(given):
        assert section in text and all(pair.split()[0] in text for pair in keys.split(", "))
    wanted = ["precision", "micro-batch", "ZeRO stage"] if name.startswith("start/") else ["micro-batch"]
    assert all(any(line.startswith(choice) for line in text.splitlines()) for choice in wanted)
    assert ("LoRA" in text and "on 14 layers" in text) == (given.model.lora is not None)


def test_only_what_differs_from_the_defaults_is_shown_as_set():
    recipe = (
        load("tiny/dpo", ["data.overlong=truncate_prompt_left", "algorithm.loss={sigmoid: 0.5}"])
        .stages[0]
        .recipe
    )
    found = dict(set_keys(recipe))
    assert "overlong" not in found["data"] and found["algorithm"] == "name dpo, loss {'sigmoid': 0.5}"
    assert found["optimizer"] == "learning_rate 0.0005, warmup_steps 10" and "rollouts" not in found


@pytest.mark.parametrize("name", ["start/dpo", "start/grpo"])
def test_held_out_rows_are_counted_in_every_kind_of_run(tmp_path, name):
    rows = [{"prompt": f"{i} + 2 = ", "chosen": "4", "rejected": "5", "answer": "4"} for i in range(70)]
    for file, part in (("rows", rows[:64]), ("held", rows[64:])):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    mine = ["model.tiny={}", f"data.train={tmp_path}/rows.jsonl", f"data.eval={tmp_path}/held.jsonl"]
    plan = plan_run(load(name, mine).stages[0].recipe, Console(quiet=True)).plan
    assert (plan.data.kept, plan.data.held_out) == (64, 6)
