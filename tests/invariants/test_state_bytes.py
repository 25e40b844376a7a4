"""The plan's bytes are DeepSpeed's: plan/state_bytes.py against the live storages of real engines, class by
class."""

import os
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest

from orchestrator.algorithms.table import build
from orchestrator.core.format import size
from orchestrator.plan.memory import model_sizes
from orchestrator.plan.state_bytes import StateBytes, state_bytes
from orchestrator.plan.ways import LEGAL_SYNC
from tests.invariants.engine_ranks import on_ranks
from tests.invariants.memory_ranks import Counted, Walked, Way, cut, recipe, walk_ways

CLASSES = tuple(asdict(StateBytes()))
OF_EACH_STAGE = [
    Way(0, "no_sync", "fp32"),
    Way(1, "no_sync", "bf16"),  # DeepSpeed's BF16_Optimizer: whole gradients twice on every rank
    Way(2, "per_micro_batch", "bf16"),
    Way(3, "per_micro_batch", "bf16"),
]


def ways(precision: str, lora: bool) -> list[Way]:
    """All that DeepSpeed can do in this precision on a CPU (fp16 it cannot)."""
    held = [(stage, sync) for stage, policies in LEGAL_SYNC.items() for sync in policies]
    if precision == "bf16":
        held = [(stage, sync) for stage, sync in held if stage and sync != "coalesced"]
    offloads = product(("none", "cpu"), ("none", "cpu"))
    every = [
        Way(stage, sync, precision, *offload, lora)
        for (stage, sync), offload in product(held, list(offloads))
    ]
    return [
        way
        for way in every
        if (way.optimizer == "none" or way.stage) and (way.parameters == "none" or way.stage == 3)
    ]


def predicted(way: Way, workers: int) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by class on device and host together, which are one on a CPU."""
    config = recipe(way, workers)
    held = state_bytes(model_sizes(config, build(config.algorithm)), config.learners, cut(way, workers))
    device, host = asdict(held.device), asdict(held.host)
    return {name: device[name] + host[name] for name in CLASSES}, host


def most(ranks: list[Counted]) -> dict[str, int]:
    """The most of each class over the ranks: what a plan has to hold."""
    return {name: max(getattr(rank, name) for rank in ranks) for name in (*CLASSES, "rest")}


def compare(way: Way, workers: int, ranks: list[Walked]) -> list[str]:
    """Prints a row of the table; what is wrong: a class more than 2 % off (of itself, or a tenth of that of
    everything)."""
    expected, host = predicted(way, workers)
    counted = most([r.backward for r in ranks])
    total = sum(counted.values())
    wrong = [n for n in CLASSES if abs(expected[n] - counted[n]) > max(0.02 * counted[n], 0.002 * total)]
    row = (
        f"{way.stage} {way.sync:<15} {way.precision:<13} {way.optimizer:<4} {way.parameters:<4} "
        f"{'lora' if way.lora else '':<4} {workers}  "
    )
    row += "  ".join(
        f"{n} {size(expected[n])}/{size(counted[n])}" for n in CLASSES if expected[n] or counted[n]
    )
    row += f"  all {sum(expected.values()) / total - 1:+.2%}  on host {size(sum(host.values()))}"
    print(row)
    stepped = most([r.stepped for r in ranks])
    problems = [f"{wrong} differ"] if wrong else []
    problems += [f"{size(counted['rest'])} belong to no class"] if counted["rest"] > 0.005 * total else []
    problems += (
        ["other moments after the step"]
        if stepped["moments"] != pytest.approx(expected["moments"], rel=0.02)
        else []
    )
    problems += (
        ["more after the step than in the backward"]
        if sum(stepped.values()) > 1.005 * sum(expected.values())
        else []
    )
    return [f"{row}: {problem}" for problem in problems]


@pytest.mark.timeout(600)
def test_each_stage_holds_what_is_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ranks = on_ranks(walk_ways, 2, tmp_path, OF_EACH_STAGE, timeout=400)
    assert not [
        problem
        for way, *found in zip(OF_EACH_STAGE, *ranks, strict=True)
        for problem in compare(way, 2, found)
    ]
    wrong = predicted(Way(2, "per_micro_batch", "bf16"), 2)[0]  # what documents say of stage 1 in bf16
    counted = most([r[1].backward for r in ranks])
    assert counted["gradients"] + counted["accumulators"] > 2.9 * (wrong["gradients"] + wrong["accumulators"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
@pytest.mark.parametrize("lora", [False, True])
def test_every_way_holds_what_is_predicted(
    workers: int, precision: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each precision in processes of its own: DeepSpeed's autocast is a switch of the process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    wanted, problems = ways(precision, lora), []
    for part in range(0, len(wanted), 6):  # an engine leaves tensors behind when it goes
        folder = tmp_path / str(part)
        os.mkdir(folder)
        some = wanted[part : part + 6]
        ranks = on_ranks(walk_ways, workers, folder, some, timeout=1200)
        problems += [
            problem
            for way, *found in zip(some, *ranks, strict=True)
            for problem in compare(way, workers, found)
        ]
    assert not problems
