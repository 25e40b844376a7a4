"""The ways to take a run's steps on given machines: each with its memory and its time by estimate.

    (ZeRO stage, sync policy) x checkpointing --largest micro-batch that fits--> Way

`plan/planner.py` chooses among them and says why.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.batches import Cut, MicroBatch, SequenceGroup, Sync
from orchestrator.core.errors import ConfigError
from orchestrator.core.resources import WorkerGroup
from orchestrator.data.dataset import DataSet
from orchestrator.data.micro_batches import positions_of, shares
from orchestrator.data.packing import pack
from orchestrator.models.forward import Checkpointing
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.memory import MemoryEstimate, MemoryModel
from orchestrator.recipe.schema import Learners, Recipe

LOOK_AHEAD = 8
"""Steps whose largest micro-batch stands for the run's."""
CPU_POSITIONS = 2048
"""Micro-batches above this many positions were not faster on a CPU: their activations leave the caches
(benchmarks/seed_arithmetic.py)."""
GPU_POSITIONS = 65536
ASSUMED_GPU_BYTES = 80_000_000_000
GPU_FLOPS, CPU_FLOPS = 4e14, 4e10
"""A second of a GPU (40 % of an H100) or of a CPU core, GPU_LINK, CPU_LINK: bytes of a link that is not
known. Only to compare ways."""
GPU_LINK, CPU_LINK = 25e9, 1e9
MICRO_BATCH_S = 0.1
"""What a micro-batch costs on a GPU whatever its size: thousands of kernels are launched, weights and
gradients pass the memory."""
SURELY = 0.5
"""Activations, but for the gradient of one tensor, grow at least by half as much as positions."""
COMPUTED_AGAIN: dict[Checkpointing, float] = {"none": 0.0, "selective": 0.07, "full": 1 / 3}
"""Share of a step. full: a forward beside a forward and a backward of two; selective: norms, rotations and
activation functions, which wait for the memory (an estimate for GPUs)."""
LEGAL_SYNC: dict[int, tuple[Sync, ...]] = {
    0: ("no_sync",),
    1: ("no_sync", "coalesced"),
    2: ("coalesced", "per_micro_batch"),
    3: ("coalesced", "per_micro_batch"),
}

BY_TRAFFIC: tuple[tuple[int, Sync], ...] = (
    (0, "no_sync"),
    (1, "no_sync"),
    (2, "coalesced"),
    (2, "per_micro_batch"),
    (3, "per_micro_batch"),
)
"""What `auto` tries in turn: one reduction of the gradients; the same with partitioned moments; with
partitioned gradients; a reduction per micro-batch; and all parameters gathered twice per micro-batch. Each
needs less memory than the one before."""


def memory_limit(recipe: Recipe, hardware: Hardware) -> int:
    """Bytes a worker may use: batch.memory_utilisation of the recipe's limit, of the GPU, or of its share of
    a machine's RAM."""
    batch, learners = recipe.batch, recipe.learners
    if batch.memory_limit_gb is not None:
        device = batch.memory_limit_gb * 1e9
    elif learners.gpus:
        device = (hardware.gpu_memory or ASSUMED_GPU_BYTES) * min(1.0, learners.gpus)
    else:
        device = _ram(learners, hardware, 0.0)
    return int(device * batch.memory_utilisation)


def ram_limit(recipe: Recipe, hardware: Hardware) -> int:
    """Bytes of RAM that a GPU learner may use: its share of batch.memory_utilisation of its machine. A CPU
    learner's RAM is its device."""
    learners = recipe.learners
    return int(_ram(learners, hardware, learners.gpus) * recipe.batch.memory_utilisation)


