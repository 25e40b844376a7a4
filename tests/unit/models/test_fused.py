"""Compiled norms and feed-forward blocks: the same gradients, few graphs, nothing renamed."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

from orchestrator.data.packing import pack
from orchestrator.models.forward import MicroBatchTensors, ScoringModel, run_forward
from orchestrator.models.fused import fuse
from orchestrator.models.tiny import build
from orchestrator.recipe.schema import TinyModel
from tests.invariants.test_layouts import groups


def policy(architecture: str, backend: str | None, layers: int = 4) -> ScoringModel:
    cfg = TinyModel(architecture=architecture, hidden_size=64, layers=layers, heads=4, kv_heads=2)
    model = build(cfg, 0, AutoModelForCausalLM, initializer_range=0.1).train()
    if backend is not None:
        assert (
            fuse(model, backend) >= 3 * layers
        )  # two norms and a feed-forward block each, and the last norm
    return ScoringModel(model, head="lm")


def learned(model: ScoringModel, layout: str, count: int = 5) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    values = run_forward(
        model, MicroBatchTensors.of(pack(groups()[:count], layout), torch.device("cpu"))
    ).values
    model.zero_grad()
    values.sum().backward()
    return values.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.slow  # inductor compiles C++ for half a minute
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_compiled_blocks_give_the_same_log_probs_and_gradients(architecture):
    plain, fused = policy(architecture, None), policy(architecture, "inductor")
    for layout, count in (("prefix_shared", 5), ("packed", 3), ("padded", 4)):
        want, want_gradients = learned(plain, layout, count)
        got, gradients = learned(fused, layout, count)
        assert torch.allclose(got, want, atol=1e-5)
        assert gradients.keys() == want_gradients.keys()
        norm = torch.stack([g.norm() for g in want_gradients.values()]).norm()
        assert max(float((gradients[name] - g).norm() / norm) for name, g in want_gradients.items()) <= 1e-5


@pytest.mark.parametrize("layers", [2, 6])
def test_layers_share_their_graphs_whatever_the_rows(layers):
    """There are graphs for a norm and a feed-forward block, with gradients and without. The number of layers
    and the shapes of rows make no difference."""
    counter = CompileCounter()
    torch._dynamo.reset()
    model = policy("llama", counter, layers)  # type: ignore[arg-type]
    for layout, count in (("prefix_shared", 5), ("packed", 3), ("padded", 4)):
        learned(model, layout, count)
        with torch.no_grad():
            run_forward(model, MicroBatchTensors.of(pack(groups()[:count], layout), torch.device("cpu")))
    # of two kinds, with and without gradients, for one row of tokens and for several rows
    assert 2 <= counter.frame_count <= 8


def test_names_stay():
    assert [n for n, _ in policy("llama", "eager").named_parameters()] == [
        n for n, _ in policy("llama", None).named_parameters()
    ]
