"""Each check finds its problem, reports the number, and finds nothing in a sane run."""

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.plan import sanity
from orchestrator.plan.data_report import DataReport
from orchestrator.plan.sanity import SanityInputs, rates_of, sanity_warnings
from orchestrator.recipe.schema import OfflineName, OnlineName, Recipe

REPORT = DataReport(
    rows=100,
    bad=(),
    kept=100,
    dropped=0,
    truncated=0,
    made_identical=0,
    not_prefix=0,
    formats=("preference, conversational",),
    sources=("pairs",),
    held_out=0,
    quantiles={},
    histogram=(),
)


class Tokenizer:
    chat_template = "{{ messages }}"


class Data:
    tokenizer = Tokenizer()


def inputs(
    *,
    report: DataReport = REPORT,
    steps: int = 10,
    parameters: int = 135_000_000,
    lora: bool = False,
    **sections: dict[str, Any],
) -> SanityInputs:
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
    return SanityInputs(recipe, Data(), report, steps, steps, parameters)  # pyright: ignore[reportArgumentType]


def test_a_sane_run_has_no_warnings() -> None:
    assert sanity_warnings(inputs()) == ()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", [*OfflineName.__args__, *OnlineName.__args__])
def test_a_rate_is_compared_with_those_of_the_algorithm_and_the_trained_weights(
    name: str, lora: bool
) -> None:
    usual = rates_of(inputs(algorithm={"name": name}, lora=lora).recipe)
    assert usual.least < usual.low <= usual.high < usual.most
    for rate in (usual.low, usual.high):
        assert (
            sanity.learning_rate(
                inputs(algorithm={"name": name}, optimizer={"learning_rate": rate}, lora=lora)
            )
            is None
        )
    for rate, bound in ((usual.most * 1.1, usual.most), (usual.least / 2, usual.least)):
        broken = {"name": name}, {"learning_rate": rate}
        warning = sanity.learning_rate(inputs(algorithm=broken[0], optimizer=broken[1], lora=lora))
        assert (
            warning is not None
            and f"{bound:g}" in warning
            and f"{rate:g}" in warning
            and f"{usual.low:g} to {usual.high:g}" in warning
        )
        assert (
            sanity.learning_rate(
                inputs(algorithm=broken[0], optimizer=broken[1], lora=lora, parameters=150_000)
            )
            is None
        ), "a toy learns at any rate"


def test_the_rate_that_broke_a_real_model_is_reported() -> None:
    warning = sanity.learning_rate(inputs(optimizer={"learning_rate": 5e-4}))
    assert warning is not None and "optimizer.learning_rate=0.0005" in warning and "5e-07 to 1e-06" in warning


def test_a_batch_of_more_rows_than_the_data_has_is_reported() -> None:
    warning = sanity.batch(inputs(batch={"effective": 270}))
    assert (
        warning is not None
        and "batch.effective=270" in warning
        and "100 rows" in warning
        and "2.7 times" in warning
    )
    assert sanity.batch(inputs(batch={"effective": 100})) is None
    assert sanity.batch(inputs(batch={"effective": 270}, data={"remainder": "use"})) is None, (
        "the batch then has as many rows as the data"
    )
    warning = sanity.batch(inputs(algorithm={"name": "grpo"}, rollouts={"prompts": 200}))
    assert warning is not None and "rollouts.prompts=200" in warning and "2.0 times" in warning


@pytest.mark.parametrize(
    ("optimizer", "reported"),
    [({"warmup_steps": 24}, True), ({"warmup_steps": 9}, False), ({"warmup_ratio": 0.1}, False)],
)
def test_a_warm_up_that_never_ends_is_reported(optimizer: dict[str, Any], reported: bool) -> None:
    warning = sanity.warm_up(inputs(optimizer=optimizer))
    assert (warning is not None) == reported
    if warning is not None:
        assert "warms up for 24 of 10 optimizer steps" in warning and "3.8e-07" in warning
    assert sanity.warm_up(inputs(steps=1, optimizer={"warmup_ratio": 0.1})) is not None, (
        "its only step would have a rate of 0"
    )


def test_many_passes_over_few_rows_are_reported() -> None:
    warning = sanity.passes(inputs(steps=100))
    assert warning is not None and "100 steps of 32 are 32 passes over 100 rows" in warning
    assert sanity.passes(inputs(steps=30)) is None


def test_rows_cut_by_max_length_are_reported_with_their_share() -> None:
    cut = replace(REPORT, truncated=2, turns=1)
    warning = sanity.prompts_cut(inputs(report=cut))
    assert warning is not None and "2 of 100 prompts (2.0%), 1 of them by whole turns" in warning
    assert sanity.prompts_cut(inputs(report=replace(REPORT, truncated=1))) is None
    ends = {"overlong": "truncate_end"}
    assert (
        sanity.prompts_cut(inputs(report=cut, data=ends)) is None
        and sanity.answers_cut(inputs(report=cut, data=ends)) is None
    )
    warning = sanity.answers_cut(inputs(report=replace(REPORT, truncated=6), data=ends))
    assert warning is not None and "6 of 100 rows (6.0%)" in warning
    warning = sanity.rows_dropped(inputs(report=replace(REPORT, dropped=6)))
    assert (
        warning is not None
        and "drops 6 of 100 rows (6.0%)" in warning
        and sanity.rows_dropped(inputs()) is None
    )
    warning = sanity.pairs_made_equal(inputs(report=replace(REPORT, made_identical=3)))
    assert warning is not None and warning.startswith("3 pairs")


def test_plain_text_for_a_chat_model_is_reported() -> None:
    plain = replace(REPORT, formats=("preference, text",))
    warning = sanity.plain_text_for_a_chat_model(inputs(report=plain))
    assert warning is not None and warning.startswith("pairs ")
    assert sanity.plain_text_for_a_chat_model(inputs(report=plain, parameters=1000)) is None


def test_every_check_runs() -> None:
    """A run with every problem has a warning of each check, but for two that exclude each other."""
    report = replace(REPORT, truncated=50, dropped=50, made_identical=1, formats=("preference, text",))
    wrong = inputs(
        report=report,
        steps=40,
        optimizer={"learning_rate": 1.0, "warmup_steps": 50},
        batch={"effective": 400},
    )
    assert len(sanity_warnings(wrong)) == len(sanity.CHECKS) - 1
