"""Each sense finds its mistake, says its number, and is silent where nothing is wrong."""

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.plan import sense
from orchestrator.plan.planner import DataReport
from orchestrator.plan.sense import Seen, rates_of, what_makes_no_sense
from orchestrator.recipe.schema import OfflineName, OnlineName, Recipe

REPORT = DataReport(
    rows=100, bad=(), kept=100, dropped=0, truncated=0, made_identical=0, not_prefix=0, formats=("preference, " "conversational",), sources=("pairs",),
    held_out=0, quantiles={}, histogram=(),
)  # fmt: skip


class Tokenizer:
    chat_template = "{{ messages }}"


class Data:
    tokenizer = Tokenizer()


def seen(
    *,
    report: DataReport = REPORT,
    steps: int = 10,
    parameters: int = 135_000_000,
    lora: bool = False,
    **sections: dict[str, Any],
) -> Seen:
    recipe = Recipe.model_validate(
        {
            "model": {"path": "mine", **({"lora": {}} if lora else {})},
            "data": {"train": "x", **sections.get("data", {})},
            "algorithm": {"name": "dpo", **sections.get("algorithm", {})},
            "optimizer": {"learning_rate": 1e-6, **sections.get("optimizer", {})},
            "batch": {"effective": 32, **sections.get("batch", {})},
            **{name: value for name, value in sections.items() if name in ("run", "rollouts")},
        }
    )
    return Seen(recipe, Data(), report, steps, steps, parameters)  # pyright: ignore[reportArgumentType]


def test_a_sane_run_hears_nothing() -> None:
    assert what_makes_no_sense(seen()) == ()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", [*OfflineName.__args__, *OnlineName.__args__])
def test_a_rate_is_judged_by_the_algorithm_and_by_who_learns(name: str, lora: bool) -> None:
    usual = rates_of(seen(algorithm={"name": name}, lora=lora).recipe)
    assert usual.least < usual.low <= usual.high < usual.most
    for rate in (usual.low, usual.high):
        assert (
            sense.learning_rate(seen(algorithm={"name": name}, optimizer={"learning_rate": rate}, lora=lora))
            is None
        )
    for rate, words in ((usual.most * 1.1, "ruin"), (usual.least / 2, "hardly moves")):
        broken = {"name": name}, {"learning_rate": rate}
        said = sense.learning_rate(seen(algorithm=broken[0], optimizer=broken[1], lora=lora))
        assert (
            said is not None
            and words in said
            and f"{rate:g}" in said
            and f"{usual.low:g} to {usual.high:g}" in said
        )
        assert (
            sense.learning_rate(seen(algorithm=broken[0], optimizer=broken[1], lora=lora, parameters=150_000))
            is None
        ), "a toy learns at any rate"


def test_the_rate_that_ruined_a_real_model_is_told() -> None:
    said = sense.learning_rate(seen(optimizer={"learning_rate": 5e-4}))
    assert said is not None and "optimizer.learning_rate=0.0005" in said and "5e-07 to 1e-06" in said


def test_a_batch_of_more_rows_than_there_are_is_told() -> None:
    said = sense.batch(seen(batch={"effective": 270}))
    assert said is not None and "batch.effective=270" in said and "100 rows" in said and "2.7 times" in said
    assert sense.batch(seen(batch={"effective": 100})) is None
    assert sense.batch(seen(batch={"effective": 270}, data={"remainder": "use"})) is None, (
        "the batch is then as small as the rows are few"
    )
    said = sense.batch(seen(algorithm={"name": "grpo"}, rollouts={"prompts": 200}))
    assert said is not None and "rollouts.prompts=200" in said and "2.0 times" in said


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [({"warmup_steps": 24}, True), ({"warmup_steps": 9}, False), ({"warmup_ratio": 0.1}, False)],
)
def test_a_warm_up_that_never_ends_is_told(optimizer: dict[str, Any], told: bool) -> None:
    said = sense.warm_up(seen(optimizer=optimizer))
    assert (said is not None) == told
    if said is not None:
        assert "warms up for 24 of 10 optimizer steps" in said and "3.8e-07" in said
    assert sense.warm_up(seen(steps=1, optimizer={"warmup_ratio": 0.1})) is not None, (
        "its only step would have a rate of 0"
    )


def test_many_passes_over_few_rows_are_told() -> None:
    said = sense.passes(seen(steps=100))
    assert said is not None and "100 steps of 32 are 32 passes over 100 rows" in said
    assert sense.passes(seen(steps=30)) is None


def test_what_max_length_costs_is_told_with_its_share() -> None:
    cut = replace(REPORT, truncated=2, turns=1)
    said = sense.prompts_cut(seen(report=cut))
    assert said is not None and "2 of 100 prompts (2.0%), 1 of them by whole turns" in said
    assert sense.prompts_cut(seen(report=replace(REPORT, truncated=1))) is None
    ends = {"overlong": "truncate_end"}
    assert (
        sense.prompts_cut(seen(report=cut, data=ends)) is None
        and sense.answers_cut(seen(report=cut, data=ends)) is None
    )
    said = sense.answers_cut(seen(report=replace(REPORT, truncated=6), data=ends))
    assert said is not None and "6 of 100 rows (6.0%)" in said
    said = sense.rows_dropped(seen(report=replace(REPORT, dropped=6)))
    assert said is not None and "drops 6 of 100 rows (6.0%)" in said and sense.rows_dropped(seen()) is None
    said = sense.pairs_made_equal(seen(report=replace(REPORT, made_identical=3)))
    assert said is not None and said.startswith("3 pairs are equal")


def test_plain_text_for_a_chat_model_is_told() -> None:
    plain = replace(REPORT, formats=("preference, text",))
    said = sense.plain_text_for_a_chat_model(seen(report=plain))
    assert said is not None and said.startswith("pairs holds plain text")
    assert sense.plain_text_for_a_chat_model(seen(report=plain, parameters=1000)) is None


def test_every_sense_is_asked() -> None:
    """A run in which everything is wrong hears all of them but those that exclude each other."""
    report = replace(REPORT, truncated=50, dropped=50, made_identical=1, formats=("preference, text",))
    wrong = seen(
        report=report,
        steps=40,
        optimizer={"learning_rate": 1.0, "warmup_steps": 50},
        batch={"effective": 400},
    )
    assert len(what_makes_no_sense(wrong)) == len(sense.SENSES) - 1
