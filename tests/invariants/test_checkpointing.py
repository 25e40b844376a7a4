"""Computing activations again changes no optimizer step, at any ZeRO stage, with an adapter or without."""

from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.data.micro_batches import cut_step
from orchestrator.learner.engine import ProcessGroup
from orchestrator.learner.rank_learner import LearnerSpec, RankLearner
from orchestrator.learner.state import full_weights
from orchestrator.recipe.schema import Lora
from tests.invariants.engine_ranks import STEPS, cut, on_ranks, recipe

MODES = ("none", "selective", "full")
PLACES = [(0, "no_sync"), (1, "no_sync"), (2, "per_micro_batch"), (3, "per_micro_batch")]


def learn(group: ProcessGroup) -> dict[tuple[int, bool, str], dict[str, np.ndarray]]:
    """Weights after two steps by (stage, adapter, mode)."""
    learned = {}
    for stage, sync in PLACES:
        how = cut((stage, sync, "fp32"))
        for adapter in (False, True):
            for mode in MODES:
                config = recipe().with_checkpointing(mode)
                config = config.model_copy(
                    update={
                        "model": config.model.model_copy(update={"lora": Lora(rank=2) if adapter else None})
                    }
                )
                learner = RankLearner(LearnerSpec(config, how, 10), group, torch.device("cpu"))
                for step in range(2):
                    batch = cut_step(STEPS[step], how)
                    learner.forward_backward(batch.micro_batches[group.rank], batch.units, step)
                    assert learner.optim_step(step).applied
                learned[stage, adapter, mode] = {n: weight.numpy() for n, weight in full_weights(learner)}
    return learned


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_mode_takes_the_same_steps(tmp_path: Path) -> None:
    learned = on_ranks(learn, 2, tmp_path, timeout=500)[0]
    for (stage, adapter, mode), weights in learned.items():
        plain = learned[stage, adapter, "none"]
        assert weights.keys() == plain.keys()
        for name, weight in weights.items():
            np.testing.assert_allclose(
                weight, plain[name], rtol=1e-5, atol=2e-6, err_msg=f"{stage} {adapter} {mode} {name}"
            )
    for stage, _ in PLACES:
        adapter = learned[stage, True, "full"]
        assert any("lora_B" in name and weight.any() for name, weight in adapter.items()), (
            "the adapter starts at zero and must change"
        )
