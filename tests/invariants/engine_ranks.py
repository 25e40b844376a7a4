"""Real DeepSpeed ranks without Ray, and their work for tests/invariants/test_engine.py.

`work` runs every ZeRO stage with every legal sync policy in one process group, since starting a group takes
seconds.
"""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import socket
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.core.batches import Branch, Cut, SequenceGroup
from orchestrator.core.errors import InternalError, OutOfMemory
from orchestrator.core.faults import VARIABLE
from orchestrator.core.reports import LearnReport, StepApplied
from orchestrator.data.micro_batches import cut_step
from orchestrator.data.packing import filler
from orchestrator.learner.engine import Engine, ProcessGroup, on_cpu
from orchestrator.learner.probes import probe_peak
from orchestrator.learner.rank_learner import LearnerSpec, RankLearner
from orchestrator.learner.state import MOMENTS, full_weights, load_state, save_state
from orchestrator.models.forward import ScoringModel
from orchestrator.models.load import load
from orchestrator.plan.ways import LEGAL_SYNC
from orchestrator.recipe.schema import (
    AlgorithmConfig,
    Data,
    Learners,
    Model,
    Offload,
    Optimizer,
    Recipe,
    TinyModel,
)

WORLD = 2
CLIP = 0.05
BETA1 = 0.9
BAD_STEP = 99
Policy = tuple[int, str, str]
FP32 = [(stage, sync, "fp32") for stage, policies in LEGAL_SYNC.items() for sync in policies]
BF16 = [(1, "no_sync", "bf16"), (2, "per_micro_batch", "bf16"), (3, "per_micro_batch", "bf16")]
LOOKED_AT = [*FP32, BF16[0]]
"""DeepSpeed has a separate optimizer for bf16 at stage 1. At stages 2 and 3 it is the one for fp32."""
MOVES = [(0, 0), (1, 1), (2, 2), (3, 3), (0, 3), (3, 1), (1, 2), (2, 0)]
"""(saved at stage, loaded at stage)."""
HOLDS_BACK = [p for p in LOOKED_AT if p[0] < 3 and p[1] != "per_micro_batch"]
"""Policies under which a rank that stops early leaves no other rank waiting, so that a step can be replayed
in place."""


# ---- processes


