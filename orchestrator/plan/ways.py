"""Ways to compute the steps of a run on given machines, each with its predicted memory and time.

    (ZeRO stage, sync policy) x checkpointing --largest micro-batch that fits--> Way

`plan/planner.py` chooses among them and gives the reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.batches import Cut, MicroBatch, SequenceGroup, Sync
from orchestrator.core.errors import ConfigError
from orchestrator.core.resources import WorkerGroup
from orchestrator.data.dataset import PlanInput
from orchestrator.data.micro_batches import positions_of, shares
from orchestrator.data.packing import pack
from orchestrator.models.forward import Checkpointing
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.memory import MemoryEstimate, MemoryModel
from orchestrator.recipe.schema import Learners, Recipe

LOOK_AHEAD = 8
"""Number of first steps, whose largest micro-batch stands for the run's."""
CPU_POSITIONS = 2048
"""Largest micro-batch that makes sense on a CPU. Larger ones were not faster: their activations do not fit
the caches (benchmarks/seed_arithmetic.py)."""
GPU_POSITIONS = 65536
"""Largest micro-batch that makes sense on a GPU."""
ASSUMED_GPU_BYTES = 80_000_000_000
"""Memory of a GPU that is not known."""
GPU_FLOPS, CPU_FLOPS = 4e14, 4e10
"""Assumed FLOPs per second of a GPU (40 % of an H100) and of a CPU core, to compare ways."""
GPU_LINK, CPU_LINK = 25e9, 1e9
"""Bytes per second of a link that is not known, to compare ways."""
MICRO_BATCH_S = 0.1
"""Seconds of a micro-batch on a GPU at any size: thousands of kernels are launched, and weights and gradients
are read and written."""
MIN_GROWTH = 0.5
"""Least growth of activations with the positions, as a share, without the gradient of the largest tensor."""
RECOMPUTED: dict[Checkpointing, float] = {"none": 0.0, "selective": 0.07, "full": 1 / 3}
"""Recomputation as a share of a step. full: one forward more, beside a forward and a backward of two.
selective: norms, rotations and activation functions, which are bound by memory bandwidth (an estimate for
GPUs)."""
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
"""Order in which `auto` tries ways: one reduction of the gradients; the same with partitioned moments; with
partitioned gradients; a reduction per micro-batch; and all parameters gathered twice per micro-batch. Each
needs less memory than the one before."""


def memory_limit(recipe: Recipe, hardware: Hardware) -> int:
    """Bytes that a worker may use: the share batch.memory_utilisation of the recipe's limit, of the GPU, or
    of its part of a machine's RAM."""
    batch, learners = recipe.batch, recipe.learners
    if batch.memory_limit_gb is not None:
        device = batch.memory_limit_gb * 1e9
    elif learners.gpus:
        device = (hardware.gpu_memory or ASSUMED_GPU_BYTES) * min(1.0, learners.gpus)
    else:
        device = _ram(learners, hardware, 0.0)
    return int(device * batch.memory_utilisation)


def ram_limit(recipe: Recipe, hardware: Hardware) -> int:
    """Bytes of RAM that a GPU learner may use: the share batch.memory_utilisation of its part of the machine.
    The RAM of a CPU learner is its device."""
    learners = recipe.learners
    return int(_ram(learners, hardware, learners.gpus) * recipe.batch.memory_utilisation)


