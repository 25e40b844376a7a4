"""The prediction's parts by hand; the whole against a real process is in tests/invariants/test_memory.py."""

import resource
from dataclasses import asdict

import numpy as np
import pytest

from orchestrator.algorithms import build
from orchestrator.config import Algorithm, Batch, Data, Learners, Lora, Model, Offload, Optimizer, Recipe, TinyModel
from orchestrator.data.packing import pack
from orchestrator.memory_model import BUCKET_BYTES, estimate, traffic
from orchestrator.records import Branch, Cut, SequenceGroup

HIDDEN, VOCABULARY = 64, 2048
LARGE = 2 * VOCABULARY * HIDDEN  # input and output embedding: the tensors that ZeRO-3 partitions
LAYERS = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * 2 * HIDDEN + 2 * HIDDEN) + HIDDEN
ALL = LARGE + LAYERS


def recipe(*, lora=None, sync_every=None, checkpointing=False, name="dpo", layers=2, hidden=HIDDEN, **learners) -> Recipe:
    return Recipe(
        model=Model(tiny=TinyModel(hidden_size=hidden, layers=layers, vocab_size=VOCABULARY), lora=lora),
        data=Data(train="none"),
        algorithm=Algorithm(name=name, reference_sync_every=sync_every),
        batch=Batch(),
        optimizer=Optimizer(learning_rate=1e-3),
        learners=Learners(activation_checkpointing=checkpointing, **learners),
    )


def cut(stage=0, sync="no_sync", workers=4):
    return Cut(workers, 1, None, "prefix_shared", stage, sync)


def rows(count=2, size=8):
    answer = Branch(np.arange(size), np.ones(size, np.bool_))
    return pack([SequenceGroup(i, np.arange(size), (answer, answer)) for i in range(count)], "prefix_shared")


def parts(cfg, how, batch=None):
    return asdict(estimate(cfg, build(cfg.algorithm), how, batch if batch is not None else rows()))


@pytest.mark.parametrize(
    ("stage", "sync", "weights", "master", "optimizer", "gradients"),
    [
        (0, "no_sync", 4 * ALL, 0, 8 * ALL, 4 * ALL),
        (1, "no_sync", 4 * ALL, 4 * (ALL // 4), 8 * (ALL // 4), 4 * ALL + 4 * (ALL // 4)),
        (2, "coalesced", 4 * ALL, 4 * (ALL // 4), 8 * (ALL // 4), 4 * ALL + 4 * (ALL // 4)),
        (2, "per_micro_batch", 4 * ALL, 4 * (ALL // 4), 8 * (ALL // 4), 4 * (ALL // 4)),
        (3, "per_micro_batch", 4 * (ALL // 4), 4 * (ALL // 4), 8 * (ALL // 4), 4 * (ALL // 4)),
    ],
)
def test_state_of_each_stage_on_four_ranks(stage, sync, weights, master, optimizer, gradients):
    found = parts(recipe(), cut(stage, sync))
    assert [found[name] for name in ("weights", "master", "optimizer", "gradients")] == [weights, master, optimizer, gradients]


def test_bf16_halves_weights_and_keeps_an_fp32_master():
    found = parts(recipe(precision="bf16"), cut(1))
    assert (found["weights"], found["master"], found["gradients"]) == (2 * ALL, ALL // 4 * 4, 2 * ALL + ALL // 4 * 4)


def test_an_offloaded_optimizer_takes_no_device_memory():
    found = parts(recipe(offload=Offload(optimizer="cpu")), cut(1))
    assert (found["master"], found["optimizer"]) == (0, 0)


def test_only_an_adapter_has_optimizer_and_gradients():
    found = parts(recipe(lora=Lora(rank=2)), cut())
    adapter = 2 * (2 * 4 * (HIDDEN + HIDDEN) + 2 * 3 * (HIDDEN + 2 * HIDDEN))
    assert (found["optimizer"], found["gradients"], found["weights"]) == (8 * adapter, 4 * adapter, 4 * (ALL + adapter))


def test_a_live_reference_is_a_second_copy():
    assert parts(recipe(), cut())["reference"] == 0
    assert parts(recipe(sync_every=10), cut())["reference"] == 4 * ALL


def test_one_rank_sends_nothing_and_buffers_are_bounded():
    assert parts(recipe(), cut(workers=1))["communication"] == 0
    assert parts(recipe(), cut())["communication"] == 4 * ALL
    assert parts(recipe(hidden=2048, layers=1), cut())["communication"] == BUCKET_BYTES


def test_activations_grow_with_the_micro_batch_and_state_does_not():
    sizes = [parts(recipe(), cut(), rows(count)) for count in (2, 4, 8)]
    two, four, eight = (s["activations"] for s in sizes)
    assert eight - four == pytest.approx(2 * (four - two), rel=0.1)  # beside the head's own gradient, which does not grow
    assert four > two
    assert len({(s["weights"], s["optimizer"], s["gradients"]) for s in sizes}) == 1


def test_logits_are_those_of_the_scored_positions():
    assert parts(recipe(), cut(), rows(2, 8))["logits"] == 2 * 4 * (2 * 2 * 8) * VOCABULARY


def test_logits_are_bounded_by_a_chunk():
    assert parts(recipe(), cut(), rows(64, 128))["logits"] == 2 * 4 * (1 << 24)


def test_a_reward_model_has_no_logits():
    assert parts(recipe(name="reward"), cut())["logits"] == 0


def test_checkpointing_trades_activations_for_time():
    batch = rows(8, 32)
    deep = recipe(layers=6), recipe(layers=6, checkpointing=True)
    plain, checkpointed = (parts(cfg, cut(), batch)["activations"] for cfg in deep)
    assert checkpointed < 0.5 * plain


def test_the_total_is_the_sum_and_a_gpu_has_no_malloc():
    found = estimate(recipe(), build(recipe().algorithm), cut(), rows())
    assert found.total == sum(asdict(found).values())
    assert found.allocator > 0
    assert parts(recipe(gpus_per_worker=1), cut())["allocator"] == 0


def test_a_large_model_is_predicted_without_being_made():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = parts(recipe(hidden=4096, layers=8), cut(3, "per_micro_batch"))
    assert found["weights"] > 1_000_000_000
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 500_000_000


@pytest.mark.parametrize(
    ("stage", "sync", "reduced", "gathered"),
    [
        (0, "no_sync", 4 * ALL, 0),
        (1, "no_sync", 4 * ALL, 4 * ALL),
        (2, "coalesced", 4 * ALL, 4 * ALL),
        (2, "per_micro_batch", 16 * 4 * ALL, 4 * ALL),
        (3, "coalesced", 4 * ALL, 4 * (LAYERS + 2 * 16 * LARGE)),
        (3, "per_micro_batch", 16 * 4 * ALL, 4 * (LAYERS + 2 * 16 * LARGE)),
    ],
)
def test_traffic_of_sixteen_micro_batches(stage, sync, reduced, gathered):
    cfg = recipe()
    found = traffic(cfg, build(cfg.algorithm), cut(stage, sync), 16)
    assert (found.reduced, found.gathered) == (reduced, gathered)


def test_one_worker_has_no_traffic():
    cfg = recipe()
    found = traffic(cfg, build(cfg.algorithm), cut(3, "per_micro_batch", workers=1), 16)
    assert (found.reduced, found.gathered) == (0, 0)


def test_low_precision_parameters_are_gathered_small_and_reduced_whole():
    cfg = recipe(precision="bf16")
    found = traffic(cfg, build(cfg.algorithm), cut(1), 16)
    assert (found.reduced, found.gathered) == (4 * ALL, 2 * ALL)