def on_ranks(function: Callable[..., Any], world: int, folder: Path, *args: Any, timeout: float) -> list[Any]:
    """Runs function(group, *args) on `world` ranks, each in a separate process. Returns the results by rank.

    A rank that fails ends the others and fails the test with its traceback. So does the deadline `timeout`,
    in seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    files = [folder / f"rank-{rank}.pickle" for rank in range(world)]
    groups = [ProcessGroup(rank, world, "127.0.0.1", port, timeout) for rank in range(world)]
    processes = [
        spawn.Process(target=_rank, args=(function, g, f, args), daemon=True)
        for g, f in zip(groups, files, strict=True)
    ]
    deadline = time.monotonic() + timeout
    for process in processes:
        process.start()
    while (
        any(p.exitcode is None for p in processes)
        and not any(p.exitcode for p in processes)
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    codes = [p.exitcode for p in processes]
    for process in processes:
        process.kill()
        process.join()
    results = [pickle.loads(f.read_bytes()) if f.is_file() else None for f in files]
    if any(codes) or None in codes:
        errors = "\n".join(r for r in results if isinstance(r, str)) or f"no end after {timeout:.0f} s"
        pytest.fail(f"exit codes {codes}\n{errors}")
    return results


def _rank(function: Callable[..., Any], group: ProcessGroup, file: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        group.join(torch.device("cpu"))
        result = function(group, *args)
    except BaseException:
        file.write_bytes(pickle.dumps(f"rank {group.rank}:\n{traceback.format_exc()}"))
        os._exit(1)
    file.write_bytes(pickle.dumps(result))
    os._exit(0)  # without the interpreter's own teardown, which may wait for a rank that has ended


# ---- the model and its examples


def recipe(precision: str = "fp32", clip: float | None = CLIP, offload: Offload | None = None) -> Recipe:
    """SimPO on pairs. The vocabulary makes two tensors large enough for ZeRO-3 to partition them. The others
    stay whole."""
    return Recipe(
        model=Model(tiny=TinyModel(hidden_size=64, layers=1, heads=4, vocab_size=2048)),
        data=Data(train="none"),
        algorithm=AlgorithmConfig(name="simpo"),
        optimizer=Optimizer(
            learning_rate=1e-2,
            betas=(BETA1, 0.99),
            weight_decay=0.01,
            max_grad_norm=clip,
            schedule="linear",
            warmup_steps=2,
        ),
        learners=Learners(workers=WORLD, precision=precision, offload=offload or Offload()),
    )


def pairs(count: int, seed: int, longest: int = 12) -> list[SequenceGroup]:
    draw = np.random.default_rng(seed)

    def branch() -> Branch:
        size = int(draw.integers(1, longest))
        return Branch(draw.integers(0, 256, size), np.ones(size, np.bool_))

    return [
        SequenceGroup(i, draw.integers(0, 256, int(draw.integers(1, longest))), (branch(), branch()))
        for i in range(count)
    ]


STEPS = [pairs(11, seed) for seed in range(3)]
MANY_PAIRS = pairs(64 * WORLD, 3)


def cut(policy: Policy, examples: int = 2, world: int = WORLD) -> Cut:
    stage, sync, _ = policy
    return Cut(world, examples, None, "prefix_shared", stage, sync)  # pyright: ignore[reportArgumentType]


class Rank:
    """A new learner on this rank and its share of each step."""

    def __init__(
        self,
        group: ProcessGroup,
        policy: Policy,
        clip: float | None = CLIP,
        examples: int = 2,
        offload: Offload | None = None,
    ) -> None:
        self.cut, self.rank = cut(policy, examples, group.world), group.rank
        self.learner = RankLearner(
            LearnerSpec(recipe(policy[2], clip, offload), self.cut, 10), group, torch.device("cpu")
        )

    def forward(self, groups: Sequence[SequenceGroup], step: int) -> LearnReport:
        batch = cut_step(groups, self.cut)
        return self.learner.forward_backward(batch.micro_batches[self.rank], batch.units, step)

    def step(self, number: int) -> StepApplied:
        self.forward(STEPS[number], number)
        return self.learner.optim_step(number)

    def moments(self, name: str) -> dict[str, np.ndarray]:
        engine = self.learner.engine
        return {n: on_cpu(engine.moment(p, name)).numpy() for n, p in engine.module.named_parameters()}

    def weights(self) -> dict[str, np.ndarray]:
        return {name: weight.numpy() for name, weight in full_weights(self.learner)}

    def state(self) -> str:
        """SHA-256 of all fp32 weights and moments. A collective."""
        digest = hashlib.sha256()
        for name, weight in full_weights(self.learner):
            digest.update(name.encode() + weight.numpy().tobytes())
        for moment in MOMENTS:
            for value in self.moments(moment).values():
                digest.update(value.tobytes())
        return digest.hexdigest()


# ---- the work of every rank


@dataclass(frozen=True, slots=True)
class PolicyResults:
    """Results of one rank under one stage and policy."""

    after: tuple[str, ...]
    """after[n]: digest of the state after n + 1 good steps."""
    loss: float
    steps: tuple[StepApplied, ...]
    first_moment: dict[str, np.ndarray]
    unclipped: StepApplied
    unclipped_moment: dict[str, np.ndarray]
    refused: StepApplied
    after_refused: str
    good_after_refused: str
    after_discard: str
    after_probe: str
    good_after_discard: str
    plain: str
    with_fillers: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """Digests of a state that was saved and loaded."""

    saved: str
    loaded: str
    undisturbed: str
    """One step after saving, in the learner that was saved."""
    resumed: str
    """The same step in the learner that loaded the state."""
    gap: float
    """Largest difference of a weight between the two after that step."""


@dataclass(frozen=True, slots=True)
class Everything:
    """All results of one rank."""

    compilers: tuple[str | None, ...]
    results: dict[Policy, PolicyResults]
    moved: dict[tuple[int, int], Resumed]
    """By (saved at stage, loaded at stage)."""
    bf16: dict[Policy, Resumed]
    replayed: dict[tuple[Policy, int], str]
    """Digests by policy and the micro-batch that ran out of memory."""
    gradients: dict[Policy, dict[str, np.ndarray]]
    """Gradients of MANY_PAIRS from bf16 micro-batches, by name."""
    low_master: str


def work(group: ProcessGroup, folder: Path) -> Everything:
    return Everything(
        compilers=tuple(shutil.which(name) for name in ("g++", "gcc", "c++", "cc", "clang", "ninja")),
        results={policy: run_policy(group, policy) for policy in LOOKED_AT},
        moved=move(group, folder),
        bf16={policy: resume_bf16(group, policy, folder / f"bf16-{policy[0]}") for policy in BF16},
        replayed={(policy, at): replay(group, policy, at) for policy in HOLDS_BACK for at in (0, 1, 2)},
        gradients={policy: bf16_gradient(group, policy) for policy in BF16},
        low_master=low_master(),
    )


def run_policy(group: ProcessGroup, policy: Policy) -> PolicyResults:
    """Runs three steps undisturbed, then the same steps with every disturbance that must leave no trace."""
    calm = Rank(group, policy)
    loss = calm.forward(STEPS[0], 0).loss
    steps, states = [calm.learner.optim_step(0)], [calm.state()]
    first_moment = calm.moments("exp_avg")
    for number in (1, 2):
        steps.append(calm.step(number))
        states.append(calm.state())

    rough = Rank(group, policy)
    rough.step(0)
    with one_bad_micro_batch():
        rough.forward(STEPS[1], BAD_STEP)
    refused, after_refused = rough.learner.optim_step(1), rough.state()
    rough.step(1)
    good_after_refused = rough.state()
    rough.forward(STEPS[2], 2)
    rough.learner.discard()
    after_discard = rough.state()
    batch = cut_step(STEPS[1], rough.cut)
    probe_peak(rough.learner, batch.micro_batches[group.rank][0], batch.units)
    after_probe = rough.state()
    rough.step(2)
    good_after_discard = rough.state()

    plain, fillers = Rank(group, policy, clip=None), Rank(group, policy, clip=None)
    unclipped = plain.step(0)
    batch, extra = cut_step(STEPS[0], plain.cut), filler(STEPS[0], plain.cut.layout)
    fillers.learner.forward_backward([extra, *batch.micro_batches[group.rank], extra], batch.units, 0)
    fillers.learner.optim_step(0)
    return PolicyResults(
        after=tuple(states),
        loss=loss,
        steps=tuple(steps),
        first_moment=first_moment,
        unclipped=unclipped,
        unclipped_moment=plain.moments("exp_avg"),
        refused=refused,
        after_refused=after_refused,
        good_after_refused=good_after_refused,
        after_discard=after_discard,
        after_probe=after_probe,
        good_after_discard=good_after_discard,
        plain=plain.state(),
        with_fillers=fillers.state(),
    )


@contextmanager
def one_bad_micro_batch(rank: int = 1) -> Iterator[None]:
    """Makes the gradient of one rank's micro-batches of BAD_STEP NaN."""
    os.environ[VARIABLE] = json.dumps(
        [{"site": "micro_batch", "action": "nan", "step": BAD_STEP, "rank": rank}]
    )
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def move(group: ProcessGroup, folder: Path) -> dict[tuple[int, int], Resumed]:
    """Saves the state after two steps at every stage, and loads it at the same stage and at another."""
    sources: dict[int, tuple[str, str, dict[str, np.ndarray]]] = {}
    policies = [
        (0, "no_sync", "fp32"),
        (1, "no_sync", "fp32"),
        (2, "coalesced", "fp32"),
        (3, "per_micro_batch", "fp32"),
    ]
    for policy in policies:
        source = Rank(group, policy)
        saved = save_after_two(source, folder / f"fp32-{policy[0]}")
        source.step(2)
        sources[policy[0]] = saved, source.state(), source.weights()
    moved = {}
    for origin, stage in MOVES:
        saved, undisturbed, weights = sources[origin]
        target = Rank(group, policies[stage])
        load_state(target.learner, folder / f"fp32-{origin}", 2)
        loaded = target.state()
        target.step(2)
        gap = max(float(np.abs(w - weights[n]).max()) for n, w in target.weights().items())
        moved[origin, stage] = Resumed(saved, loaded, undisturbed, target.state(), gap)
    return moved


