"""Columns for rewards: which a function reads, and in which form a table's values reach each reward."""

import datetime
import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.algorithms.table import build
from orchestrator.core.errors import DataError
from orchestrator.core.rollouts import Prompt, Rollout, RolloutGroup
from orchestrator.data.formats import Reads
from orchestrator.data.sources import load_rows
from orchestrator.recipe.loading import load
from orchestrator.recipe.schema import Data, RewardFunction, Rewards
from orchestrator.rollout.rewards.columns import columns_read
from orchestrator.rollout.rewards.component import RewardCall
from orchestrator.rollout.rewards.http import _body
from orchestrator.rollout.rewards.sandbox import Confinement, Sandbox
from orchestrator.run.inputs import read_prompts

SOURCE = """
def named(completions, price, *, when=None): return [0.0] * len(completions)
def open_to_all(completions, **columns): return [0.0] * len(completions)
def forms(completions, when, price, raw, score):
    right = when[0] == "2026-11-27T17:05:00" and price[0] == "1.50" and raw[0] == "AAE="
    right = right and score[0] != score[0]
    return [1.0 if right else 0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("columns")
    (folder / "mine.py").write_text(SOURCE)
    table = {
        "prompt": pa.array(["p>"]),
        "when": pa.array([datetime.datetime(2026, 11, 27, 17, 5)], pa.timestamp("us")),
        "price": pa.array([Decimal("1.50")], pa.decimal128(8, 2)),
        "raw": pa.array([b"\x00\x01"]),
        "score": pa.array([float("nan")]),
        "answer": pa.array(["x"]),
    }
    pq.write_table(pa.table(table), folder / "rows.parquet")
    return folder


def rewards(*functions: dict[str, Any]) -> Rewards:
    return Rewards.model_validate(
        {"functions": [{"name": f"f{i}", **function} for i, function in enumerate(functions)]}
    )


def test_columns_that_rewards_read(folder: Path) -> None:
    file = folder / "mine.py"
    assert columns_read(rewards({"function": "exact_match"})) == {"answer"}
    assert columns_read(rewards({"function": f"{file}:named"}, {"model": "some/folder"})) == {
        "answer",
        "price",
        "when",
    }
    assert columns_read(rewards({"function": f"{file}:named", "options": {"when": 1}})) == {"answer", "price"}
    for reads_all in (
        {"function": f"{file}:open_to_all"},
        {"url": "http://localhost:1/x"},
        {"function": "trl:think_format_reward"},
    ):
        assert columns_read(rewards({"function": "exact_match"}, reads_all)) is None


def test_the_plan_lists_what_no_reward_reads(folder: Path) -> None:
    def unused(*functions: dict[str, Any]) -> tuple[str, ...]:
        named = json.dumps([{"name": f"f{i}", **function} for i, function in enumerate(functions)])
        changes = [
            f"grpo:data.train={folder / 'rows.parquet'}",
            "grpo:data.eval=null",
            f"grpo:rewards.functions={named}",
        ]
        recipe = load("tiny/grpo", changes).stages[-1].recipe
        recipe = recipe.model_copy(update={"model": load("tiny/sft").stages[0].recipe.model})
        return read_prompts(recipe, build(recipe.algorithm, recipe.rollouts)).longest.unused

    assert unused({"function": "exact_match"}) == ("when", "price", "raw", "score")
    assert unused({"function": f"{folder}/mine.py:named"}) == ("raw", "score")
    assert unused({"function": f"{folder}/mine.py:open_to_all"}) == ()


def call_of(path: Path) -> RewardCall:
    (row,) = load_rows(str(path), Data(train="unused"), "prompt").rows
    prompt = Prompt(0, row.where, 0, np.array([1]), row.prompt, row.columns)
    rollout = Rollout(0, 0, np.array([2]), np.array([True]), np.zeros(1, np.float32), "stop", "x")
    return RewardCall.of([RolloutGroup(prompt, 0, (rollout,))])


@pytest.mark.parametrize("name", ["forms", "named", "open_to_all"])
def test_a_tables_values_reach_a_function_in_their_forms(folder: Path, name: str) -> None:
    written = f"{folder}/mine.py:{name}"
    function = RewardFunction(name="mine", function=written)  # pyright: ignore[reportCallIssue]
    with Sandbox(function, Confinement.of(rewards(), os.environ, None)) as sandbox:
        assert sandbox.score(call_of(folder / "rows.parquet"), 60) == [1.0 if name == "forms" else 0.0]


def test_a_tables_values_reach_an_endpoint_as_standard_json(folder: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    sent = json.loads(_body("mine", call_of(folder / "rows.parquet")), parse_constant=refuse)
    assert sent["columns"] == {
        "when": ["2026-11-27T17:05:00"],
        "price": ["1.50"],
        "raw": ["AAE="],
        "score": ["NaN"],
        "answer": ["x"],
    }


def test_a_prompt_that_the_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(
        "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ "
        "messages[0].content }}"
    )
    ask = {"role": "user", "content": "a>"}
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ([ask], [ask, ask]))
    )

    def load_with(*more: str) -> Any:
        changes = (f"data.train={tmp_path}/rows.jsonl", "data.eval=null", *more)
        recipe = load("tiny/grpo", [f"grpo:{change}" for change in changes]).stages[-1].recipe
        model = (
            load("tiny/sft")
            .stages[0]
            .recipe.model.model_copy(update={"chat_template": f"{tmp_path}/t.jinja"})
        )
        return read_prompts(
            recipe.model_copy(update={"model": model}), build(recipe.algorithm, recipe.rollouts)
        )

    with pytest.raises(
        DataError,
        match=r"1 bad rows[\s\S]*rows\.jsonl:2: the chat template refuses the conversation \(one turn only\)",
    ):
        load_with()
    assert [p.where for p in load_with("data.max_bad_rows=1").batches.groups] == [f"{tmp_path}/rows.jsonl:1"]


def test_mapped_columns_reach_rewards_by_both_names(tmp_path: Path) -> None:
    """A function may take the recipe's name of a column, or the file's."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a>", "gold": "1", "gap": 2.5, "world": "w"}\n')
    data = Data.model_validate(
        {"train": "x", "columns": {"answer": "gold", "margin": "gap", "environment": "world"}}
    )
    (row,) = load_rows(
        str(tmp_path / "rows.jsonl"), data, "prompt", Reads(margin=False, environment=True)
    ).rows
    assert row.columns == {
        "gold": "1",
        "gap": 2.5,
        "world": "w",
        "answer": "1",
        "margin": 2.5,
        "environment": "w",
    }