def _ram(learners: Learners, hardware: Hardware, gpus: float) -> float:
    """RAM of a machine, divided by its learners."""
    group = WorkerGroup("learners", learners.count, learners.cpus_per_worker, gpus)
    # a head node may have no CPUs for workers
    hosts = [m for m in hardware.machines if m.holds(group)] or hardware.machines
    spread = -(-learners.count // len(hosts))
    return min(m.ram / min(learners.count, max(m.holds(group), spread)) for m in hosts)


def largest_micro_batch(steps: Sequence[Sequence[SequenceGroup]], cut: Cut) -> MicroBatch:
    """The micro-batch with the most positions in these steps."""
    chunks = (chunk for step in steps for rank in shares(step, cut) for chunk in rank)
    return pack(max(chunks, key=lambda chunk: positions_of(chunk, cut)), cut.layout, one_row=cut.one_row)


def first_steps(data: PlanInput) -> list[Sequence[SequenceGroup]]:
    """Examples of the first LOOK_AHEAD optimizer steps."""
    steps, cursor = [], 0
    for _ in range(min(LOOK_AHEAD, data.batches.steps_in(1.0))):
        steps.append(data.batches.at(cursor))
        cursor += len(steps[-1])
    return steps


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes that a rank may use."""

    device: int
    """Bytes of its device."""
    ram: int
    """Bytes of RAM, beside a GPU."""

    def hold(self, memory: MemoryEstimate) -> bool:
        """Whether an estimate is within the limits."""
        return memory.peak <= self.device and memory.ram <= self.ram


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compute the steps."""

    cut: Cut
    """Micro-batch, ZeRO stage and sync policy."""
    checkpointing: Checkpointing
    """What the backward computes again."""
    memory: MemoryEstimate
    """Predicted memory."""
    fits: bool
    """Whether the memory is within the limits."""
    seconds: float
    """Estimated time of an optimizer step, to compare ways; inf if it does not fit."""


@dataclass(frozen=True, slots=True)
class Work:
    """The inputs that every way is predicted from."""

    recipe: Recipe
    """The recipe."""
    algorithm: AlgorithmSpec
    """Its algorithm."""
    steps: Sequence[Sequence[SequenceGroup]]
    """Examples of the first steps."""
    model: MemoryModel
    """Predictor of memory and traffic."""
    limits: Limits
    """Bytes that a rank may use."""
    hardware: Hardware
    """The machines."""
    _largest: dict[Cut, MicroBatch] = field(default_factory=dict)
    """Largest micro-batch by cut at ZeRO 0, as the partitioning does not matter."""

    def way(self, cut: Cut, checkpointing: Checkpointing) -> Way:
        """The way of a cut and a checkpointing mode."""
        memory = self.model.estimate(cut, self.largest_micro_batch(cut), checkpointing)
        fits = self.limits.hold(memory)
        return Way(
            cut, checkpointing, memory, fits, self._seconds(cut, checkpointing) if fits else float("inf")
        )

    def largest_micro_batch(self, cut: Cut) -> MicroBatch:
        """The micro-batch with the most positions in the first steps."""
        bare = replace(cut, zero_stage=0, sync="no_sync")
        if bare not in self._largest:
            self._largest[bare] = largest_micro_batch(self.steps, cut)
        return self._largest[bare]

    def _seconds(self, cut: Cut, checkpointing: Checkpointing) -> float:
        """Estimated time of the first step: 6 FLOPs per parameter and position, recomputation, a cost per
        micro-batch, and communication."""
        learners, ranks = self.recipe.learners, shares(self.steps[0], cut)
        gpu, micro_batches = bool(learners.gpus), len(max(ranks, key=len))
        positions = max(sum(positions_of(chunk, cut) for chunk in rank) for rank in ranks)
        flops = 6 * self.model.sizes.all * positions * (1 + RECOMPUTED[checkpointing])
        sent = self.model.traffic(cut, micro_batches)
        wire = (sent.reduced * 2 + sent.gathered) / (self.hardware.link or (GPU_LINK if gpu else CPU_LINK))
        return (
            flops / (GPU_FLOPS if gpu else CPU_FLOPS * learners.cpus_per_worker)
            + (MICRO_BATCH_S * micro_batches if gpu else 0)
            + wire
        )

    def least_seconds(self, cut: Cut, checkpointing: Checkpointing) -> float:
        """Lower bound of the estimated time of a step: its micro-batches are as large as makes sense."""
        batch = self.recipe.batch
        auto = batch.micro_batch_tokens is None and batch.micro_batch == "auto"
        return self._seconds(
            replace(cut, positions=self._budgets(cut)[0])
            if auto
            else given(self.recipe, self.algorithm, cut),
            checkpointing,
        )

    def _budgets(self, cut: Cut) -> list[int]:
        """Sensible numbers of positions of a micro-batch, from most to least."""
        cap = GPU_POSITIONS if self.recipe.learners.gpus else CPU_POSITIONS
        most = max(positions_of(step, cut) for step in self.steps)
        longest = max(positions_of([g], cut) for step in self.steps for g in step)
        budgets = [max(longest, min(cap, -(-most // cut.workers)))]
        while budgets[-1] > 1.5 * longest:
            budgets.append(max(longest, budgets[-1] // 2))
        return budgets

    def largest(self, cut: Cut, checkpointing: Checkpointing) -> Way | None:
        """The way with the recipe's micro-batch, or with the largest that fits the predicted memory. None if
        none fits."""
        batch = self.recipe.batch
        if batch.micro_batch_tokens is not None or batch.micro_batch != "auto":
            way = self.way(given(self.recipe, self.algorithm, cut), checkpointing)
            return way if way.fits else None
        budgets = self._budgets(cut)
        if (
            not self.recipe.learners.gpus
            and (way := self.way(replace(cut, positions=budgets[0]), checkpointing)).fits
        ):
            return way  # on a CPU the largest rows take little time to predict, and mostly fit
        least = self.way(replace(cut, positions=budgets[-1]), checkpointing)
        if not least.fits:
            return None
        activations = max(0, least.memory.activations - 4 * self.model.sizes.largest)
        length = self.largest_micro_batch(least.cut).positions
        for positions in budgets[:-1]:
            candidate = replace(cut, positions=positions)
            more = activations * (self.largest_micro_batch(candidate).positions / length - 1) * MIN_GROWTH
            if self.recipe.learners.gpus and least.memory.total + more > self.limits.device:
                continue  # surely too large; a pass over as many positions as a GPU holds takes seconds
            if (way := self.way(candidate, checkpointing)).fits:
                return way
        return least


def ways_of(recipe: Recipe) -> list[tuple[int, Sync]]:
    """(ZeRO stage, sync policy) pairs that the recipe allows, from least to most traffic. Raises ConfigError
    if none is left."""
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
            f"learners.sync={sync} is not possible with this learners.precision, learners.fused and "
            "learners.offload",
            why=f"no way to partition is legal with learners.precision={learners.precision} and "
            f"learners.zero_stage={stage}",
            fix="set learners.sync=auto",
        )
    return ways


def modes_of(recipe: Recipe, possible: bool = True) -> tuple[Checkpointing, ...]:
    """Modes of checkpointing that the recipe allows. Raises ConfigError if the architecture does not have its
    mode.

    possible: whether the architecture supports checkpointing.
    """
    mode = recipe.learners.activation_checkpointing
    if not possible and mode not in ("auto", "none"):
        raise ConfigError(
            f"learners.activation_checkpointing={mode} is not possible with this model",
            why="transformers does not support it for this architecture",
            fix="set learners.activation_checkpointing=none, or auto",
        )
    if not possible:
        return ("none",)
    return ("none", "selective", "full") if mode == "auto" else (mode,)


def lowest_stage(learners: Learners) -> int:
    """Lowest ZeRO stage at which DeepSpeed can offload: 1 for the optimizer, 3 for parameters. Below, it
    ignores the setting or fails."""
    return 3 if learners.offload.parameters != "none" else 1 if learners.offload.optimizer != "none" else 0


def given(recipe: Recipe, algorithm: AlgorithmSpec, cut: Cut) -> Cut:
    """The cut with the recipe's micro-batch, at least one group, or with the smallest one if that is auto."""
    batch = recipe.batch
    if batch.micro_batch_tokens is not None:
        return replace(cut, positions=batch.micro_batch_tokens)
    if batch.micro_batch == "auto":
        return replace(cut, positions=1)
    return replace(cut, examples=max(1, batch.micro_batch // algorithm.group_examples))
