"""From a recipe, its data and the hardware to a plan: how each optimizer step is cut, and why.

    lengths + effective batch + memory  ->  ZeRO stage, sync policy, layout, micro-batch  ->  arithmetic, memory, traffic

The plan may change how fast a step is, never what it computes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.algorithms import Algorithm
from orchestrator.config import Recipe
from orchestrator.cut import cut_step
from orchestrator.data.packing import cost
from orchestrator.dataset import DataSet
from orchestrator.errors import ConfigError, NotEnoughResources
from orchestrator.facts import WorkerGroup
from orchestrator.hardware import Hardware, this_machine
from orchestrator.memory_model import MemoryEstimate, Traffic, estimate, traffic
from orchestrator.models.attention import capabilities
from orchestrator.models.load import load_config
from orchestrator.records import Cut, Layout, MicroBatch, PackedBatch, SequenceGroup, Sync
from orchestrator.words import size

LOOK_AHEAD = 8
"""Steps whose largest micro-batch stands for the run's."""
CPU_POSITIONS = 2048
"""Micro-batches above this many positions were not faster on a CPU: their activations leave the caches
(benchmarks/seed_arithmetic.py)."""
GPU_POSITIONS = 65536
ASSUMED_GPU_BYTES = 80_000_000_000
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
"""What `auto` tries in turn: one reduction of the gradients; the same with partitioned moments; with partitioned gradients; a
reduction per micro-batch; and all parameters gathered twice per micro-batch. Each needs less memory than the one before."""
SYNC_REASONS: dict[Sync, str] = {
    "no_sync": "gradients stay on the rank until the step: one reduction instead of one per micro-batch",
    "coalesced": "whole gradients are held back and reduced once at the end of the step",
    "per_micro_batch": "gradients are partitioned after every micro-batch: less memory, more traffic",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision in words. Example: Choice("sync", "no_sync", "one reduction per step …")."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class DataReport:
    """What the data turned into. histogram: (upper bound in tokens, rows) over equal bins of the lengths."""

    rows: int
    bad: tuple[str, ...]
    kept: int
    dropped: int
    truncated: int
    made_identical: int
    not_prefix: int
    formats: tuple[str, ...]
    sources: tuple[str, ...]
    held_out: int
    quantiles: dict[str, int]
    histogram: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All that `orchestrator plan` shows. memory_limit: bytes a rank may use; mean_length: tokens, for FLOPs."""

    recipe: Recipe
    algorithm: str
    cut: Cut
    micro_batches: int
    total_steps: int
    arithmetic: str
    nearest: tuple[int, ...]
    choices: tuple[Choice, ...]
    data: DataReport
    memory: MemoryEstimate
    memory_limit: int
    traffic: Traffic
    mean_length: int

    def to_json(self) -> dict[str, Any]:
        plain = ("algorithm", "micro_batches", "total_steps", "arithmetic", "nearest", "memory_limit", "mean_length")
        return {
            **{name: getattr(self, name) for name in plain},
            "cut": asdict(self.cut),
            "choices": [asdict(c) for c in self.choices],
            "data": asdict(self.data),
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "traffic": asdict(self.traffic),
            "recipe": self.recipe.model_dump(mode="json"),
        }


def make_plan(recipe: Recipe, algorithm: Algorithm, data: DataSet, hardware: Hardware | None = None) -> Plan:
    """The plan of a run on `hardware`, or on this machine; ConfigError or NotEnoughResources where it could not work."""
    hardware = hardware or this_machine()
    _check(recipe, algorithm.group_examples)
    learners = f"{recipe.learners.count} learner{'s' if recipe.learners.count > 1 else ''}"
    choices = [Choice("hardware", learners, f"on {hardware}")]
    layout = _layout(recipe, algorithm, choices)
    steps = first_steps(data)
    limit = memory_limit(recipe, hardware)
    cut = _fit(recipe, algorithm, steps, layout, limit, choices)
    first = cut_step(steps[0], cut)
    largest = largest_micro_batch(steps, cut)
    memory = estimate(recipe, algorithm, cut, largest)
    if memory.total > limit:
        raise NotEnoughResources(
            f"a worker needs about {size(memory.total)}, it may use {size(limit)}",
            why=", ".join(f"{name} {size(value)}" for name, value in asdict(memory).items() if value),
            fix="more learners.workers with a higher learners.zero_stage, a smaller batch.micro_batch, "
            "learners.activation_checkpointing=true, or learners.offload.optimizer=cpu",
        )
    micro_batches = len(first.micro_batches[0])
    sent = traffic(recipe, algorithm, cut, micro_batches)
    choices += _communication(hardware, cut, sent)
    return Plan(
        recipe=recipe,
        algorithm=algorithm.name,
        cut=cut,
        micro_batches=micro_batches,
        total_steps=recipe.run.max_steps or data.batches.steps_in(recipe.run.epochs),
        arithmetic=_arithmetic(recipe.batch.effective, cut, first, algorithm),
        nearest=_nearest(recipe.batch.effective, cut, algorithm.group_examples),
        choices=tuple(choices),
        data=_data_report(data),
        memory=memory,
        memory_limit=limit,
        traffic=sent,
        mean_length=max(1, sum(data.report.lengths) // len(data.report.lengths)),
    )


def memory_limit(recipe: Recipe, hardware: Hardware) -> int:
    """Bytes a worker may use: batch.memory_utilisation of the recipe's limit, of the GPU, or of its share of a machine's RAM."""
    batch, learners = recipe.batch, recipe.learners
    if batch.memory_limit_gb is not None:
        device = batch.memory_limit_gb * 1e9
    elif learners.gpus_per_worker:
        device = (hardware.gpu_memory or ASSUMED_GPU_BYTES) * min(1.0, learners.gpus_per_worker)
    else:
        group = WorkerGroup("learners", learners.count, learners.cpus_per_worker, 0.0)
        hosts = [m for m in hardware.machines if m.holds(group)] or hardware.machines  # a head may have no CPUs to give out
        spread = -(-learners.count // len(hosts))
        device = min(m.ram / min(learners.count, max(m.holds(group), spread)) for m in hosts)
    return int(device * batch.memory_utilisation)


def largest_micro_batch(steps: Sequence[Sequence[SequenceGroup]], cut: Cut) -> MicroBatch:
    """The micro-batch with most positions among these steps."""
    return max((mb for step in steps for rank in cut_step(step, cut).micro_batches for mb in rank), key=lambda mb: mb.positions)


def first_steps(data: DataSet) -> list[Sequence[SequenceGroup]]:
    """The examples of the first optimizer steps."""
    steps, cursor = [], 0
    for _ in range(min(LOOK_AHEAD, data.batches.steps_in(1.0))):
        steps.append(data.batches.at(cursor))
        cursor += len(steps[-1])
    return steps


def _check(recipe: Recipe, share: int) -> None:
    learners, effective = recipe.learners, recipe.batch.effective
    _one_gpu_each(recipe)
    if effective < learners.count * share:
        raise ConfigError(
            f"batch.effective={effective} cannot be cut over learners.workers={learners.count}",
            why="every worker needs at least one example of each optimizer step",
            fix=f"set learners.workers to {effective // share} or fewer, or batch.effective to {learners.count * share} or more",
        )
    if learners.precision == "fp16" and not learners.gpus_per_worker:
        raise ConfigError("learners.precision=fp16 needs a GPU", why="DeepSpeed has no fp16 on a CPU", fix="use fp32, bf16 or bf16_autocast")
    low = learners.precision in ("bf16", "fp16")
    if low and learners.zero_stage == 0:
        raise ConfigError(
            f"learners.precision={learners.precision} needs learners.zero_stage 1, 2 or 3",
            why="DeepSpeed keeps no fp32 accumulation buffer at stage 0",
            fix="set learners.zero_stage=1 (also right for one worker), or precision=bf16_autocast",
        )
    if learners.zero_stage != "auto" and learners.sync != "auto":
        _check_sync(learners.sync, learners.zero_stage, learners.precision)


def _check_sync(sync: Sync, stage: int, precision: str) -> None:
    if sync not in LEGAL_SYNC[stage]:
        raise ConfigError(
            f"learners.sync={sync} is not possible at ZeRO stage {stage}",
            why="partitioned gradients cannot be held back whole" if sync == "no_sync" else "DeepSpeed refuses it",
            fix=f"use one of {', '.join(LEGAL_SYNC[stage])}, or auto",
        )
    if sync == "coalesced" and precision in ("bf16", "fp16"):
        raise ConfigError(
            f"learners.sync=coalesced with precision={precision} would accumulate gradients in {precision}",
            why="DeepSpeed holds the parameters' own gradients until the end of the step",
            fix="use sync=no_sync at stage 1, per_micro_batch at stages 2 and 3, or precision=bf16_autocast",
        )


def _layout(recipe: Recipe, algorithm: Algorithm, choices: list[Choice]) -> Layout:
    config = load_config(recipe.model)
    can = capabilities(config.get_text_config())
    wanted = recipe.batch.layout
    shares = algorithm.branches > 1
    best: Layout = "prefix_shared" if shares else ("packed" if recipe.learners.gpus_per_worker else "padded")
    if wanted != "auto":
        if wanted not in can.layouts:
            raise ConfigError(f"batch.layout={wanted} is not possible", why=can.reason, fix="set batch.layout=auto or padded")
        choices.append(Choice("layout", wanted, "set in the recipe"))
        return wanted
    if best not in can.layouts:
        choices.append(Choice("layout", "padded", can.reason))
        return "padded"
    reasons = {
        "prefix_shared": "each prompt is computed once for its branches",
        "packed": "no padding",
        "padded": "one branch per example and sorted lengths: next to no padding, and no mask on a CPU",
    }
    choices.append(Choice("layout", best, reasons[best]))
    return best


def _fit(recipe: Recipe, algorithm: Algorithm, steps: list[Sequence[SequenceGroup]], layout: Layout, limit: int, choices: list[Choice]) -> Cut:
    """The first of the ways to partition that fits, from least to most communication, and the micro-batch."""
    learners = recipe.learners
    ways = _ways(recipe)
    for stage, sync in ways:
        whole = Cut(learners.count, None, None, layout, stage, sync)
        cut = _budget(recipe, algorithm, steps, whole, limit)
        if cut is not None:
            break
    else:
        cut = _given(recipe, algorithm, whole)  # nothing fits: the caller says by how much
    first = (cut.zero_stage, cut.sync) == ways[0]
    why = "the lowest stage whose state fits: fewest collectives" if first else "what needs fewer bytes on the wire does not fit the memory"
    choices.append(Choice("ZeRO stage", str(cut.zero_stage), why if learners.zero_stage == "auto" else "set in the recipe"))
    choices.append(Choice("sync", cut.sync, ("set in the recipe; " if learners.sync != "auto" else "") + SYNC_REASONS[cut.sync]))
    choices.append(_micro_batch_choice(recipe, cut))
    return cut


def _ways(recipe: Recipe) -> list[tuple[int, Sync]]:
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
    if not ways:
        raise ConfigError(f"learners.sync={sync} is not possible with precision={learners.precision}", fix="set learners.sync=auto")
    return ways


def _communication(hardware: Hardware, cut: Cut, sent: Traffic) -> list[Choice]:
    """How long the workers of a step talk at least, where the bandwidth is known."""
    if cut.workers == 1 or not hardware.link:
        return []
    share = 2 * (cut.workers - 1) / cut.workers  # an all-reduce sends and receives each byte about twice
    seconds = (share * sent.reduced + share / 2 * sent.gathered) / hardware.link
    where = f"between {len(hardware.machines)} machines" if len(hardware.machines) > 1 else "within the machine"
    what = f"{size(sent.reduced)} reduced, {size(sent.gathered)} gathered, {hardware.link / 1e9:.3g} GB/s {where} ({hardware.source})"
    return [Choice("communication", f"at least {seconds:.3g} s a step", what)]


def _budget(recipe: Recipe, algorithm: Algorithm, steps: list[Sequence[SequenceGroup]], cut: Cut, limit: int) -> Cut | None:
    """The cut with the recipe's micro-batch, or with the largest that fits the predicted memory; None where nothing does."""
    batch = recipe.batch

    def fits(candidate: Cut) -> bool:
        return estimate(recipe, algorithm, candidate, largest_micro_batch(steps, candidate)).total <= limit

    if batch.micro_batch_tokens is not None or batch.micro_batch != "auto":
        given = _given(recipe, algorithm, cut)
        return given if fits(given) else None
    cap = GPU_POSITIONS if recipe.learners.gpus_per_worker else CPU_POSITIONS
    most = max(cost(list(step), cut.layout) for step in steps)
    longest = max(cost([g], cut.layout) for step in steps for g in step)
    positions = max(longest, min(cap, -(-most // cut.workers)))
    while True:
        candidate = replace(cut, positions=positions)
        if fits(candidate):
            return candidate
        if positions <= longest:
            return None
        positions = max(longest, positions // 2)


def _given(recipe: Recipe, algorithm: Algorithm, cut: Cut) -> Cut:
    """The cut with the recipe's micro-batch (at least one group), or with the smallest one where that is left to the plan."""
    batch = recipe.batch
    if batch.micro_batch_tokens is not None:
        return replace(cut, positions=batch.micro_batch_tokens)
    return replace(cut, positions=1) if batch.micro_batch == "auto" else replace(cut, examples=max(1, batch.micro_batch // algorithm.group_examples))


def _micro_batch_choice(recipe: Recipe, cut: Cut) -> Choice:
    if cut.examples is not None:
        return Choice("micro-batch", f"{cut.examples} examples", "set in the recipe")
    if recipe.batch.micro_batch_tokens is not None:
        return Choice("micro-batch", f"{cut.positions} positions", "set in the recipe")
    return Choice("micro-batch", f"{cut.positions} positions", "the predicted memory fits; a probe step checks it before training")


def _arithmetic(effective: int, cut: Cut, first: PackedBatch, algorithm: Algorithm) -> str:
    """Example: 256 pairs = 2 workers x 16 micro-batches x 8 pairs."""
    count = len(first.micro_batches[0])
    unit = {"pair": "pairs", "token": "examples", "example": "examples", "sequence": "completions"}[algorithm.per]
    workers = f"{cut.workers} worker{'s' if cut.workers > 1 else ''}"
    batches = f"{count} micro-batch{'es' if count > 1 else ''}"
    each = None if cut.examples is None else cut.examples * algorithm.group_examples
    if each is not None and cut.workers * count * each == effective:
        return f"{effective} {unit} = {workers} × {batches} × {each} {unit}"
    bound = f"{each} {unit}" if each is not None else f"{cut.positions} positions"
    return f"{effective} {unit} = {workers} × {batches} of at most {bound}, all divided once by {effective}"


def _nearest(effective: int, cut: Cut, share: int) -> tuple[int, ...]:
    """Effective batches next to this one that divide evenly into full micro-batches; empty where it does itself."""
    if cut.examples is None or effective % (unit := cut.workers * cut.examples * share) == 0:
        return ()
    below = effective // unit * unit
    return tuple(n for n in (below, below + unit) if n)


def _data_report(data: DataSet) -> DataReport:
    report, bins = data.report, 10
    top = max(report.lengths)
    width = max(1, -(-top // bins))
    counts = [0] * bins
    for length in report.lengths:
        counts[min(bins - 1, (length - 1) // width)] += 1
    return DataReport(
        rows=report.rows,
        bad=tuple(f"{b.where}: {b.reason}" for b in data.loaded.bad),
        kept=report.kept,
        dropped=report.dropped,
        truncated=report.truncated,
        made_identical=report.identical,
        not_prefix=len(report.not_prefix),
        formats=data.loaded.formats,
        sources=data.loaded.names,
        held_out=len(data.held_out),
        quantiles=report.quantiles(),
        histogram=tuple(((i + 1) * width, n) for i, n in enumerate(counts) if n),
    )


def _one_gpu_each(recipe: Recipe) -> None:
    """ConfigError where a process is given more than the one GPU that it computes on: the rest would be reserved and lie idle."""
    asked = {
        "learners.gpus_per_worker": recipe.learners.gpus_per_worker,
        "critic.gpus_per_worker": recipe.critic.gpus_per_worker,
        "rollouts.gpus_per_worker": recipe.rollouts.gpus_per_worker,
        **{f"rewards.functions, gpus of {function.name}": function.gpus for function in recipe.rewards.functions},
    }
    for key, gpus in asked.items():
        if gpus > 1:
            raise ConfigError(
                f"{key} is {gpus:g}, and a worker computes on one GPU",
                why="each worker is one process on one device; what is beyond it would be reserved and lie idle",
                fix="set it to 1, or to a part of a GPU such as 0.5, and take more workers: the effective batch stays as it is",
            )
    beside = recipe.rollouts.gpus_per_worker if recipe.rollouts.placement == "colocated" else 0.0
    learners, critic = recipe.learners, recipe.critic
    ranks = (("learners", learners.count, learners.gpus_per_worker, beside), ("critic", critic.workers, critic.gpus_per_worker, 0.0))
    for section, workers, gpus, others in ranks:
        if workers > 1 and gpus > 0 and gpus + others <= 0.5:
            raise ConfigError(
                f"{section}.gpus_per_worker={gpus:g} puts two of {workers} workers on one GPU",
                why="NCCL takes one rank per GPU",
                fix=f"set {section}.gpus_per_worker above 0.5, or {section}.workers=1",
            )
