"""The prediction's parts by hand; the whole against a real process is in tests/invariants/test_memory.py."""

import resource
from dataclasses import asdict

import numpy as np
import pytest

from orchestrator.algorithms.table import build
from orchestrator.core.batches import Branch, Cut, SequenceGroup
from orchestrator.data.packing import pack
from orchestrator.plan.memory import DEPTHS, MemoryModel
from orchestrator.recipe.schema import (
    AlgorithmConfig,
    Batch,
    Data,
    Learners,
    Lora,
    Model,
    Offload,
    Optimizer,
    Recipe,
    TinyModel,
)

HIDDEN, VOCABULARY = 64, 2048
LARGE = 2 * VOCABULARY * HIDDEN  # input and output embedding: the tensors that ZeRO-3 partitions
LAYERS = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * 2 * HIDDEN + 2 * HIDDEN) + HIDDEN
ALL = LARGE + LAYERS


def recipe(
    *, lora=None, sync_every=None, name="dpo", layers=2, hidden=HIDDEN, architecture="llama", **learners
) -> Recipe:
    return Recipe(
        model=Model(
            tiny=TinyModel(
                architecture=architecture, hidden_size=hidden, layers=layers, vocab_size=VOCABULARY
            ),
            lora=lora,
        ),
        data=Data(train="none"),
        algorithm=AlgorithmConfig(name=name, reference_sync_every=sync_every),
        batch=Batch(),
        optimizer=Optimizer(learning_rate=1e-3),
        learners=Learners(**learners),
    )


def cut(stage=0, sync="no_sync", workers=4):
    return Cut(workers, 1, None, "prefix_shared", stage, sync)


def rows(count=2, size=8):
    answer = Branch(np.arange(size), np.ones(size, np.bool_))
    return pack([SequenceGroup(i, np.arange(size), (answer, answer)) for i in range(count)], "prefix_shared")


def parts(cfg, how, batch=None, checkpointing="none"):
    return asdict(
        MemoryModel(cfg, build(cfg.algorithm)).estimate(
            how, batch if batch is not None else rows(), checkpointing
        )
    )


STATE = ("weights", "gradients", "accumulators", "master", "moments")
SHARE = ALL // 4


@pytest.mark.parametrize(
    ("stage", "sync", "state"),
    [
        (0, "no_sync", [4 * ALL, 4 * ALL, 0, 0, 8 * ALL]),
        (1, "no_sync", [4 * ALL, 4 * ALL, 0, 4 * SHARE, 8 * SHARE]),
        (2, "coalesced", [4 * ALL, 4 * ALL, 0, 4 * SHARE, 8 * SHARE]),
    ],
)
def test_state_of_each_stage_on_four_ranks(stage, sync, state):
    """tests/invariants/test_state_bytes.py holds all ways against the engine's own storages."""
    found = parts(recipe(), cut(stage, sync))
    assert [found[name] for name in STATE] == pytest.approx(state, abs=16)


def test_partitions_of_stages_2_and_3_are_a_share_and_a_little():
    """fp32 sums at stage 2 are views of whole gradients; at stage 3 small tensors are whole as well."""
    two, three = (parts(recipe(), cut(stage, "per_micro_batch")) for stage in (2, 3))
    assert two["gradients"] == three["gradients"] == 0
    assert 4 * SHARE <= two["accumulators"] <= 4 * (SHARE + 2 * VOCABULARY * HIDDEN)
    assert three["weights"] == 4 * SHARE + 4 * LAYERS
    assert [three[n] for n in STATE[2:]] == pytest.approx([4 * SHARE, 4 * SHARE, 8 * SHARE], abs=64)


def test_bf16_at_zero_1_keeps_whole_gradients_twice():
    found = parts(recipe(precision="bf16"), cut(1))
    assert [found[n] for n in STATE] == pytest.approx(
        [2 * ALL, 2 * ALL, 4 * ALL, 4 * SHARE, 8 * SHARE], abs=16
    )


