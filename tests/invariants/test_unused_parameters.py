"""A parameter that no token of a step reaches has a gradient of zero in that step: neither that of an earlier
step nor the infinity of a refused one.

Every ZeRO stage and sync policy runs on two real ranks, against torch's AdamW over the same steps in one
process.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from orchestrator.learner.engine import Engine, ProcessGroup, on_cpu
from orchestrator.plan.ways import LEGAL_SYNC
from orchestrator.recipe.schema import Learners, Offload, Optimizer
from tests.invariants.engine_ranks import on_ranks

pytestmark = pytest.mark.timeout(500)
WORLD = 2
WIDTH = 320
"""320 x 320 values are enough for ZeRO-3 to partition a tensor."""
OPTIMIZER = Optimizer(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)
Policy = tuple[int, str, str]
POLICIES: list[Policy] = [
    *((stage, sync, "none") for stage, legal in LEGAL_SYNC.items() for sync in legal),
    (2, "per_micro_batch", "cpu"),
    (3, "per_micro_batch", "cpu"),
]
STEPS: tuple[tuple[tuple[int, ...], ...], ...] = (((0, 1), (0,)), ((0,), (0,)), ((0,), (0,)), ((1,), (0,)))
"""Experts that receive tokens, by step and micro-batch. The second expert is used in step 0, then not at all,
then in the first micro-batch of the last step."""
REFUSED_AFTER = 1
"""A step is refused after this one. After it the second expert has no gradient for a whole step."""


class Experts(nn.Module):
    """Two experts and a norm. A forward uses the named experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor, used: Sequence[int]) -> Tensor:
        for index in used:
            hidden = hidden + self.experts[index](self.norm(hidden))
        return hidden.square().sum()


def inputs(step: int, micro: int, rank: int) -> Tensor:
    return (
        torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank)) / WIDTH
    )


def plain() -> dict[str, Tensor]:
    """Weights after all steps with torch's AdamW, on the sum of all ranks' micro-batches. Missing gradients
    are zeros."""
    module = Experts()
    decay, other = [e.weight for e in module.experts], list(module.norm.parameters())
    groups = [
        {"params": decay, "weight_decay": OPTIMIZER.weight_decay},
        {"params": other, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    for number, micro_batches in enumerate(STEPS):
        adam.zero_grad()
        for micro, used in enumerate(micro_batches):
            for rank in range(WORLD):
                module(inputs(number, micro, rank), used).backward()
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.nn.utils.clip_grad_norm_(module.parameters(), OPTIMIZER.max_grad_norm or 0.0)
        adam.step()
    return {name: p.detach() for name, p in module.named_parameters()}


def trained(group: ProcessGroup, policies: Sequence[Policy]) -> dict[Policy, dict[str, Tensor]]:
    """The weights after all steps under each policy."""
    weights = {}
    for stage, sync, offload in policies:
        where = Offload(optimizer=offload)  # pyright: ignore[reportArgumentType]
        learners = Learners(workers=WORLD, offload=where)
        engine = Engine(
            Experts(), learners=learners, optimizer=OPTIMIZER, stage=stage, sync=sync, world=WORLD
        )
        for number, micro_batches in enumerate(STEPS):
            with engine.accumulation():
                for micro, used in enumerate(micro_batches):
                    loss = engine(inputs(number, micro, group.rank), used)
                    engine.backward(loss, last=micro == len(micro_batches) - 1)
            assert engine.step(OPTIMIZER.learning_rate).applied, (stage, sync, offload, number)
            if number == REFUSED_AFTER:
                engine.discard(lambda engine=engine: engine(inputs(9, 0, 0), (0, 1)))
        weights[stage, sync, offload] = {
            name: on_cpu(engine.weight(p)) for name, p in engine.module.named_parameters()
        }
    return weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[Policy, dict[str, Tensor]]:
    return on_ranks(trained, WORLD, tmp_path_factory.mktemp("unused"), POLICIES, timeout=480.0)[0]


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return plain()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"zero{p[0]}-{p[1]}-{p[2]}")
def test_a_missing_gradient_counts_as_zero(weights, expected, policy):
    for name, weight in expected.items():
        torch.testing.assert_close(
            weights[policy][name], weight, rtol=0.0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
