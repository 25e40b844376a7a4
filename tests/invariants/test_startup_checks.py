"""A learner's start-up checks: rows as long as real answers start in every precision, a mask that leaks does
not."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.algorithms.table import build
from orchestrator.core.batches import Branch, Cut, MicroBatch, SequenceGroup
from orchestrator.core.errors import ConfigError
from orchestrator.data.packing import pack
from orchestrator.learner.engine import ProcessGroup
from orchestrator.run import startup
from orchestrator.run.startup import check_layout
from tests.invariants.engine_ranks import Rank, on_ranks, recipe

pytestmark = pytest.mark.timeout(300)
LENGTHS = (3, 40, 1000)
LEAKS = ("branch", "segment")


def groups(length: int) -> list[SequenceGroup]:
    draw = np.random.default_rng(length)

    def branch() -> Branch:
        return Branch(draw.integers(0, 256, length), np.ones(length, np.bool_))

    return [SequenceGroup(i, draw.integers(0, 256, 8), (branch(), branch())) for i in range(4)]


class Here:
    """workers.LearnerGroup of the learner in this process."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return [function(self.rank.learner, *args)]


class Rows:
    """dataset.DataSet, as far as the check looks."""

    def __init__(self, some: Sequence[SequenceGroup]) -> None:
        self.groups = some


def leaking(column: str) -> Callable[..., MicroBatch]:
    """pack(), but a token sees the other branch, or the other sequences of its row."""

    def made(some: Sequence[SequenceGroup], layout: Any, **options: Any) -> MicroBatch:
        rows = pack(
            some, layout, row_tokens=sum(g.tokens for g in some) if layout == "packed" else None, **options
        )
        values = getattr(rows, column)
        return rows if layout == "padded" else replace(rows, **{column: np.minimum(values, 0)})

    return made


def verdicts(group: ProcessGroup) -> dict[tuple[str, int, str], str]:
    """What the check says of sound rows and of leaking ones, peaked logits as trained models have: "" where
    it lets the run start."""
    said = {}
    for precision in ("fp32", "bf16"):
        cfg = recipe(precision)
        rank = Rank(group, (1, "no_sync", precision))
        with torch.no_grad():
            for parameter in rank.learner.scoring.parameters():
                parameter.mul_(3.0 if parameter.ndim == 2 else 1.0)
        for length in LENGTHS:
            for leak, layout in (
                ("", "prefix_shared"),
                ("", "packed"),
                ("branch", "prefix_shared"),
                ("segment", "packed"),
            ):
                with pytest.MonkeyPatch.context() as patch:
                    if leak:
                        patch.setattr(startup, "pack", leaking(leak))
                    how = Cut(1, 4, None, layout, 1, "no_sync")  # pyright: ignore[reportArgumentType]
                    said[precision, length, leak or layout] = judged(cfg, how, rank, groups(length))
    return said


def judged(cfg: Any, how: Cut, rank: Rank, some: Sequence[SequenceGroup]) -> str:
    try:
        check_layout(cfg, build(cfg.algorithm), Rows(some), how, Here(rank), lambda _: None)  # pyright: ignore[reportArgumentType]
    except ConfigError as error:
        return error.what
    return ""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], str]:
    return on_ranks(verdicts, 1, tmp_path_factory.mktemp("checks"), timeout=250.0)[0]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sound_layout_starts_whatever_the_length(said, precision, length):
    assert said[precision, length, "prefix_shared"] == said[precision, length, "packed"] == ""


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_mask_that_leaks_is_refused_whatever_the_length(said, precision, length, leak):
    assert "gives other log-probs than padded rows" in said[precision, length, leak]