def test_an_offloaded_optimizer_takes_ram_instead_of_the_device():
    found, plain = (
        parts(recipe(gpus_per_worker=1, offload=Offload(optimizer=where)), cut(1))
        for where in ("cpu", "none")
    )
    assert (found["master"], found["moments"], plain["offloaded"]) == (0, 0, 0)
    assert found["offloaded"] >= (4 + 8 + 4 + 4) * SHARE
    large = recipe(gpus_per_worker=1, offload=Offload(optimizer="cpu"))
    here = MemoryModel(large, build(large.algorithm)).estimate(cut(1), rows(), "none")
    assert "offloaded" not in here.parts and "offloaded" in here.__class__.__dataclass_fields__
    on_cpu = recipe(offload=Offload(optimizer="cpu"))
    assert "offloaded" in MemoryModel(on_cpu, build(on_cpu.algorithm)).estimate(cut(1), rows(), "none").parts


def test_only_an_adapter_has_optimizer_and_gradients():
    found = parts(recipe(lora=Lora(rank=2)), cut())
    adapter = 2 * (2 * 4 * (HIDDEN + HIDDEN) + 2 * 3 * (HIDDEN + 2 * HIDDEN))
    assert (found["moments"], found["gradients"], found["weights"]) == (
        8 * adapter,
        4 * adapter,
        4 * (ALL + adapter),
    )


def test_a_live_reference_is_a_second_copy():
    assert parts(recipe(), cut())["reference"] == 0
    assert parts(recipe(sync_every=10), cut())["reference"] == 4 * ALL


def test_the_model_comes_whole_and_in_fp32():
    """Whatever the stage, and then stages 1 and 2 make a flat copy."""
    whole = {
        stage: parts(recipe(precision="bf16"), cut(stage, "per_micro_batch"))["loading"] for stage in (2, 3)
    }
    assert whole[3] == 4 * ALL and whole[2] == 4 * ALL
    assert parts(recipe(), cut(1))["loading"] == 8 * ALL
    assert parts(recipe(gpus_per_worker=1), cut(1))["ram"] > 4 * ALL and parts(recipe(), cut(1))["ram"] == 0


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_many_equal_layers_are_extrapolated_exactly(checkpointing, architecture, monkeypatch):
    deep, batch = recipe(layers=9, architecture=architecture), rows(8, 32)
    passes = []
    whole = MemoryModel._pass
    monkeypatch.setattr(
        MemoryModel,
        "_pass",
        lambda model, layers, *rest: (passes.append(layers), whole(model, layers, *rest))[1],
    )
    model = MemoryModel(deep, build(deep.algorithm))
    found = model._step_bytes(batch, checkpointing)
    assert passes == list(DEPTHS)
    assert found == whole(model, 9, batch, checkpointing)


def test_layers_that_differ_are_followed_one_by_one(monkeypatch):
    passes = []
    whole = MemoryModel._pass
    monkeypatch.setattr(
        MemoryModel,
        "_pass",
        lambda model, layers, *rest: (passes.append(layers), whole(model, layers, *rest))[1],
    )
    mixed = recipe(layers=8, architecture="gemma2")
    MemoryModel(mixed, build(mixed.algorithm))._step_bytes(rows(8, 32), "none")
    assert passes == [None], "all of them at once"


def test_activations_grow_with_the_micro_batch_and_state_does_not():
    sizes = [parts(recipe(), cut(), rows(count)) for count in (2, 4, 8)]
    two, four, eight = (s["activations"] for s in sizes)
    assert eight - four == pytest.approx(
        2 * (four - two), rel=0.1
    )  # beside the head's own gradient, which does not grow
    assert four > two
    assert len({(s["weights"], s["moments"], s["gradients"]) for s in sizes}) == 1


def test_logits_are_those_of_the_scored_positions():
    assert parts(recipe(), cut(), rows(2, 8))["logits"] == 2 * 4 * (2 * 2 * 8) * VOCABULARY


def test_logits_are_bounded_by_a_chunk():
    assert parts(recipe(), cut(), rows(64, 128))["logits"] == 2 * 4 * (1 << 24)


def test_a_reward_model_has_no_logits():
    assert parts(recipe(name="reward"), cut())["logits"] == 0


def test_checkpointing_trades_activations_for_time():
    none, selective, full = (
        parts(recipe(layers=6), cut(), rows(8, 32), mode)["activations"]
        for mode in ("none", "selective", "full")
    )
    assert full < 0.8 * selective < 0.8 * 0.8 * none


