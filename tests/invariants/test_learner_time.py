"""A rank reports a step's time and work correctly, and does not wait for the device before it reads the
step's sums."""

import time
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.data.micro_batches import cut_step, loss_units
from orchestrator.data.packing import pack
from orchestrator.learner import rank_learner as learner_module
from orchestrator.learner.engine import ProcessGroup
from orchestrator.models import rows
from tests.invariants.engine_ranks import STEPS, Rank, on_ranks

pytestmark = pytest.mark.timeout(300)
READ_S = 0.5
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")


class WaitingOperations(TorchDispatchMode):
    """Records operations that stop the host until the device has answered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def step(group: ProcessGroup) -> dict[str, Any]:
    rank = Rank(group, (1, "no_sync", "fp32"))
    batch = cut_step(STEPS[0], rank.cut)
    copies: list[int] = []
    real_copy, real_sums = rows.to_device, learner_module.Sums

    def counted(columns: Any, device: torch.device) -> Any:
        copies.append(len(columns))
        return real_copy(columns, device)

    class Slow(real_sums):
        """Simulates a slow device, whose sums arrive after all earlier work is done."""

        def read(self) -> Any:
            time.sleep(READ_S)
            return super().read()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "to_device", counted)
        with WaitingOperations() as waits:
            report = rank.learner.forward_backward(batch.micro_batches[0], batch.units, 0)
        rank.learner.discard()
        patch.setattr(learner_module, "Sums", Slow)
        slow = rank.learner.forward_backward(batch.micro_batches[0], batch.units, 0).seconds
        rank.learner.discard()
        slow_evaluation = rank.learner.evaluate(batch.micro_batches[0], batch.units)[0].seconds
    with WaitingOperations() as control:
        float(torch.ones(1).sum())
    return {
        "waits": waits.names,
        "control": control.names,
        "copies": copies[: len(batch.micro_batches[0])],
        "micro_batches": len(batch.micro_batches[0]),
        "slow": (slow, slow_evaluation),
        "attended": report.attended,
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(step, 1, tmp_path_factory.mktemp("step"), timeout=250.0)[0]


def test_the_time_of_a_step_is_taken_after_the_device_has_answered(measured):
    assert min(measured["slow"]) >= READ_S


def test_no_micro_batch_waits_for_the_device(measured):
    assert measured["waits"] == []
    assert measured["control"] == ["_local_scalar_dense"]


def test_a_micro_batch_is_one_copy(measured):
    assert len(measured["copies"]) == measured["micro_batches"] > 1


def test_attention_counts_the_tokens_that_each_token_sees(measured):
    """For one layer: the prompt once, and each branch over the prompt and itself."""
    expected = 0
    for group in STEPS[0]:
        prompt = len(group.prompt)
        expected += prompt * (prompt + 1) // 2
        expected += sum(len(b.ids) * prompt + len(b.ids) * (len(b.ids) + 1) // 2 for b in group.branches)
    assert measured["attended"] == expected


@pytest.mark.parametrize("layout", ["prefix_shared", "packed", "padded"])
def test_a_windows_attention_is_counted_in_every_layout(layout: Any):
    """With a window of 4 each token sees at most 4 tokens. Padding sees nothing. Packed and padded rows
    compute the prompt for each branch."""
    group = STEPS[0][0]
    lengths = [len(group.prompt) + len(b.ids) for b in group.branches]
    seen = [sum(min(i + 1, 4) for i in range(n)) for n in lengths]
    twice = sum(min(i + 1, 4) for i in range(len(group.prompt))) if layout == "prefix_shared" else 0
    batch = pack([group], layout)
    assert batch.attended(4) == sum(seen) - twice
    assert loss_units([group]).examples == len(batch)
