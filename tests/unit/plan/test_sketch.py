"""Plans from lengths alone."""

import numpy as np
import pytest

from orchestrator.core.errors import ConfigError
from orchestrator.plan.hardware import hypothetical_hardware
from orchestrator.plan.sketch import Lengths
from orchestrator.recipe.loading import load
from orchestrator.run.stages import plan_stages

GPU = ["learners.workers=auto", "learners.gpus_per_worker=1"]


def test_lengths_have_the_given_mean_and_maximum():
    drawn = Lengths(900, 8192).draw(5000, seed=1)
    assert drawn.mean() == pytest.approx(900, rel=0.03)
    assert (drawn.min() >= 2, drawn.max()) == (True, 8192)
    assert np.array_equal(drawn, Lengths(900, 8192).draw(5000, seed=1))
    assert not np.array_equal(drawn, Lengths(900, 8192).draw(5000, seed=2))


@pytest.mark.parametrize("text", ["900", "900,", "a,b", "900,100", "1,2,3", "-3,5"])
def test_other_lengths_are_refused(text):
    with pytest.raises(ConfigError, match="MEAN,MAX"):
        Lengths.parse(text)


def test_an_8b_model_on_eight_gpus_is_planned_as_counted_by_hand():
    """Llama 3 8B, N = 8,030,261,248, bf16, 8 ranks: ZeRO 1 would hold 2N weights + 2N + 4N gradients + 12N/8
    = 76.3 GB, more than a worker may use. At ZeRO 2: 16.06 of weights, 4.02 each of fp32 sums and master,
    8.03 of moments."""
    (_, found), *_ = plan_stages(
        load("recipes/dpo/llama-3-8b.yaml", GPU).stages,
        hypothetical_hardware(1, "h100-80g"),
        Lengths(1000, 2048),
    )
    memory = found.memory
    assert (found.cut.workers, found.cut.zero_stage, found.cut.sync) == (8, 2, "per_micro_batch")
    by_hand = {
        "weights": 16.06e9,
        "gradients": 0,
        "accumulators": 4.015e9,
        "master": 4.015e9,
        "moments": 8.03e9,
    }
    assert {name: memory.parts[name] for name in by_hand} == pytest.approx(by_hand, rel=0.01)
    assert memory.loading == pytest.approx(4 * 8.03e9 + 1e9, rel=0.01)  # fp32, whole, and the context
    assert memory.ram == pytest.approx(4 * 8.03e9 + 4e9, rel=0.01)
    assert sum(by_hand.values()) + 10e9 < memory.total <= found.memory_limit == 64_000_000_000
    assert found.recipe.learners.activation_checkpointing != "auto"
    assert found.recipe.model.path == "OpenRLHF/Llama-3-8b-sft-mixture"


@pytest.mark.slow
def test_all_shipped_recipes_are_planned_without_data_model_or_network(monkeypatch):
    import socket

    def refused(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", refused)
    for name in ("dpo/qwen2.5-0.5b", "grpo/qwen2.5-1.5b-gsm8k"):
        (_, found), *_ = plan_stages(
            load(f"recipes/{name}.yaml", GPU).stages, hypothetical_hardware(1, "h100-80g"), Lengths(700, 1024)
        )
        assert found.memory.peak <= found.memory_limit
        assert {"model", "data"} <= {c.name for c in found.choices}