def test_the_total_is_the_sum_and_a_gpu_has_no_malloc():
    cfg = recipe()
    found = MemoryModel(cfg, build(cfg.algorithm)).estimate(cut(), rows(), "none")
    assert found.total == sum(found.parts.values()) and found.peak == max(found.total, found.loading)
    assert 0 < found.runtime < 100_000_000
    assert parts(recipe(gpus_per_worker=1), cut())["runtime"] == 2_000_000_000


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
    found = MemoryModel(cfg, build(cfg.algorithm)).traffic(cut(stage, sync), 16)
    assert (found.reduced, found.gathered) == (reduced, gathered)


def test_one_worker_has_no_traffic():
    cfg = recipe()
    found = MemoryModel(cfg, build(cfg.algorithm)).traffic(cut(3, "per_micro_batch", workers=1), 16)
    assert (found.reduced, found.gathered) == (0, 0)


def test_low_precision_parameters_are_gathered_small_and_reduced_whole():
    cfg = recipe(precision="bf16")
    found = MemoryModel(cfg, build(cfg.algorithm)).traffic(cut(1), 16)
    assert (found.reduced, found.gathered) == (4 * ALL, 2 * ALL)


def test_7b_at_zero_3_is_what_is_counted_by_hand():
    """Llama 2 7B, N = 6,738,415,616, bf16, 8 ranks, 65,536 positions, each layer computed again: 2N/8 of
    weights, 4N/8 each of sums and master, 8N/8 of moments; the inputs of 32 layers, 32 x 65536 x 4096 x 2 B =
    17.2 GB; about 13 GB of one layer computed again, and 1 GB of the head."""
    shape = TinyModel(
        hidden_size=4096, layers=32, heads=32, intermediate_size=11008, vocab_size=32000, max_positions=4096
    )
    learners = Learners(workers=8, gpus_per_worker=1, precision="bf16", zero_stage=3)
    cfg = recipe().model_copy(update={"model": Model(tiny=shape), "learners": learners})
    answer = Branch(np.arange(1024), np.ones(1024, np.bool_))
    batch = pack([SequenceGroup(i, np.arange(2048), (answer, answer)) for i in range(16)], "prefix_shared")
    assert batch.positions == 65536
    model = MemoryModel(cfg, build(cfg.algorithm))
    assert model.sizes.all == 6_738_415_616
    found = model.estimate(cut(3, "per_micro_batch", workers=8), batch, "full")
    state = [found.weights, found.accumulators, found.master, found.moments]
    assert state == pytest.approx([1.685e9, 3.369e9, 3.369e9, 6.738e9], rel=0.01)
    assert found.activations + found.logits == pytest.approx(17.2e9 + 13e9 + 1e9, rel=0.15)
    assert 46e9 < found.total < 46.5e9 * 1.2, "with what is gathered, communicated and held by CUDA"


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_experts_in_fp32_are_followed(checkpointing):
    cfg = recipe(architecture="mixtral")
    model = MemoryModel(cfg, build(cfg.algorithm))
    found = model.estimate(cut(), rows(), checkpointing)
    assert model.unpredicted == "" and found.activations > 0


def test_what_cannot_be_followed_is_estimated_and_the_reason_kept():
    cfg = recipe(architecture="jetmoe", name="sft")
    model = MemoryModel(cfg, build(cfg.algorithm))
    answer = Branch(np.arange(8), np.ones(8, np.bool_))
    found = model.estimate(cut(), pack([SequenceGroup(0, np.arange(8), (answer,))], "padded"), "none")
    assert "DataDependent" in model.unpredicted and found.activations > 0


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_formula_is_near_what_is_followed(architecture, checkpointing):
    cfg, batch = recipe(layers=8, hidden=256, architecture=architecture), rows(8, 64)
    model = MemoryModel(cfg, build(cfg.algorithm))
    followed = model.estimate(cut(), batch, checkpointing).activations
    model.unpredicted, model._steps = "asked for", {}
    assert model.estimate(cut(), batch, checkpointing).activations == pytest.approx(followed, rel=0.6)
