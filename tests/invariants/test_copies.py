"""A rank copies to the host only what it writes, and fills only the buckets that it sends."""

from pathlib import Path

import pytest
import torch

from orchestrator.learner import state
from orchestrator.learner import weights as publish
from orchestrator.learner.engine import ProcessGroup
from orchestrator.learner.export import export_learner
from orchestrator.learner.probes import final_weights
from orchestrator.learner.state import MOMENTS, save_state
from tests.invariants.engine_ranks import WORLD, Rank, on_ranks

pytestmark = pytest.mark.timeout(300)
STAGES = ((1, "no_sync", "fp32"), (3, "per_micro_batch", "fp32"))
Bytes = dict[str, int]


def copied(group: ProcessGroup, folder: Path) -> dict[int, Bytes]:
    """Bytes that this rank copied or packed by stage and task. `state`: bytes of all weights and moments."""
    return {policy[0]: count_copies(Rank(group, policy), folder / str(policy[0])) for policy in STAGES}


def count_copies(rank: Rank, folder: Path) -> Bytes:
    seen: Bytes = {}
    doing, real_copy, real_fill = "", state.on_cpu, publish.fill

    def counted_copy(tensor: torch.Tensor) -> torch.Tensor:
        seen[doing] = seen.get(doing, 0) + tensor.numel() * tensor.element_size()
        return real_copy(tensor)

    def counted_fill(entries, total, tensors, device):
        seen[doing] = seen.get(doing, 0) + total
        return real_fill(entries, total, tensors, device)

    rank.step(0)
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "on_cpu", counted_copy)
        patch.setattr(publish, "fill", counted_fill)
        doing = "save"
        save_state(rank.learner, folder)
        doing = "export"
        export_learner(rank.learner, folder / "export", "card")
        doing = "final"
        final_weights(rank.learner)
        doing = "publish"
        publish.send_each(rank.learner, 1 << 20, (lambda *_: None) if rank.rank == 0 else None)
    weights = sum(4 * getattr(p, "ds_numel", p.numel()) for p in rank.learner.engine.module.parameters())
    return {**seen, "state": weights * (1 + len(MOMENTS)), "weights": weights}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, Bytes]]:
    folder = tmp_path_factory.mktemp("copies")
    return on_ranks(copied, WORLD, folder, folder, timeout=250.0)


@pytest.mark.parametrize("stage", [policy[0] for policy in STAGES])
def test_a_checkpoint_is_copied_once_by_all_ranks_together(ranks, stage):
    each = [rank[stage]["save"] for rank in ranks]
    assert sum(each) == ranks[0][stage]["state"]
    assert max(each) < 0.75 * sum(each)


@pytest.mark.parametrize("stage", [policy[0] for policy in STAGES])
@pytest.mark.parametrize("what", ["export", "final", "publish"])
def test_only_rank_0_copies_what_it_alone_writes_or_sends(ranks, stage, what):
    assert ranks[0][stage][what] >= ranks[0][stage]["weights"]
    assert what not in ranks[1][stage]
