"""Weights reach the rollout actors bit for bit with every transport and ZeRO stage, or no rollout uses them.

Two real DeepSpeed ranks and two real rollout actors run on one local Ray. Digests are computed in their own
processes.
"""

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayActorError

from orchestrator.cluster.learner_group import LearnerGroup
from orchestrator.cluster.rollout_pool import RolloutPool
from orchestrator.cluster.weight_sync import BroadcastSync, CudaIpcSync, ObjectStoreSync, make_weight_sync
from orchestrator.core.batches import Branch, Cut, SequenceGroup
from orchestrator.core.errors import ConfigError, WorkerLost
from orchestrator.core.roles import WeightSync
from orchestrator.core.rollouts import Prompt, RolloutGroup, Sampling
from orchestrator.data.micro_batches import cut_step
from orchestrator.data.packing import by_branch
from orchestrator.learner import engine
from orchestrator.learner.rank_learner import LearnerSpec, RankLearner
from orchestrator.learner.state import full_weights
from orchestrator.models.precision import precision_of
from orchestrator.models.weight_buckets import CorruptWeights
from orchestrator.recipe.schema import Recipe
from tests.running import planned_faults, shared_ray, wait_until

pytestmark = pytest.mark.timeout(300)

BUCKET_BYTES = 16_000
SAMPLING = Sampling(samples=2, max_new_tokens=4)
WORK = [(i, Prompt(i, "", 0, np.arange(1, 5 + i), "")) for i in range(4)]
SYNCS = {"object_store": ObjectStoreSync, "broadcast": BroadcastSync}
CORRUPT_ONCE, CORRUPT_ALWAYS, KILLED_ON_THE_WAY, CORRUPT_GIFT, BETWEEN = 50, 60, 70, 80, 90
"""Versions at which a fault happens; + 1 for the broadcast."""


def recipe(precision: str = "fp32", lora: dict | None = None, **rollouts: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {
                "tiny": {"architecture": "llama", "hidden_size": 32, "layers": 2, "heads": 2},
                "lora": lora,
            },
            "data": {"train": "toy:sft"},
            "algorithm": {"name": "sft"},
            "optimizer": {"learning_rate": 1e-2},
            "learners": {"workers": 2, "cpus_per_worker": 0.25, "precision": precision},
            "rollouts": {
                "workers": 2,
                "cpus_per_worker": 0.25,
                "batching": "static",
                "bucket_mb": BUCKET_BYTES / 1e6,
                **rollouts,
            },
        }
    )


@pytest.fixture(scope="module")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_ray(tmp_path_factory.mktemp("shared")):
        yield


@pytest.fixture(scope="module")
def group(ray_session: None) -> Iterator[LearnerGroup]:
    """Two ranks, on which each test builds its learner. Each bundle has room for an actor."""
    cfg = recipe(placement="colocated")
    with LearnerGroup(cfg.learners, colocated=cfg.rollouts) as group:
        group.call(shard_everything)
        yield group


def shard_everything(_: Any) -> None:
    """Runs in a learner's process. ZeRO-3 then keeps no parameter whole on every rank, as it otherwise would
    with all parameters of a tiny model."""
    engine.PERSISTENT_ELEMENTS = 0


