"""Two real DeepSpeed ranks, no Ray: every ZeRO stage with every legal sync policy keeps the accumulation contract.

All work is done once, in one process group, without a compiler on the PATH; the tests look at what it found.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.algorithms import build
from orchestrator.config import Algorithm, Data, Learners, Model, Optimizer, Recipe, TinyModel
from orchestrator.cut import cut_step, loss_units
from orchestrator.data.packing import filler
from orchestrator.errors import OutOfMemory
from orchestrator.faults import VARIABLE
from orchestrator.learner.checks import probe_peak
from orchestrator.learner.engine import Engine, ProcessGroup
from orchestrator.learner.learner import LearnerSpec, RankLearner
from orchestrator.learner.plain import PlainTrainer
from orchestrator.learner.state import MOMENTS, full_weights, load_state, save_state
from orchestrator.memory_model import traffic
from orchestrator.models.load import load
from orchestrator.models.scoring import MicroBatchTensors, ScoringModel, scored
from orchestrator.objectives.scores import TokenScores
from orchestrator.plan import LEGAL_SYNC
from orchestrator.records import Branch, Cut, LearnReport, MicroBatch, SequenceGroup, StepApplied

WORLD = 2
CLIP = 0.05
BETA1 = 0.9
BAD_STEP = 99
Policy = tuple[int, str, str]
FP32 = [(stage, sync, "fp32") for stage, policies in LEGAL_SYNC.items() for sync in policies]
BF16 = [(1, "no_sync", "bf16"), (2, "per_micro_batch", "bf16"), (3, "per_micro_batch", "bf16")]
HOLDS_BACK = [p for p in FP32 + BF16 if p[0] < 3 and p[1] != "per_micro_batch"]
"""Where a rank that stops early leaves no other one waiting, so that a step is replayed in place."""


# ---- processes ----------------------------------------------------------------------------------------------------


def on_ranks(function: Callable[..., Any], world: int, folder: Path, *args: Any, timeout: float) -> list[Any]:
    """function(group, *args) on `world` ranks, each in a process of its own; results by rank.

    A rank that fails ends the others and fails the test with its traceback, as does the deadline, in seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    files = [folder / f"rank-{rank}.pickle" for rank in range(world)]
    groups = [ProcessGroup(rank, world, "127.0.0.1", port, timeout) for rank in range(world)]
    processes = [spawn.Process(target=_rank, args=(function, g, f, args), daemon=True) for g, f in zip(groups, files, strict=True)]
    deadline = time.monotonic() + timeout
    for process in processes:
        process.start()
    while any(p.exitcode is None for p in processes) and not any(p.exitcode for p in processes) and time.monotonic() < deadline:
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
    os._exit(0)  # without the interpreter's own teardown, which may wait for a rank that is gone


# ---- what is trained ----------------------------------------------------------------------------------------------


def recipe(precision: str = "fp32", clip: float | None = CLIP) -> Recipe:
    """SimPO on pairs. The vocabulary makes two tensors large enough for ZeRO-3 to partition them, the others stay whole."""
    return Recipe(
        model=Model(tiny=TinyModel(hidden_size=64, layers=2, heads=4, vocab_size=2048)),
        data=Data(train="none"),
        algorithm=Algorithm(name="simpo"),
        optimizer=Optimizer(learning_rate=1e-2, betas=(BETA1, 0.99), weight_decay=0.01, max_grad_norm=clip, schedule="linear", warmup_steps=2),
        learners=Learners(workers=WORLD, precision=precision),
    )


def pairs(count: int, seed: int, longest: int = 12) -> list[SequenceGroup]:
    draw = np.random.default_rng(seed)

    def branch() -> Branch:
        size = int(draw.integers(1, longest))
        return Branch(draw.integers(0, 256, size), np.ones(size, np.bool_))

    return [SequenceGroup(i, draw.integers(0, 256, int(draw.integers(1, longest))), (branch(), branch())) for i in range(count)]


STEPS = [pairs(11, seed) for seed in range(3)]
MANY_PAIRS = pairs(64 * WORLD, 3)


def cut(policy: Policy, examples: int = 2) -> Cut:
    return Cut(WORLD, examples, None, "prefix_shared", policy[0], policy[1])  # pyright: ignore[reportArgumentType]


class Rank:
    """A fresh learner on this rank and its share of each step."""

    def __init__(self, group: ProcessGroup, policy: Policy, clip: float | None = CLIP, examples: int = 2) -> None:
        self.cut, self.rank = cut(policy, examples), group.rank
        self.learner = RankLearner(LearnerSpec(recipe(policy[2], clip), self.cut, 10), group, torch.device("cpu"))

    def forward(self, groups: Sequence[SequenceGroup], step: int) -> LearnReport:
        batch = cut_step(groups, self.cut)
        return self.learner.forward_backward(batch.micro_batches[self.rank], batch.units, step)

    def step(self, number: int) -> StepApplied:
        self.forward(STEPS[number], number)
        return self.learner.optim_step(number)

    def moments(self, name: str) -> dict[str, np.ndarray]:
        engine = self.learner.engine
        return {n: engine.moment(p, name).numpy() for n, p in engine.module.named_parameters()}

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


