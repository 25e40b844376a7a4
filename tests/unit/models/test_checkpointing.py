"""Computing activations again changes no gradient. `selective` computes no matrix product again, `full` all
of them."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.core.batches import Branch, SequenceGroup
from orchestrator.data.packing import pack
from orchestrator.models.forward import MicroBatchTensors, ScoringModel, run_forward
from orchestrator.models.load import load
from orchestrator.recipe.schema import Lora, Model, TinyModel

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in PRODUCTS
        return func(*args, **(kwargs or {}))


def rows():
    draw = np.random.default_rng(0)

    def branch(size):
        return Branch(draw.integers(0, 256, size), np.ones(size, np.bool_))

    groups = [SequenceGroup(i, draw.integers(0, 256, 5), (branch(7), branch(4))) for i in range(3)]
    return MicroBatchTensors.of(pack(groups, "prefix_shared"), torch.device("cpu"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen3"])
@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_all_modes_give_the_same_gradients(architecture, lora):
    loaded = load(Model(tiny=TinyModel(architecture=architecture, layers=3), lora=lora), seed=0, head="lm")
    scoring, batch = ScoringModel(loaded.model, head="lm").train(), rows()
    for module in scoring.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients, products = {}, {}
    for mode in ("none", "selective", "full", "none"):  # "none" again at the end, to see that it can be reset
        scoring.checkpoint(mode)
        scoring.zero_grad(set_to_none=True)
        with Products() as counted:
            run_forward(scoring, batch).values.sum().backward()
        if mode in gradients:
            assert counted.count == products[mode]
        gradients[mode] = {n: p.grad.clone() for n, p in scoring.named_parameters() if p.grad is not None}
        products[mode] = counted.count
    for mode in ("selective", "full"):
        assert gradients[mode].keys() == gradients["none"].keys()
        for name, gradient in gradients["none"].items():
            torch.testing.assert_close(gradients[mode][name], gradient, rtol=1e-5, atol=1e-6)
    assert products["full"] > products["selective"] == products["none"]
