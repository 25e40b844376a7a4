"""bf16_autocast casts each weight once per optimizer step. The step equals one that casts for every
micro-batch."""

import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.learner import engine
from orchestrator.learner.engine import ProcessGroup
from tests.invariants.engine_ranks import STEPS, WORLD, Rank, on_ranks

pytestmark = pytest.mark.timeout(300)
WAYS = ((0, "no_sync"), (1, "no_sync"), (2, "coalesced"), (2, "per_micro_batch"), (3, "per_micro_batch"))


class Casts(TorchDispatchMode):
    """Counts casts of whole parameters to bf16. They are recognised by their shapes."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        low = (kwargs or {}).get("dtype") == torch.bfloat16
        if func is torch.ops.aten._to_copy.default and low and args[0].shape in self.shapes:
            self.count += 1
        return func(*args, **(kwargs or {}))


def step(group: ProcessGroup) -> dict[tuple[int, str], dict[str, Any]]:
    return {way: {"once": measure(group, way), "each": measure(group, way, every_time=True)} for way in WAYS}


def measure(
    group: ProcessGroup, way: tuple[int, str], *, every_time: bool = False
) -> tuple[int, int, str, float]:
    """(casts of a step, its micro-batches, the state after three steps, seconds).

    every_time: casts for every micro-batch, as without cast_once.
    """
    with pytest.MonkeyPatch.context() as patch:
        if every_time:
            patch.setattr(engine, "cast_once", nullcontext)
        rank = Rank(group, (*way, "bf16_autocast"))
        layer = rank.learner.scoring.hugging_face.model.layers[0]  # pyright: ignore
        shapes = {
            torch.Size(getattr(m.weight, "ds_shape", m.weight.shape))
            for m in layer.modules()
            if isinstance(m, torch.nn.Linear)
        }
        with Casts(shapes) as casts:
            micro_batches = rank.forward(STEPS[0], 0).micro_batches
        rank.learner.optim_step(0)
        started = time.perf_counter()
        rank.step(1)
        rank.step(2)
        return casts.count, micro_batches, rank.state(), time.perf_counter() - started


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[int, str], dict[str, Any]]]:
    return on_ranks(step, WORLD, tmp_path_factory.mktemp("autocast"), timeout=250.0)


@pytest.mark.parametrize("way", WAYS, ids=lambda w: f"zero{w[0]}-{w[1]}")
def test_weights_are_cast_once_a_step_and_nothing_changes(ranks, way):
    for measured in (rank[way] for rank in ranks):
        once, micro_batches, state, _ = measured["once"]
        each, _, undisturbed, _ = measured["each"]
        assert state == undisturbed
        assert micro_batches > 1
        if way[0] < 3:
            assert each == once * micro_batches > 0
        else:
            assert each == once