# ---- what is done on every rank -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """What a rank saw of one stage and policy. after[n]: digest of the state after n + 1 good steps."""

    after: tuple[str, ...]
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
    """A state put back. saved, loaded: its digests; undisturbed, resumed: a step later; gap: largest weight difference then."""

    saved: str
    loaded: str
    undisturbed: str
    resumed: str
    gap: float


@dataclass(frozen=True, slots=True)
class Everything:
    """All findings of one rank. moved: by (saved at stage, loaded at stage); replayed: by policy and the micro-batch that
    ran out of memory; gradients: of MANY bf16 micro-batches, by name."""

    compilers: tuple[str | None, ...]
    found: dict[Policy, Found]
    moved: dict[tuple[int, int], Resumed]
    bf16: dict[Policy, Resumed]
    replayed: dict[tuple[Policy, int], str]
    gradients: dict[Policy, dict[str, np.ndarray]]
    low_master: str


def work(group: ProcessGroup, folder: Path) -> Everything:
    return Everything(
        compilers=tuple(shutil.which(name) for name in ("g++", "gcc", "c++", "cc", "clang", "ninja")),
        found={policy: look(group, policy) for policy in FP32 + BF16},
        moved=move(group, folder),
        bf16={policy: resume_bf16(group, policy, folder / f"bf16-{policy[0]}") for policy in BF16},
        replayed={(policy, at): replay(group, policy, at) for policy in HOLDS_BACK for at in (0, 2)},
        gradients={policy: bf16_gradient(group, policy) for policy in BF16},
        low_master=low_master(),
    )


def look(group: ProcessGroup, policy: Policy) -> Found:
    """An undisturbed run, then the same one disturbed in every way that must leave no trace."""
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
    return Found(
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
def one_bad_micro_batch() -> Iterator[None]:
    """The gradient of rank 1's micro-batches of BAD_STEP is not a number."""
    os.environ[VARIABLE] = json.dumps([{"site": "micro_batch", "action": "nan", "step": BAD_STEP, "rank": 1}])
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def move(group: ProcessGroup, folder: Path) -> dict[tuple[int, int], Resumed]:
    """States of two steps, saved at every stage and put back at every stage."""
    sources: dict[int, tuple[str, str, dict[str, np.ndarray]]] = {}
    policies = [(0, "no_sync", "fp32"), (1, "no_sync", "fp32"), (2, "coalesced", "fp32"), (3, "per_micro_batch", "fp32")]
    for policy in policies:
        source = Rank(group, policy)
        saved = save_after_two(source, folder / f"fp32-{policy[0]}")
        source.step(2)
        sources[policy[0]] = saved, source.state(), source.weights()
    moved = {}
    for policy in policies:
        for origin, (saved, undisturbed, weights) in sources.items():
            target = Rank(group, policy)
            load_state(target.learner, folder / f"fp32-{origin}", 2)
            loaded = target.state()
            target.step(2)
            gap = max(float(np.abs(w - weights[n]).max()) for n, w in target.weights().items())
            moved[origin, policy[0]] = Resumed(saved, loaded, undisturbed, target.state(), gap)
    return moved


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
    """Digest of the state after a step in which micro-batch `at` of rank 1 did not fit, so that it was played again."""
    rank = Rank(group, policy)
    calls = iter(range(100))

    def exhausted(*_: object) -> None:
        if next(calls) == at:
            raise torch.OutOfMemoryError("made by the test")

    handle = rank.learner.scoring.register_forward_pre_hook(exhausted) if group.rank == 1 else None
    try:
        rank.forward(STEPS[0], 0)
        failed = False
    except OutOfMemory:
        failed = True
    assert failed == (group.rank == 1)
    if handle is not None:
        handle.remove()
    rank.learner.discard()
    rank.step(0)
    return rank.state()


def bf16_gradient(group: ProcessGroup, policy: Policy) -> dict[str, np.ndarray]:
    """The gradient of MANY_PAIRS as it reached Adam."""
    rank = Rank(group, policy, clip=None, examples=1)
    rank.forward(MANY_PAIRS, 0)
    rank.learner.optim_step(0)
    return {name: value / (1 - BETA1) for name, value in rank.moments("exp_avg").items()}


def low_master() -> str:
    """What the engine says of a module that would be trained on bf16 weights."""
    cfg = recipe()
    module = ScoringModel(load(cfg.model, seed=0, head="lm").model, head="lm").bfloat16()
    try:
        Engine(module, learners=cfg.learners, optimizer=cfg.optimizer, stage=0, sync="no_sync", world=WORLD)
    except AssertionError as error:
        return str(error)
    return ""


# ---- tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Everything]:
    folder = tmp_path_factory.mktemp("engine")
    (folder / "ops").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder / "nothing"))
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "ops"))
        patch.delenv("CXX", raising=False)
        patch.delenv("CC", raising=False)
        results = on_ranks(work, WORLD, folder, folder, timeout=270.0)
    assert not list((folder / "ops").iterdir()), "something was compiled"
    return results


