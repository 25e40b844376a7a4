"""A learner's start-up checks: rows as long as real answers pass in every precision, a mask that leaks is
refused."""

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


class LocalGroup:
    """Replaces LearnerGroup, for one learner in this process."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return [function(self.rank.learner, *args)]


class Rows:
    """The attributes of data.dataset.DataSet that the check reads."""

    def __init__(self, examples: Sequence[SequenceGroup]) -> None:
        self.groups = examples


def leaking(column: str) -> Callable[..., MicroBatch]:
    """pack(), but a token sees the other branch, or the other sequences of its row."""

    def pack_leaking(examples: Sequence[SequenceGroup], layout: Any, **options: Any) -> MicroBatch:
        row_tokens = sum(g.tokens for g in examples) if layout == "packed" else None
        rows = pack(examples, layout, row_tokens=row_tokens, **options)
        values = getattr(rows, column)
        return rows if layout == "padded" else replace(rows, **{column: np.minimum(values, 0)})

    return pack_leaking


def check_all(group: ProcessGroup) -> dict[tuple[str, int, str], str]:
    """The check's error for correct rows and for leaking ones, or "" if the run may start. The model has
    peaked logits, like a trained one."""
    errors = {}
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
                    errors[precision, length, leak or layout] = error_of(cfg, how, rank, groups(length))
    return errors


def error_of(cfg: Any, how: Cut, rank: Rank, examples: Sequence[SequenceGroup]) -> str:
    data: Any = Rows(examples)
    workers: Any = LocalGroup(rank)
    try:
        check_layout(cfg, build(cfg.algorithm), data, how, workers, lambda _: None)
    except ConfigError as error:
        return error.what
    return ""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], str]:
    return on_ranks(check_all, 1, tmp_path_factory.mktemp("checks"), timeout=250.0)[0]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_correct_layout_starts_at_every_length(errors, precision, length):
    assert errors[precision, length, "prefix_shared"] == errors[precision, length, "packed"] == ""


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_mask_that_leaks_is_refused_at_every_length(errors, precision, length, leak):
    layout = "prefix_shared" if leak == "branch" else "packed"
    assert errors[precision, length, leak].startswith(f"layout {layout} ")