def _ram(learners: Learners, hardware: Hardware, gpus: float) -> float:
    """RAM of a machine over the learners that stand on it."""
    group = WorkerGroup("learners", learners.count, learners.cpus_per_worker, gpus)
    hosts = [
        m for m in hardware.machines if m.holds(group)
    ] or hardware.machines  # a head may have no CPUs to give out
    spread = -(-learners.count // len(hosts))
    return min(m.ram / min(learners.count, max(m.holds(group), spread)) for m in hosts)


def largest_micro_batch(steps: Sequence[Sequence[SequenceGroup]], cut: Cut) -> MicroBatch:
    """The micro-batch with most positions among these steps."""
    chunks = (chunk for step in steps for rank in shares(step, cut) for chunk in rank)
    return pack(max(chunks, key=lambda chunk: positions_of(chunk, cut)), cut.layout, one_row=cut.one_row)


def first_steps(data: DataSet) -> list[Sequence[SequenceGroup]]:
    """The examples of the first optimizer steps."""
    steps, cursor = [], 0
    for _ in range(min(LOOK_AHEAD, data.batches.steps_in(1.0))):
        steps.append(data.batches.at(cursor))
        cursor += len(steps[-1])
    return steps


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes that a rank may use: of its device, and of RAM beside a GPU."""

    device: int
    ram: int

    def hold(self, memory: MemoryEstimate) -> bool:
        return memory.peak <= self.device and memory.ram <= self.ram


@dataclass(frozen=True, slots=True)
class Way:
    """One way to take the steps. seconds: of an optimizer step by estimate, to compare ways with."""

    cut: Cut
    checkpointing: Checkpointing
    memory: MemoryEstimate
    fits: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """What every way is tried with. steps: the first ones' examples."""

    recipe: Recipe
    algorithm: AlgorithmSpec
    steps: Sequence[Sequence[SequenceGroup]]
    model: MemoryModel
    limits: Limits
    hardware: Hardware
    _largest: dict[Cut, MicroBatch] = field(default_factory=dict)
    """By cut, at ZeRO 0: how state is partitioned does not matter."""

    def way(self, cut: Cut, checkpointing: Checkpointing) -> Way:
        memory = self.model.estimate(cut, self.largest_micro_batch(cut), checkpointing)
        fits = self.limits.hold(memory)
        return Way(
            cut, checkpointing, memory, fits, self._seconds(cut, checkpointing) if fits else float("inf")
        )

    def largest_micro_batch(self, cut: Cut) -> MicroBatch:
        bare = replace(cut, zero_stage=0, sync="no_sync")
        if bare not in self._largest:
            self._largest[bare] = largest_micro_batch(self.steps, cut)
        return self._largest[bare]

    def _seconds(self, cut: Cut, checkpointing: Checkpointing) -> float:
        """Of the first step: 6 FLOPs per parameter and position, what is computed again, a cost per
        micro-batch, and the wire."""
        learners, dealt = self.recipe.learners, shares(self.steps[0], cut)
        gpu, share = bool(learners.gpus), max(dealt, key=len)
        positions = max(sum(positions_of(chunk, cut) for chunk in rank) for rank in dealt)
        flops = 6 * self.model.sizes.all * positions * (1 + COMPUTED_AGAIN[checkpointing])
        sent = self.model.traffic(cut, len(share))
        wire = (sent.reduced * 2 + sent.gathered) / (self.hardware.link or (GPU_LINK if gpu else CPU_LINK))
        return (
            flops / (GPU_FLOPS if gpu else CPU_FLOPS * learners.cpus_per_worker)
            + (MICRO_BATCH_S * len(share) if gpu else 0)
            + wire
        )

    def least_seconds(self, cut: Cut, checkpointing: Checkpointing) -> float:
        """Of a step by estimate, if its micro-batches could be as large as they make sense."""
        batch = self.recipe.batch
        auto = batch.micro_batch_tokens is None and batch.micro_batch == "auto"
        return self._seconds(
            replace(cut, positions=self._budgets(cut)[0])
            if auto
            else given(self.recipe, self.algorithm, cut),
            checkpointing,
        )

    def _budgets(self, cut: Cut) -> list[int]:
        """Positions of a micro-batch that make sense, from most to least."""
        cap = GPU_POSITIONS if self.recipe.learners.gpus else CPU_POSITIONS
        most = max(positions_of(step, cut) for step in self.steps)
        longest = max(positions_of([g], cut) for step in self.steps for g in step)
        budgets = [max(longest, min(cap, -(-most // cut.workers)))]
        while budgets[-1] > 1.5 * longest:
            budgets.append(max(longest, budgets[-1] // 2))
        return budgets

    def largest(self, cut: Cut, checkpointing: Checkpointing) -> Way | None:
        """The way with the recipe's micro-batch, or with the largest that fits the predicted memory; None
        where nothing does."""
        batch = self.recipe.batch
        if batch.micro_batch_tokens is not None or batch.micro_batch != "auto":
            way = self.way(given(self.recipe, self.algorithm, cut), checkpointing)
            return way if way.fits else None
        budgets = self._budgets(cut)
        if (
            not self.recipe.learners.gpus
            and (way := self.way(replace(cut, positions=budgets[0]), checkpointing)).fits
        ):
            return way  # a CPU's largest rows are soon followed, and mostly fit
        least = self.way(replace(cut, positions=budgets[-1]), checkpointing)
        if not least.fits:
            return None
        known, length = (
            max(0, least.memory.activations - 4 * self.model.sizes.largest),
            self.largest_micro_batch(least.cut).positions,
        )
        for positions in budgets[:-1]:
            candidate = replace(cut, positions=positions)
            more = known * (self.largest_micro_batch(candidate).positions / length - 1) * SURELY
            if self.recipe.learners.gpus and least.memory.total + more > self.limits.device:
                continue  # far beyond; with as many positions as a GPU holds, a pass takes seconds
            if (way := self.way(candidate, checkpointing)).fits:
                return way
        return least


def ways_of(recipe: Recipe) -> list[tuple[int, Sync]]:
    """ZeRO stages with their sync policies that the recipe leaves open, from least to most bytes on the wire."""
    learners = recipe.learners
    sync, stage = learners.sync, learners.zero_stage
    ways: list[tuple[int, Sync]] = list(BY_TRAFFIC)
    if sync != "auto":
        ways = [(number, sync) for number, legal in LEGAL_SYNC.items() if sync in legal]
    if learners.precision in ("bf16", "fp16"):
        ways = [way for way in ways if way[0] > 0 and way[1] != "coalesced"]
    if stage != "auto":
        ways = [way for way in ways if way[0] == stage]
    ways = [way for way in ways if lowest_stage(learners) <= way[0] <= (2 if learners.fused else 3)]
    if not ways:
        raise ConfigError(
            f"learners.sync={sync} is not possible with precision={learners.precision}, this learners.fused "
            "and this learners.offload",
            fix="set learners.sync=auto",
        )
    return ways


def modes_of(recipe: Recipe, possible: bool = True) -> tuple[Checkpointing, ...]:
    """What may be computed again; possible: whether the architecture can do so. ConfigError where the recipe
    wants what it cannot."""
    mode = recipe.learners.activation_checkpointing
    if not possible and mode not in ("auto", "none"):
        raise ConfigError(
            f"learners.activation_checkpointing={mode} is not possible with this model",
            why="transformers has none for its architecture",
            fix="set learners.activation_checkpointing=none, or auto",
        )
    if not possible:
        return ("none",)
    return ("none", "selective", "full") if mode == "auto" else (mode,)


def lowest_stage(learners: Learners) -> int:
    """What DeepSpeed can offload from: partitions of the optimizer from ZeRO 1, of parameters at 3. Below, it
    ignores the wish or ends."""
    return 3 if learners.offload.parameters != "none" else 1 if learners.offload.optimizer != "none" else 0


def given(recipe: Recipe, algorithm: AlgorithmSpec, cut: Cut) -> Cut:
    """The cut with the recipe's micro-batch (at least one group), or with the smallest one where that is left
    to the plan."""
    batch = recipe.batch
    if batch.micro_batch_tokens is not None:
        return replace(cut, positions=batch.micro_batch_tokens)
    return (
        replace(cut, positions=1)
        if batch.micro_batch == "auto"
        else replace(cut, examples=max(1, batch.micro_batch // algorithm.group_examples))
    )