def relative_gap(baseline: Rank, other: Rank) -> float:
    """||dw|| / ||w|| over all weights. A collective."""
    weights, others = baseline.weights(), other.weights()
    square = sum(float(np.square(others[n] - w, dtype=np.float64).sum()) for n, w in weights.items())
    size = sum(float(np.square(w, dtype=np.float64).sum()) for w in weights.values())
    return float(np.sqrt(square / size))


def save_after_two(source: Rank, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    torch.distributed.barrier()
    source.step(0)
    source.step(1)
    save_state(source.learner, folder)
    torch.distributed.barrier()
    return source.state()


def resume_bf16(group: ProcessGroup, policy: Policy, folder: Path) -> Resumed:
    source, target = Rank(group, policy), Rank(group, policy)
    saved = save_after_two(source, folder)
    source.step(2)
    load_state(target.learner, folder, 2)
    loaded = target.state()
    target.step(2)
    gap = max(float(np.abs(w - target.weights()[n]).max()) for n, w in source.weights().items())
    return Resumed(saved, loaded, source.state(), target.state(), gap)


def replay(group: ProcessGroup, policy: Policy, at: int) -> str:
    """Digest of the state after a step that was replayed because micro-batch `at` of rank 1 ran out of memory
    in its forward, or in its backward if `at` is odd."""
    rank = Rank(group, policy)
    calls = iter(range(100))
    kept: list[weakref.ref[torch.Tensor]] = []

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("made by the test")

    def forward(_: object, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        if next(calls) == at:
            kept.append(weakref.ref(output[0]))
            exhausted() if at % 2 == 0 else output[0].register_hook(exhausted)

    handle = rank.learner.scoring.register_forward_hook(forward) if group.rank == 1 else None
    try:
        rank.forward(STEPS[0], 0)
        failed = False
    except OutOfMemory:
        failed = True
    assert failed == (group.rank == 1)
    if handle is not None:
        handle.remove()
    rank.learner.discard()
    assert not [ref for ref in kept if ref() is not None], "the failed micro-batch is still in memory"
    rank.step(0)
    return rank.state()


def bf16_gradient(
    group: ProcessGroup, policy: Policy, offload: Offload | None = None
) -> dict[str, np.ndarray]:
    """The gradient of MANY_PAIRS as it reached Adam."""
    rank = Rank(group, policy, clip=None, examples=1, offload=offload)
    rank.forward(MANY_PAIRS, 0)
    rank.learner.optim_step(0)
    return {name: value / (1 - BETA1) for name, value in rank.moments("exp_avg").items()}


def low_master() -> str:
    """The engine's error for a module whose master weights are bf16, or ""."""
    cfg = recipe()
    module = ScoringModel(load(cfg.model, seed=0, head="lm").model, head="lm").bfloat16()
    try:
        Engine(module, learners=cfg.learners, optimizer=cfg.optimizer, stage=0, sync="no_sync", world=WORLD)
    except InternalError as error:
        return error.what
    return ""
