"""No objective reads a number from the device: each runs, forward and backward, on tensors without data."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from orchestrator.algorithms.losses.interface import ExperienceTensors, LossSum, TokenScores
from orchestrator.algorithms.losses.logprobs import HeadSpec, chunked_logprobs
from orchestrator.algorithms.losses.preference_mix import WITH_REFERENCE
from orchestrator.algorithms.table import AlgorithmSpec, build, critic
from orchestrator.core.batches import LossUnits
from orchestrator.recipe.schema import ONLINE, AlgorithmConfig

TOKENS, EXAMPLES = 24, 4


def algorithms() -> list[AlgorithmSpec]:
    specs = [build(AlgorithmConfig(name="dpo", loss=loss, label_smoothing=0.01)) for loss in WITH_REFERENCE]
    specs += [build(AlgorithmConfig(name=name)) for name in ("simpo", "orpo", "cpo")]
    specs += [build(AlgorithmConfig(name="dpo", loss={"sigmoid": 0.5, "sft": 1.0}, ld_alpha=0.5))]
    specs += [
        build(AlgorithmConfig(name="dpo", wpo=True)),
        build(AlgorithmConfig(name="sft")),
        build(AlgorithmConfig(name="reward")),
        build(AlgorithmConfig(name="kto")),
    ]
    specs += [build(AlgorithmConfig(name=name)) for name in ONLINE]
    return [*specs, critic(AlgorithmConfig(name="ppo"))]


def scores(algorithm: AlgorithmSpec) -> TokenScores:
    def column(requires_grad: bool = False) -> Tensor:
        return torch.zeros(TOKENS, requires_grad=requires_grad)

    branches = algorithm.branches
    is_critic = algorithm.head == "value"
    return TokenScores(
        logps=column(True),
        sequence=torch.zeros(TOKENS, dtype=torch.long),
        examples=EXAMPLES,
        branches=branches,
        ref_logps=column(),
        label=torch.zeros(EXAMPLES),
        margin=torch.zeros(EXAMPLES),
        wpo=column(),
        rewards=torch.zeros(EXAMPLES, branches, requires_grad=True) if algorithm.head == "scalar" else None,
        entropy=column(),
        values=column(True) if is_critic else None,
        experience=ExperienceTensors(*(column() for _ in range(6))),
    )


def run(algorithm: AlgorithmSpec) -> LossSum:
    with FakeTensorMode():
        loss = algorithm.objective(scores(algorithm), LossUnits(EXAMPLES, (TOKENS,) * algorithm.branches))
        loss.total.backward()
    return loss


@pytest.mark.parametrize("algorithm", algorithms(), ids=lambda a: a.name)
def test_an_objective_never_waits_for_the_device(algorithm):
    assert run(algorithm).means


def test_the_head_never_waits_for_the_device():
    with FakeTensorMode():
        hidden, weight = torch.zeros(9, 4, requires_grad=True), torch.zeros(11, 4, requires_grad=True)
        spec = HeadSpec(chunk=4, want_wpo=True, want_entropy=True)
        chunked_logprobs(hidden, weight, None, torch.zeros(9, dtype=torch.long), spec).logps.sum().backward()


@pytest.mark.parametrize(
    "ask", [lambda s: float(s.logps.sum()), lambda s: s.logps[s.logps > 0].sum()], ids=["float", "mask"]
)
def test_an_objective_that_waits_would_be_seen(ask):
    plain = build(AlgorithmConfig(name="sft"))

    def asking(given: TokenScores, units: LossUnits) -> LossSum:
        return LossSum(plain.objective(given, units).total, {"asked": (given.logps.sum(), ask(given))})

    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        run(replace(plain, objective=asking))