@dataclass(frozen=True, slots=True)
class Plain:
    """Step 0 as one batch in plain torch: loss, norm of the whole gradient (added up in double), the gradient by name."""

    loss: float
    norm: float
    gradient: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def plain() -> Plain:
    cfg = recipe(clip=None)
    trainer = PlainTrainer(cfg, build(cfg.algorithm), 10)
    step = trainer.step(STEPS[0], loss_units(STEPS[0]), 0)
    gradient = {f"model.{n}": p.grad.numpy() for n, p in trainer.trainable.items() if p.grad is not None}
    norm = norm_of(gradient)
    assert step.grad_norm == pytest.approx(norm, rel=1e-4)  # torch's own norm of large fp32 tensors is not sharper
    return Plain(step.loss, norm, gradient)


def norm_of(gradient: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradient.values())))


def policies(some: list[Policy]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("policy", some, ids=lambda p: f"zero{p[0]}-{p[1]}-{p[2]}")



def test_no_compiler_is_needed(ranks):
    assert ranks[0].compilers == (None,) * 6


@policies(FP32 + BF16)
def test_ranks_agree_to_the_bit(ranks, policy):
    assert ranks[0].found[policy].after == ranks[1].found[policy].after
    assert len(set(ranks[0].found[policy].after)) == 3


@policies(FP32 + BF16)
def test_a_non_finite_gradient_on_one_rank_is_refused_by_all_and_leaves_no_trace(ranks, policy):
    for found in (rank.found[policy] for rank in ranks):
        assert not found.refused.applied
        assert np.isnan(found.refused.grad_norm)
        assert found.after_refused == found.after[0]
        assert found.good_after_refused == found.after[1]


@policies(FP32 + BF16)
def test_discarded_gradients_leave_no_trace(ranks, policy):
    for found in (rank.found[policy] for rank in ranks):
        assert found.after_discard == found.after_probe == found.after[1]
        assert found.good_after_discard == found.after[2]


@policies(FP32 + BF16)
def test_a_filler_changes_nothing(ranks, policy):
    for found in (rank.found[policy] for rank in ranks):
        assert found.with_fillers == found.plain


@policies(FP32)
def test_loss_and_gradient_norm_are_those_of_one_plain_batch(ranks, plain, policy):
    found = [rank.found[policy] for rank in ranks]
    assert sum(f.loss for f in found) == pytest.approx(plain.loss, rel=1e-6)
    for each in found:
        assert each.steps[0].grad_norm == pytest.approx(plain.norm, rel=1e-6)
        assert each.unclipped.grad_norm == pytest.approx(plain.norm, rel=1e-6)
    assert plain.norm > 2 * CLIP


@policies(FP32)
@pytest.mark.parametrize("clip", [CLIP, None])
def test_the_clipped_and_the_whole_gradient_reach_adam(ranks, plain, policy, clip):
    found = ranks[0].found[policy]
    moment = found.first_moment if clip else found.unclipped_moment
    reached = {name: value / (1 - BETA1) for name, value in moment.items()}
    norm = clip or plain.norm
    assert reached.keys() == plain.gradient.keys()
    assert norm_of(reached) == pytest.approx(norm, rel=1e-5)  # the clip factor has 1e-6 added to the norm
    for name, value in plain.gradient.items():
        np.testing.assert_allclose(reached[name], value * norm / plain.norm, rtol=0, atol=1e-6 * norm, err_msg=name)


@policies(FP32 + BF16)
def test_steps_use_the_learning_rate_of_the_schedule(ranks, policy):
    assert [s.learning_rate for s in ranks[0].found[policy].steps] == pytest.approx([5e-3, 1e-2, 1e-2])
    assert all(s.applied for s in ranks[0].found[policy].steps)


@policies(FP32 + BF16)
def test_collectives_carry_the_predicted_bytes(ranks, policy):
    """To the byte, but for ZeRO-3's five norm weights of 64 values, which the counter takes for flags; in its first step
    DeepSpeed also gathers what it keeps whole later."""
    cfg, how = recipe(policy[2]), cut(policy)
    predicted = traffic(cfg, build(cfg.algorithm), how, len(cut_step(STEPS[0], how).micro_batches[0]))
    skipped = 5 * 64 * (2 if policy[2] == "bf16" else 4) if policy[0] == 3 else 0
    for found in (rank.found[policy] for rank in ranks):
        assert [s.reduced_bytes for s in found.steps] == [predicted.reduced] * 3
        assert [s.gathered_bytes for s in found.steps[1:]] == [predicted.gathered - skipped] * 2
        assert policy[0] == 3 or found.steps[0].gathered_bytes == predicted.gathered
    assert skipped < 1e-3 * predicted.gathered or not skipped


@pytest.mark.parametrize("origin", range(4))
@pytest.mark.parametrize("stage", range(4))
def test_a_state_moves_between_stages(ranks, origin, stage):
    for moved in (rank.moved[origin, stage] for rank in ranks):
        assert moved.loaded == moved.saved
        assert moved.gap <= 1e-6
        assert origin != stage or moved.resumed == moved.undisturbed


@policies(BF16)
def test_bf16_resumes_to_the_bit(ranks, policy):
    for resumed in (rank.bf16[policy] for rank in ranks):
        assert resumed.loaded == resumed.saved
        assert resumed.resumed == resumed.undisturbed
        assert resumed.resumed != resumed.saved


@pytest.mark.parametrize("at", [0, 2])
@policies(HOLDS_BACK)
def test_a_step_that_did_not_fit_is_replayed_without_a_trace(ranks, policy, at):
    for rank in ranks:
        assert rank.replayed[policy, at] == rank.found[policy].after[0]


def test_a_module_with_low_precision_master_weights_is_refused(ranks):
    assert all("bfloat16 master weights, not fp32" in rank.low_master for rank in ranks)


@policies(BF16)
def test_bf16_gradients_accumulate_in_fp32(ranks, bf16_baselines, policy):
    ours = distance(ranks[0].gradients[policy], bf16_baselines.exact)
    summed_low = distance(bf16_baselines.summed_in_bf16, bf16_baselines.exact)
    summed_high = distance(bf16_baselines.summed_in_fp32, bf16_baselines.exact)
    numbers = f"error of 64 bf16 micro-batches a rank: ours {ours:.5f}, summed in fp32 {summed_high:.5f}, summed in bf16 {summed_low:.5f}"
    assert ours < 0.8 * summed_low, numbers
    assert ours == pytest.approx(summed_high, rel=0.05), numbers


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Norm of the difference over the norm of `other`."""
    gap = sum(float(np.square(one[n] - v, dtype=np.float64).sum()) for n, v in other.items())
    return float(np.sqrt(gap / sum(float(np.square(v, dtype=np.float64).sum()) for v in other.values())))


@dataclass(frozen=True, slots=True)
class Baselines:
    """Gradients of MANY_PAIRS in plain torch: fp32 throughout, and of bf16 micro-batches summed in fp32 or in bf16."""

    exact: dict[str, np.ndarray]
    summed_in_fp32: dict[str, np.ndarray]
    summed_in_bf16: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def bf16_baselines() -> Baselines:
    """The weights are the same rounded ones everywhere, and each rank's micro-batches those of the learners."""
    micro = cut_step(MANY_PAIRS, cut(BF16[0], examples=1)).micro_batches
    low, exact = module(), module().float()
    sums: dict[str, torch.Tensor] = {n: torch.zeros(p.shape) for n, p in low.named_parameters()}
    halves = []
    for rank in micro:
        low_sums = {n: torch.zeros_like(p) for n, p in low.named_parameters()}
        for mb in rank:
            add_gradient(exact, mb)
            add_gradient(low, mb)
            for name, parameter in low.named_parameters():
                assert parameter.grad is not None
                low_sums[name] += parameter.grad
                sums[name] += parameter.grad.float()
                parameter.grad = None
        halves.append(low_sums)
    return Baselines(
        exact={n: p.grad.numpy() for n, p in exact.named_parameters() if p.grad is not None},
        summed_in_fp32={n: s.numpy() for n, s in sums.items()},
        summed_in_bf16={n: sum(h[n].float() for h in halves).numpy() for n in sums},  # pyright: ignore
    )


def module() -> ScoringModel:
    return ScoringModel(load(recipe().model, seed=0, head="lm").model, head="lm").bfloat16().train()


def add_gradient(model: ScoringModel, mb: MicroBatch) -> None:
    result = scored(model, MicroBatchTensors.of(mb, torch.device("cpu")))
    scores = TokenScores(result.values, torch.from_numpy(mb.sequence), len(mb), mb.branches)
    build(recipe().algorithm).objective(scores, loss_units(MANY_PAIRS)).total.backward()
