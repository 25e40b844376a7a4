"""Each architecture trains, exports and loads again, or `plan` refuses it by name. The table of results is
docs/models.md."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.learner.engine import ProcessGroup
from tests.architectures.journey import Outcome, journey
from tests.architectures.table import NAMES, rows
from tests.invariants.engine_ranks import on_ranks

TWELVE = (
    "llama",
    "gpt2",
    "qwen3",
    "gemma3",
    "llama4",
    "mistral3",
    "qwen2_5_vl",
    "mixtral",
    "opt",
    "mamba",
    "bert",
    "xlnet",
)
"""The most different ones: rotary and learned positions, composites, experts, no attention, a causal encoder,
and one that is refused."""
OTHERS = [name for name in NAMES if name not in TWELVE]
SHARE = 24
"""Architectures in one process."""
OUT_OF_SCOPE = (
    "is an encoder with a decoder",
    "predicts several tokens ahead",
    "lets a token see those after it",
    "rows of a multiple of its chunk length",
)
"""Reasons for which `plan` refuses a model whose own forward works in transformers."""


def outcomes(group: ProcessGroup, names: Sequence[str], work: str) -> dict[str, Outcome]:
    return {name: journey(name, Path(work) / name, group) for name in names}


def check(name: str, outcome: Outcome) -> None:
    assert outcome.verdict != "fault", f"{outcome.stage}: {outcome.why}"
    if outcome.verdict == "refused":
        assert outcome.plain or any(feature in outcome.why for feature in OUT_OF_SCOPE), (
            f"transformers trains it, but plan refuses it: {outcome.why}"
        )
    assert outcome.row == rows().get(name), (
        f"docs/models.md is stale: python -m tests.architectures.table {name}"
    )


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("twelve")
    return on_ranks(outcomes, 1, folder, TWELVE, str(folder), timeout=400.0)[0]


@pytest.mark.timeout(420)
@pytest.mark.parametrize("name", TWELVE)
def test_an_architecture_works_or_is_refused(name: str, twelve: dict[str, Outcome]) -> None:
    check(name, twelve[name])


@pytest.mark.slow
@pytest.mark.timeout(660)
@pytest.mark.parametrize("first", range(0, len(OTHERS), SHARE))
def test_every_architecture_works_or_is_refused(first: int, tmp_path: Path) -> None:
    names = OTHERS[first : first + SHARE]
    results = on_ranks(outcomes, 1, tmp_path, names, str(tmp_path), timeout=600.0)[0]
    for name in names:
        check(name, results[name])


def test_the_table_holds_no_other_architecture_and_no_fault() -> None:
    table = rows()
    assert set(TWELVE) <= set(table) <= set(NAMES)
    assert not [line for line in table.values() if "| fault |" in line]