def elements_held(learner: RankLearner) -> int:
    return sum(p.numel() for p in learner.scoring.parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the files that record which faults have happened."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def pool(group: LearnerGroup, faults: Path) -> Iterator[RolloutPool]:
    """Two actors in fp32 in the learners' bundles, with faults at the versions named above."""
    planned = [
        {
            "site": "weights",
            "action": "corrupt",
            "step": CORRUPT_GIFT,
            "rank": 0,
            "once": str(faults / "gift"),
        },
        {
            "site": "weights",
            "action": "kill",
            "step": KILLED_ON_THE_WAY,
            "rank": 0,
            "once": str(faults / "kill"),
        },
    ]
    for i in range(2):
        planned += [
            {
                "site": "weights",
                "action": "corrupt",
                "step": CORRUPT_ONCE + i,
                "rank": 1,
                "once": str(faults / f"corrupt-{i}"),
            },
            {"site": "weights", "action": "corrupt", "step": CORRUPT_ALWAYS + i},
        ]
    cfg = recipe(placement="colocated", max_restarts=100)
    with planned_faults(*planned), RolloutPool(cfg, reservation=group.reservation) as pool:
        assert not pool.owns_reservation
        yield pool


def cut_of(cfg: Recipe, stage: int) -> Cut:
    sync = "no_sync" if stage < 2 else "coalesced" if cfg.learners.precision == "fp32" else "per_micro_batch"
    return Cut(
        workers=cfg.learners.workers, examples=2, positions=None, layout="padded", zero_stage=stage, sync=sync
    )


def build(group: LearnerGroup, cfg: Recipe, stage: int) -> Cut:
    """A learner that has taken a step, so that no other model has its weights."""
    cut = cut_of(cfg, stage)
    group.build(LearnerSpec(cfg, cut, 4))
    learn(group, cut, 0)
    if stage == 3:
        assert group.call(elements_held) == [0, 0]  # nothing is whole outside a gather
    return cut


def learn(group: LearnerGroup, cut: Cut, seed: int) -> None:
    """Takes a step on rows that depend on the seed."""
    draw = np.random.default_rng(seed)
    rows = [
        SequenceGroup(i, draw.integers(0, 256, 3), (Branch(draw.integers(0, 256, 4), np.ones(4, np.bool_)),))
        for i in range(8)
    ]
    group.forward_backward(cut_step(rows, cut), 0)
    assert group.optim_step(0).applied


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def learner_digests(learner: RankLearner) -> dict[str, str]:
    """SHA-256 of each trainable weight in the type that generators compute with, by Hugging Face name."""
    names, wire = learner.scoring.hf_names(), precision_of(learner.spec.recipe.learners.precision).wire_dtype
    return {names[name]: digest(weight.to(wire)) for name, weight in full_weights(learner)}


def actor_digests(worker: Any) -> tuple[int | None, dict[str, str]]:
    """(version of the weights, SHA-256 of each parameter by name)."""
    return worker.engine.version, {name: digest(p) for name, p in worker.engine.model.named_parameters()}


def held(worker: Any) -> int | None:
    return worker.engine.version


def sent(group: LearnerGroup) -> dict[str, str]:
    digests = group.call(learner_digests)
    assert digests[0] == digests[1]
    return digests[0]


def rollouts(pool: RolloutPool, version: int) -> tuple[RolloutGroup, ...]:
    """Groups sampled with `version`. Samples until every actor holds that version."""
    groups: list[RolloutGroup] = []

    def all_worked() -> bool:
        groups.extend(pool.start(WORK, SAMPLING, version).result())
        return pool.call(held) == [version] * len(pool.actors)

    assert wait_until(all_worked, 60.0, pause_s=0.0)
    assert {r.version for g in groups for r in g.rollouts} == {version}
    return tuple(groups)


def check_arrived(group: LearnerGroup, pool: RolloutPool, version: int) -> None:
    """Rollouts carry the version, and every actor's parameters are those of the learner, bit for bit."""
    rollouts(pool, version)
    expected = sent(group)
    for held_version, digests in pool.call(actor_digests):
        assert held_version == version
        assert digests == expected


# ---- every stage, every transport


def every_stage(group: LearnerGroup, pool: RolloutPool, precision: str, stages: tuple[int, ...]) -> None:
    cfg, version = recipe(precision), 0
    element = precision_of(precision).wire_dtype.itemsize
    syncs = {name: kind(group, pool, BUCKET_BYTES) for name, kind in SYNCS.items()}
    seen = set()
    for stage in stages:
        cut = build(group, cfg, stage)
        for name, sync in syncs.items():
            version += 1
            learn(group, cut, version)
            delivered = sync.publish(version)
            check_arrived(group, pool, version)
            elements = group.call(trainable_elements)[0]
            assert delivered.version == version and delivered.transport == name and delivered.buckets >= 5
            # not exactly, as offsets are multiples of 16
            assert delivered.bytes == pytest.approx(elements * element, rel=0.01)
            seen.add(tuple(sent(group).values()))
            print(
                f"{precision} ZeRO-{stage} {name}: {delivered.bytes} bytes in {delivered.buckets} buckets, "
                f"{delivered.seconds:.3f} s"
            )
    assert len(seen) == 2 * len(stages)  # each version had other weights, so the check could fail


def trainable_elements(learner: RankLearner) -> int:
    return sum(weight.numel() for _, weight in full_weights(learner))


def test_fp32_weights_of_every_zero_stage_arrive_bit_for_bit(group: LearnerGroup, pool: RolloutPool) -> None:
    """The actors are colocated with the learners."""
    every_stage(group, pool, "fp32", (0, 1, 2, 3))


def test_bf16_weights_of_every_zero_stage_arrive_bit_for_bit(group: LearnerGroup) -> None:
    """The actors have separate bundles. The plan refuses bf16 at stage 0, where DeepSpeed takes a spurious
    step."""
    with RolloutPool(recipe("bf16"), name="apart") as pool:
        every_stage(group, pool, "bf16", (1, 2, 3))


def test_lora_sends_only_its_adapter(group: LearnerGroup) -> None:
    """The base weights are not sent. Samples with the new adapter have the learner's log-probs."""
    cfg = recipe(lora={"rank": 2, "alpha": 64.0})
    with RolloutPool(cfg, name="apart") as pool:
        before = pool.call(actor_digests)[0][1]
        start = {r.logprobs.tobytes() for g in _untrained(group, pool, cfg) for r in g.rollouts}
        for version, (stage, kind) in enumerate([(0, ObjectStoreSync), (3, BroadcastSync)], 2):
            cut = build(group, cfg, stage)
            delivered = kind(group, pool, 4_000).publish(version)
            groups = rollouts(pool, version)
            adapter = sent(group)
            assert adapter and all("lora_" in name for name in adapter)
            for _, after in pool.call(actor_digests):
                assert {name: d for name, d in after.items() if name in adapter} == adapter
                assert {n: d for n, d in after.items() if n not in adapter} == {
                    n: d for n, d in before.items() if n not in adapter
                }
            model_bytes = pool.call(parameter_bytes)[0]
            assert delivered.buckets > 1 and delivered.bytes < model_bytes / 5
            assert learner_gap(group, cut, groups[-len(WORK) :]) < 1e-5
            # the adapter changes the log-probs
            assert start.isdisjoint(r.logprobs.tobytes() for g in groups for r in g.rollouts)
            print(f"LoRA ZeRO-{stage}: {delivered.bytes} of {model_bytes} bytes")


def _untrained(group: LearnerGroup, pool: RolloutPool, cfg: Recipe) -> tuple[RolloutGroup, ...]:
    group.build(LearnerSpec(cfg, Cut(2, 2, None, "padded", 0, "no_sync"), 4))
    ObjectStoreSync(group, pool, 4_000).publish(1)
    return rollouts(pool, 1)


def parameter_bytes(worker: Any) -> int:
    return sum(p.numel() * p.element_size() for p in worker.engine.model.parameters())


def learner_gap(group: LearnerGroup, cut: Cut, groups: tuple[RolloutGroup, ...]) -> float:
    """Largest |log-prob of the generator - log-prob of the learner| over the sampled tokens."""
    rows = [
        SequenceGroup(i, g.prompt.ids, (Branch(r.ids, r.loss_mask),))
        for i, (g, r) in enumerate((g, r) for g in groups for r in g.rollouts)
    ]
    sampled = [r.logprobs for g in groups for r in g.rollouts]
    batch = cut_step(rows, cut)
    gaps = [
        float(np.abs(branches[0] - sampled[row]).max())
        for micro_batches, values in zip(batch.micro_batches, group.token_logprobs(batch), strict=True)
        for micro_batch, logprobs in zip(micro_batches, values, strict=True)
        for row, branches in zip(micro_batch.examples, by_branch(micro_batch, logprobs), strict=True)
    ]
    assert len(gaps) == len(rows)
    return max(gaps)


# ---- damage and death


@pytest.fixture(scope="module")
def trained(group: LearnerGroup) -> LearnerGroup:
    """ZeRO-3, so that every send is a collective."""
    build(group, recipe(), 3)
    return group


def publish(trained: LearnerGroup, sync: WeightSync, version: int) -> None:
    """Publishes after another step, so that each version has different weights."""
    learn(trained, cut_of(recipe(), 3), version)
    sync.publish(version)


@pytest.fixture(params=enumerate(SYNCS), ids=list(SYNCS))
def transport(request: pytest.FixtureRequest) -> tuple[int, type]:
    """(offset of the versions with faults, weight sync)."""
    offset, name = request.param
    return offset, SYNCS[name]


def test_damaged_weights_are_refused_and_sent_again(
    trained: LearnerGroup, pool: RolloutPool, transport: tuple[int, Any], faults: Path
) -> None:
    offset, kind = transport
    pids = list(pool.pids)
    publish(trained, kind(trained, pool, BUCKET_BYTES), CORRUPT_ONCE + offset)
    check_arrived(trained, pool, CORRUPT_ONCE + offset)
    assert (faults / f"corrupt-{offset}").exists()
    assert pool.pids == pids  # a damaged transfer costs no actor


def test_weights_that_are_always_damaged_end_the_run_without_a_rollout(
    trained: LearnerGroup, pool: RolloutPool, transport: tuple[int, Any]
) -> None:
    offset, kind = transport
    version = CORRUPT_ALWAYS + offset
    pool.spans()
    with pytest.raises(CorruptWeights, match=f"weight version {version} arrived damaged"):
        publish(trained, kind(trained, pool, BUCKET_BYTES), version)
        pool.start(WORK, SAMPLING, version).result()
    pool.wait_until_idle()
    assert all(span.version != version for span in pool.spans())
    assert version not in pool.call(held)
    for actor in pool.actors:
        with pytest.raises(WorkerLost, match=f"asked to roll out weights {version}"):
            ray.get(actor.roll_out.remote(WORK, SAMPLING, version, []))
    publish(trained, kind(trained, pool, BUCKET_BYTES), version + 2)
    check_arrived(trained, pool, version + 2)  # the actors still work


def test_an_actor_that_dies_in_a_broadcast_is_replaced(
    trained: LearnerGroup, pool: RolloutPool, faults: Path
) -> None:
    pids = list(pool.pids)
    publish(trained, BroadcastSync(trained, pool, BUCKET_BYTES), KILLED_ON_THE_WAY)
    check_arrived(trained, pool, KILLED_ON_THE_WAY)
    assert (faults / "kill").exists()
    assert pool.pids[0] != pids[0] and pool.pids[1] == pids[1]


def kill(pool: RolloutPool, index: int) -> None:
    """Kills an actor with SIGKILL, and waits until Ray reports its death."""
    os.kill(pool.pids[index], signal.SIGKILL)
    actor = pool.actors[index]

    def dead() -> bool:
        try:
            ray.get(actor.leave_channel.remote(), timeout=10.0)
        except RayActorError:
            return True
        return False

    assert wait_until(dead, 30.0)


def test_an_actor_killed_between_publish_and_work_comes_back_with_the_right_weights(
    trained: LearnerGroup, pool: RolloutPool, transport: tuple[int, Any]
) -> None:
    offset, kind = transport
    sync = kind(trained, pool, BUCKET_BYTES)
    publish(trained, sync, BETWEEN + offset)
    pids = list(pool.pids)
    kill(pool, 0)
    check_arrived(trained, pool, BETWEEN + offset)
    assert pool.pids[0] != pids[0] and pool.pids[1] == pids[1]
    publish(trained, sync, BETWEEN + offset + 2)  # through a channel to the new actor
    check_arrived(trained, pool, BETWEEN + offset + 2)


@pytest.mark.slow
def test_an_actor_that_died_idle_is_replaced_by_the_next_broadcast(
    trained: LearnerGroup, pool: RolloutPool
) -> None:
    sync, pids = BroadcastSync(trained, pool, BUCKET_BYTES), list(pool.pids)
    for version in (10, 11):
        kill(pool, version - 10)
        publish(trained, sync, version)  # the first one opens the channel, the second one has it already
        check_arrived(trained, pool, version)
    assert set(pids).isdisjoint(pool.pids)


@pytest.mark.slow
def test_weights_damaged_between_two_actors_are_sent_again(
    trained: LearnerGroup, pool: RolloutPool, faults: Path
) -> None:
    """A new actor gets the weights of another actor, under the same checksums."""
    sync = BroadcastSync(trained, pool, BUCKET_BYTES)
    (faults / "gift").touch()  # no fault in the broadcast itself
    publish(trained, sync, CORRUPT_GIFT)
    kill(pool, 0)
    (faults / "gift").unlink()
    check_arrived(trained, pool, CORRUPT_GIFT)
    assert (faults / "gift").exists()


@pytest.mark.slow
def test_a_broadcast_version_that_no_living_actor_holds_ends_the_attempt(
    trained: LearnerGroup, pool: RolloutPool
) -> None:
    publish(trained, BroadcastSync(trained, pool, BUCKET_BYTES), 1)
    kill(pool, 0)
    kill(pool, 1)
    with pytest.raises(WorkerLost, match=r"no other rollout actor could give it weights 1"):
        pool.start(WORK, SAMPLING, 1).result()


def test_an_actor_rolls_out_only_the_version_it_holds(trained: LearnerGroup, pool: RolloutPool) -> None:
    for version, kind in enumerate(SYNCS.values(), 5):
        publish(trained, kind(trained, pool, BUCKET_BYTES), version)
        check_arrived(trained, pool, version)
    with pytest.raises(WorkerLost, match="rollout-0 was asked to roll out weights 5, it holds 6"):
        ray.get(pool.actors[0].roll_out.remote(WORK, SAMPLING, 5, []))
    with pytest.raises(WorkerLost, match="weights 5 were never published"):
        pool.start(WORK, SAMPLING, 5)


def test_a_broadcast_waits_for_work_with_the_old_version(trained: LearnerGroup, pool: RolloutPool) -> None:
    sync = BroadcastSync(trained, pool, BUCKET_BYTES)
    publish(trained, sync, 7)
    old = [pool.start(WORK, SAMPLING, 7) for _ in range(3)]
    publish(trained, sync, 8)
    assert all(g is not None for pending in old for g in pending.groups)  # done before publish returned
    assert {r.version for pending in old for g in pending.result() for r in g.rollouts} == {7}
    check_arrived(trained, pool, 8)


@pytest.mark.slow
def test_an_actor_that_hangs_in_a_broadcast_is_named_and_replaced(
    trained: LearnerGroup, tmp_path: Path
) -> None:
    stop = {"site": "weights", "action": "stop", "step": 3, "rank": 1, "once": str(tmp_path / "stop")}
    with planned_faults(stop), RolloutPool(recipe(timeout_s=10.0, max_restarts=1)) as pool:
        pids, started = list(pool.pids), time.monotonic()
        publish(trained, BroadcastSync(trained, pool, BUCKET_BYTES), 3)
        assert time.monotonic() - started < 60
        check_arrived(trained, pool, 3)
        assert pool.pids[0] == pids[0] and pool.pids[1] != pids[1]
        (tmp_path / "stop").unlink()
        with pytest.raises(
            WorkerLost,
            match="rollout-1 did not answer within 10 s, and 1 rollout actors were replaced already",
        ):
            publish(trained, BroadcastSync(trained, pool, BUCKET_BYTES), 3)


# ---- placement


def test_the_order_of_cuda_ipc(trained: LearnerGroup, pool: RolloutPool, faults: Path) -> None:
    """make_weight_sync refuses CUDA IPC on a CPU, where torch's handles are copies. The order of calls and
    the checks are the same."""
    sync, pids = CudaIpcSync(trained, pool, BUCKET_BYTES), list(pool.pids)
    (faults / "corrupt-0").unlink(missing_ok=True)
    publish(trained, sync, CORRUPT_ONCE)
    assert (faults / "corrupt-0").exists()
    check_arrived(trained, pool, CORRUPT_ONCE)
    with pytest.raises(CorruptWeights, match=f"weight version {CORRUPT_ALWAYS} arrived damaged"):
        publish(trained, sync, CORRUPT_ALWAYS)
    assert pool.call(held) == [None, None]
    assert pool.pids == pids
    publish(trained, sync, CORRUPT_ALWAYS + 4)
    check_arrived(trained, pool, CORRUPT_ALWAYS + 4)


@pytest.mark.slow
def test_an_actor_that_dies_while_it_takes_weights_is_replaced(
    trained: LearnerGroup, pool: RolloutPool, faults: Path
) -> None:
    (faults / "kill").unlink(missing_ok=True)
    pids = list(pool.pids)
    publish(trained, CudaIpcSync(trained, pool, BUCKET_BYTES), KILLED_ON_THE_WAY)
    check_arrived(trained, pool, KILLED_ON_THE_WAY)
    assert pool.pids[0] != pids[0] and pool.pids[1] == pids[1]


@pytest.mark.parametrize(
    "placement, learner, actor, transport, expected",
    [
        ("separate", 0, 0, "auto", ObjectStoreSync),
        ("separate", 1, 1, "auto", ObjectStoreSync),
        ("colocated", 0, 0, "auto", ObjectStoreSync),
        ("colocated", 1, 1, "auto", ObjectStoreSync),  # two GPUs in each bundle
        ("colocated", 0.5, 0.5, "auto", ObjectStoreSync),
        ("colocated", 0.5, 0.5, "object_store", ObjectStoreSync),
        ("colocated", 0.5, 0.5, "broadcast", BroadcastSync),
        ("colocated", 0.5, 0.5, "cuda_ipc", CudaIpcSync),
        ("colocated", 0, 0, "cuda_ipc", None),
        ("separate", 1, 1, "cuda_ipc", None),
    ],
)
def test_the_transport_follows_from_the_recipe(
    pool: RolloutPool, placement: str, learner: float, actor: float, transport: str, expected: Any
) -> None:
    cfg = recipe(placement=placement, gpus_per_worker=actor, transport=transport)
    cfg = cfg.model_copy(update={"learners": cfg.learners.model_copy(update={"gpus_per_worker": learner})})
    no_learners: Any = None
    if expected is None:
        with pytest.raises(ConfigError, match="cuda_ipc"):
            make_weight_sync(cfg, no_learners, pool)
    else:
        assert type(make_weight_sync(cfg, no_learners, pool)) is expected


@pytest.mark.gpu
def test_weights_cross_between_processes_on_one_gpu(ray_session: None) -> None:
    """Every transport on GPUs, with a learner and an actor on the same one."""
    cfg = recipe(workers=1, placement="colocated", gpus_per_worker=0.5)
    cfg = cfg.model_copy(
        update={"learners": cfg.learners.model_copy(update={"gpus_per_worker": 0.5, "workers": 1})}
    )
    with (
        LearnerGroup(cfg.learners, colocated=cfg.rollouts) as group,
        RolloutPool(cfg, reservation=group.reservation) as pool,
    ):
        cut = cut_of(cfg, 3)
        group.build(LearnerSpec(cfg, cut, 4))
        for version, kind in enumerate((ObjectStoreSync, BroadcastSync, CudaIpcSync)):
            learn(group, cut, version)
            kind(group, pool, BUCKET_BYTES).publish(version)
            check_arrived(group, pool, version)
