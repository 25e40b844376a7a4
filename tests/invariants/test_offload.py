"""With optimizer state (and ZeRO-3's parameters) in host memory, steps, refusals, discards and checkpoints
are the same as on the device."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.learner.engine import ProcessGroup
from orchestrator.learner.state import load_state
from orchestrator.plan.ways import LEGAL_SYNC
from orchestrator.recipe.schema import Offload
from orchestrator.run.verify import TOLERANCE
from tests.invariants.engine_ranks import (
    BAD_STEP,
    STEPS,
    Policy,
    Rank,
    bf16_gradient,
    on_ranks,
    one_bad_micro_batch,
    relative_gap,
    save_after_two,
)

pytestmark = pytest.mark.timeout(600)
OPTIMIZER = Offload(optimizer="cpu", parameters="none")
BOTH = Offload(optimizer="cpu", parameters="cpu")
Case = tuple[Policy, Offload]


def legal(precision: str) -> list[Case]:
    """Every combination that can be offloaded: ZeRO 1-3, without whole gradients held back in bf16."""
    low = precision == "bf16"
    ways = [
        (stage, sync)
        for stage in (1, 2, 3)
        for sync in LEGAL_SYNC[stage]
        if not (low and sync == "coalesced")
    ]
    return [
        ((stage, sync, precision), where)
        for stage, sync in ways
        for where in ((OPTIMIZER, BOTH) if stage == 3 else (OPTIMIZER,))
    ]


GRID = [case for precision in ("fp32", "bf16", "bf16_autocast") for case in legal(precision)]
FEW: list[Case] = [
    ((1, "no_sync", "bf16"), OPTIMIZER),
    ((2, "coalesced", "fp32"), OPTIMIZER),
    ((3, "per_micro_batch", "bf16"), BOTH),
]


@dataclass(frozen=True, slots=True)
class Offloaded:
    """Results of one case. A state is the SHA-256 of weights and moments."""

    after: tuple[str, ...]
    """States after undisturbed steps 1, 2 and 3."""
    norms: tuple[float, ...]
    plain_norms: tuple[float, ...]
    """Gradient norms of the same steps without offload."""
    gaps: tuple[float, ...]
    """||dw|| / ||w|| against the weights without offload, after each step."""
    refused: bool
    after_refused: str
    after_discard: str
    rough: tuple[str, ...]
    """States after the same steps, with a refused and a discarded step in between."""
    loaded: str
    """State after step 2, saved and loaded again."""
    resumed: str
    """State one step after that."""
    on_host: bool
    accumulation: float
    """Largest difference of the gradient of many bf16 micro-batches from the one without offload, relative to
    its largest value."""


def compare(group: ProcessGroup, folder: Path, cases: list[Case]) -> dict[Case, Offloaded]:
    return {case: run_case(group, folder / str(i), *case) for i, case in enumerate(cases)}


def run_case(group: ProcessGroup, folder: Path, policy: Policy, where: Offload) -> Offloaded:
    plain, calm = Rank(group, policy), Rank(group, policy, offload=where)
    norms, plain_norms, gaps, after = [], [], [], []
    for number in range(3):
        plain_norms.append(plain.step(number).grad_norm)
        norms.append(calm.step(number).grad_norm)
        gaps.append(relative_gap(plain, calm))
        after.append(calm.state())

    rough = Rank(group, policy, offload=where)
    rough_states = []
    rough.step(0)
    rough_states.append(rough.state())
    with one_bad_micro_batch(group.world - 1):
        rough.forward(STEPS[1], BAD_STEP)
    refused, after_refused = not rough.learner.optim_step(1).applied, rough.state()
    rough.forward(STEPS[2], 2)
    rough.learner.discard()
    after_discard = rough.state()
    for number in (1, 2):
        rough.step(number)
        rough_states.append(rough.state())

    source, target = Rank(group, policy, offload=where), Rank(group, policy, offload=where)
    folder.mkdir(exist_ok=True)
    save_after_two(source, folder)
    load_state(target.learner, folder, 2)
    loaded = target.state()
    target.step(2)
    torch.distributed.barrier()
    shutil.rmtree(folder, ignore_errors=True)
    zero = calm.learner.engine.zero
    return Offloaded(
        after=tuple(after),
        norms=tuple(norms),
        plain_norms=tuple(plain_norms),
        gaps=tuple(gaps),
        refused=refused,
        after_refused=after_refused,
        after_discard=after_discard,
        rough=tuple(rough_states),
        loaded=loaded,
        resumed=target.state(),
        accumulation=accumulation(group, policy, where) if policy[2] == "bf16" else 0.0,
        on_host=bool(getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False)),
    )


def accumulation(group: ProcessGroup, policy: Policy, where: Offload) -> float:
    plain, offloaded = bf16_gradient(group, policy), bf16_gradient(group, policy, where)
    return max(float(np.abs(offloaded[n] - g).max() / np.abs(g).max()) for n, g in plain.items())


ALL = pytest.mark.slow


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        pytest.param(2, FEW, id="few"),
        pytest.param(1, GRID, id="all-1", marks=ALL),
        pytest.param(2, GRID, id="all-2", marks=ALL),
    ],
)
def test_an_offloaded_step_is_the_same_step(tmp_path: Path, world: int, cases: list[Case]) -> None:
    for results in on_ranks(compare, world, tmp_path, tmp_path, cases, timeout=500.0):
        for case, result in results.items():
            where = f"{case}: {result}"
            assert result.accumulation <= 1e-4, where  # a bf16 sum would be 1e-2 off
            assert result.on_host, where
            assert len(set(result.after)) == 3, where  # each step changes the weights
            assert result.norms == pytest.approx(result.plain_norms, rel=TOLERANCE[case[0][2]]), where
            assert max(result.gaps) <= TOLERANCE[case[0][2]], where
            assert result.refused, where
            assert result.after_refused == result.after_discard == result.after[0], where
            assert result.rough == result.after, where
            assert (result.loaded, result.resumed) == result.after[1:], where
