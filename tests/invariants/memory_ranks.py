"""Counts the live storages of a real DeepSpeed rank by their owners, for
tests/invariants/test_state_bytes.py.

Every tensor that Python can reach is found and each storage is counted once. A storage without a known owner
is counted as `rest`, so that an unexpected buffer shows.
"""

import gc
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.core.batches import Cut, Sync
from orchestrator.data.micro_batches import cut_step
from orchestrator.learner.engine import ProcessGroup
from orchestrator.learner.rank_learner import LearnerSpec, RankLearner
from orchestrator.recipe.schema import (
    AlgorithmConfig,
    Data,
    Learners,
    Lora,
    Model,
    Offload,
    Optimizer,
    Recipe,
    TinyModel,
)
from tests.invariants.engine_ranks import pairs


@dataclass(frozen=True, slots=True)
class Way:
    """One combination of stage, sync policy, precision and offload."""

    stage: int
    sync: Sync
    precision: str
    optimizer: str = "none"
    parameters: str = "none"
    lora: bool = False


@dataclass(frozen=True, slots=True)
class Counted:
    """Bytes of live storages by class."""

    weights: int
    gradients: int
    accumulators: int
    master: int
    moments: int
    buffers: int
    rest: int
    """Bytes of storages that belong to no class."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True)
class Walked:
    """Bytes that a rank held in a step."""

    backward: Counted
    """In the last backward, while gradients are still held back."""
    stepped: Counted
    """After the step."""


def recipe(way: Way, workers: int) -> Recipe:
    """A model of 13.6 M parameters. The adapter has 0.6 M."""
    return Recipe(
        model=Model(
            tiny=TinyModel(hidden_size=512, layers=2, heads=4, vocab_size=8192, intermediate_size=1024),
            lora=Lora(rank=64) if way.lora else None,
        ),
        data=Data(train="none"),
        algorithm=AlgorithmConfig(name="simpo"),
        optimizer=Optimizer(learning_rate=1e-3),
        learners=Learners(
            workers=workers,
            precision=way.precision,
            offload=Offload(optimizer=way.optimizer, parameters=way.parameters),  # pyright: ignore
        ),
    )


def cut(way: Way, workers: int) -> Cut:
    return Cut(workers, 1, None, "prefix_shared", way.stage, way.sync)


def walk_ways(group: ProcessGroup, ways: list[Way]) -> list[Walked]:
    """Runs two steps of two micro-batches with each way's engine. The second is counted, when all state
    exists."""
    return [_walk_way(group, way) for way in ways]


def _walk_way(group: ProcessGroup, way: Way) -> Walked:
    gc.collect()
    # references, so that no storage of this engine gets the address of an older one
    others = [s for s in map(_storage, _reachable()) if s is not None]
    before = {s.data_ptr() for s in others}
    how = cut(way, group.world)
    learner = RankLearner(LearnerSpec(recipe(way, group.world), how, 10), group, torch.device("cpu"))
    counts: list[Counted] = []
    backward, zero, buckets = learner.engine.backward, learner.engine.zero, [0]
    reduce = getattr(zero, "reduce_ipg_grads", None)

    def watched(loss: Tensor, *, last: bool) -> None:
        backward(loss, last=last)
        if last:
            counts.append(_count(learner, before, buckets[-1]))

    def reduced(*args: Any, **options: Any) -> Any:
        buckets.append(_bytes(_buckets(zero)))
        assert reduce is not None
        return reduce(*args, **options)

    learner.engine.backward = watched
    if reduce is not None:
        zero.reduce_ipg_grads = reduced
    for step in range(2):
        batch = cut_step(pairs(2 * group.world, step), how)
        learner.forward_backward(batch.micro_batches[group.rank], batch.units, step)
        learner.optim_step(step)
        buckets[:] = [0]  # a policy that holds gradients back reduces after its last backward
    stepped = _count(learner, before, 0)
    return Walked(counts[-1], stepped)


def _count(learner: RankLearner, before: set[int], bucket: int) -> Counted:
    """bucket: bytes of the buckets during the reduction. At stage 2 they are freed by the end of the
    backward."""
    gc.collect()
    zero, optimizer = learner.engine.zero, learner.engine.ds.basic_optimizer
    parameters = list(learner.scoring.parameters())
    masters = (
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
        "fp32_partitioned_groups_flat",
    )
    flat = [v for name in masters for v in _held(zero, name)]
    owners: dict[str, Iterable[Any]] = {
        "weights": [x for p in parameters for x in (p.data, getattr(p, "ds_tensor", None))],
        "gradients": [p.grad for p in parameters],
        "master": flat,
        "moments": optimizer.state.values(),
        "accumulators": [
            *(getattr(p, "grad_accum", None) for p in parameters),
            *(
                v
                for name in ("fp32_groups_gradients_flat", "averaged_gradients", "accumulated_grads_in_cpu")
                for v in _held(zero, name)
            ),
            *_held(zero, "grad_partitions_flat_buffer"),
            *(f.grad for f in flat),
        ],
        "buffers": [
            *_buckets(zero),
            *(
                v
                for name in (
                    "temp_grad_buffer_for_cpu_offload",
                    "temp_grad_buffer_for_gpu_offload",
                    "param_buffer_of_bit16_for_cpu_offload_groups",
                )
                for v in _held(zero, name)
            ),
        ],
        "rest": _reachable(),
    }
    seen, sizes = set(before), dict.fromkeys(owners, 0)
    for name, held in owners.items():
        for tensor in _tensors(held):
            storage = _storage(tensor)
            if storage is not None and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                sizes[name] += storage.nbytes()
    sizes["buffers"] += max(0, bucket - _bytes(_buckets(zero)))
    return Counted(**sizes)


def _buckets(zero: Any) -> list[Any]:
    return [bucket.buffer for bucket in getattr(zero, "ipg_buckets", {}).values()]


def _bytes(held: Iterable[Any]) -> int:
    return sum(t.untyped_storage().nbytes() for t in _tensors(held))


def _held(owner: Any, name: str) -> list[Any]:
    value = getattr(owner, name, None)
    return (
        []
        if value is None
        else [value]
        if isinstance(value, Tensor)
        else list(value.values())
        if isinstance(value, dict)
        else list(value)
    )


def _reachable() -> list[Tensor]:
    return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if issubclass(type(value), Tensor):
            yield value
        elif (
            type(value) is dict and value and all(isinstance(v, Tensor | int | float) for v in value.values())
        ):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
            yield from _tensors(value)


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    if tensor.device.type == "meta":
        return None
    storage = tensor.untyped_storage()
    return storage if storage.nbytes() else None
