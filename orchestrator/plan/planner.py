"""From a recipe, its data and the hardware to a plan: how each optimizer step is cut, and why.

    lengths + effective batch + memory  ->  ZeRO stage, sync policy, layout, micro-batch  ->  arithmetic, memory, traffic

The plan may change how fast a step is, never what it computes.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.algorithms.table import AlgorithmSpec, build, kl_notes
from orchestrator.core.batches import Cut, Layout, PackedBatch, Sync
from orchestrator.core.errors import ConfigError, NotEnoughResources
from orchestrator.core.format import size
from orchestrator.data.bad_rows import grouped
from orchestrator.data.dataset import DataSet
from orchestrator.data.micro_batches import cut_step
from orchestrator.models.attention import capabilities
from orchestrator.models.forward import Checkpointing
from orchestrator.models.load import load_config
from orchestrator.plan.hardware import Hardware, this_machine
from orchestrator.plan.memory import MemoryEstimate, MemoryModel, Traffic
from orchestrator.plan.model_advice import advise
from orchestrator.plan.settle import one_gpu_each
from orchestrator.plan.state_bytes import Sizes
from orchestrator.plan.ways import (
    LEGAL_SYNC,
    Limits,
    Way,
    Work,
    first_steps,
    given,
    largest_micro_batch,
    lowest_stage,
    memory_limit,
    modes_of,
    ram_limit,
    ways_of,
)
from orchestrator.recipe.schema import ONLINE, Recipe

CHECKPOINTING_REASONS: dict[Checkpointing, str] = {
    "none": "activations fit the memory: nothing is computed again",
    "selective": "matrix products and attention are kept, the rest is computed again: a few per cent of a "
    "step, for larger micro-batches",
    "full": "only the inputs of layers are kept: a third more to compute, for micro-batches that would not "
    "fit or would be too small",
}
BAD_REASONS = 3
"""That a plan names."""
BINS = 10
"""Of the histogram of lengths."""
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
    """What the data turned into. histogram: (upper bound in tokens, rows) over equal bins of the lengths.
    unused: columns of the rows that no part of the run reads; notes: what else there is to know; turns: rows
    of the truncated that lost their oldest turns whole; reasons: of the bad rows, equal ones together."""

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
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    turns: int = 0
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """All that `orchestrator plan` shows. recipe: with activation_checkpointing decided; memory_limit,
    ram_limit: bytes that a rank may use of its device, and a GPU learner of the machine's RAM; mean_length:
    tokens, for FLOPs; parameters: of the model; warnings: what makes no sense, see plan/sense.py."""

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
    ram_limit: int
    traffic: Traffic
    mean_length: int
    sizes: Sizes
    """Parameters of the policy, tensor by tensor."""
    followed: bool = True
    """Whether activations were counted on a step without storage; False: by a formula."""
    warnings: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Of the policy, in all."""
        return self.sizes.all

    @property
    def is_online(self) -> bool:
        """Does a step of the run draw completions first?"""
        return self.algorithm in ONLINE

    def to_json(self) -> dict[str, Any]:
        plain = (
            "algorithm",
            "micro_batches",
            "total_steps",
            "arithmetic",
            "nearest",
            "memory_limit",
            "ram_limit",
            "mean_length",
        )
        return {
            **{name: getattr(self, name) for name in plain},
            "cut": asdict(self.cut),
            "choices": [asdict(c) for c in self.choices],
            "warnings": list(self.warnings),
            "data": asdict(self.data),
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "traffic": asdict(self.traffic),
            "followed": self.followed,
            "sizes": {"all": self.sizes.all, "learns": self.sizes.learns},
            "recipe": self.recipe.model_dump(mode="json"),
        }


def make_plan(
    recipe: Recipe, algorithm: AlgorithmSpec, data: DataSet, hardware: Hardware | None = None
) -> Plan:
    """The plan of a run on `hardware`, or on this machine; ConfigError or NotEnoughResources where it could
    not work."""
    hardware = hardware or this_machine()
    _check(recipe, algorithm.group_examples)
    learners = f"{recipe.learners.count} learner{'s' if recipe.learners.count > 1 else ''}"
    choices = [Choice("hardware", learners, f"on {hardware}")]
    layout = _layout(recipe, algorithm, choices)
    limits = Limits(memory_limit(recipe, hardware), ram_limit(recipe, hardware))
    work = Work(recipe, algorithm, first_steps(data), MemoryModel(recipe, algorithm), limits, hardware)
    way = _fit(work, layout, choices)
    cut, memory = way.cut, way.memory
    if not way.fits:
        raise _too_large(memory, limits)
    recipe, first = recipe.with_checkpointing(way.checkpointing), cut_step(work.steps[0], cut)
    micro_batches = len(first.micro_batches[0])
    sent = work.model.traffic(cut, micro_batches)
    choices += _communication(hardware, cut, sent)
    choices += [
        Choice(note.name, note.value, note.reason) for note in advise(recipe, algorithm, work.model, data)
    ]
    return Plan(
        recipe=recipe,
        algorithm=algorithm.name,
        cut=cut,
        micro_batches=micro_batches,
        total_steps=recipe.run.max_steps or data.batches.steps_in(recipe.run.epochs),
        arithmetic=_arithmetic(recipe.batch.effective, cut, first, algorithm),
        nearest=_nearest(recipe.batch.effective, cut, algorithm.group_examples),
        choices=tuple(choices),
        data=data_report(data, kl_notes(algorithm)),
        memory=memory,
        memory_limit=limits.device,
        ram_limit=limits.ram,
        traffic=sent,
        mean_length=max(1, sum(data.report.lengths) // len(data.report.lengths)),
        sizes=work.model.sizes,
        followed=not work.model.unpredicted,
    )


def _check(recipe: Recipe, share: int) -> None:
    learners, effective = recipe.learners, recipe.batch.effective
    one_gpu_each(recipe)
    if effective < learners.count * share:
        raise ConfigError(
            f"batch.effective={effective} cannot be cut over learners.workers={learners.count}",
            why="every worker needs at least one example of each optimizer step",
            fix=f"set learners.workers to {effective // share} or fewer, or batch.effective to "
            f"{learners.count * share} or more",
        )
    if learners.precision == "fp16" and not learners.gpus:
        raise ConfigError(
            "learners.precision=fp16 needs a GPU",
            why="DeepSpeed has no fp16 on a CPU",
            fix="use fp32, bf16 or bf16_autocast",
        )
    low = learners.precision in ("bf16", "fp16")
    if low and learners.zero_stage == 0:
        raise ConfigError(
            f"learners.precision={learners.precision} needs learners.zero_stage 1, 2 or 3",
            why="DeepSpeed keeps no fp32 accumulation buffer at stage 0",
            fix="set learners.zero_stage=1 (also right for one worker), or precision=bf16_autocast",
        )
    if learners.zero_stage != "auto" and learners.zero_stage < (lowest := lowest_stage(learners)):
        what = "parameters" if lowest == 3 else "optimizer"
        raise ConfigError(
            f"learners.offload.{what}=cpu is not possible at ZeRO stage {learners.zero_stage}",
            why="DeepSpeed offloads what it has partitioned",
            fix=f"set learners.zero_stage={lowest}, or auto",
        )
    if learners.fused and (learners.zero_stage == 3 or lowest_stage(learners) == 3):
        raise ConfigError(
            "learners.fused is not possible at ZeRO stage 3",
            why="its hooks gather every module's parameters, which breaks the compiled graph of each",
            fix="set learners.fused=false, or learners.zero_stage=2 without offload.parameters",
        )
    if learners.zero_stage != "auto" and learners.sync != "auto":
        _check_sync(learners.sync, learners.zero_stage, learners.precision)


def _check_sync(sync: Sync, stage: int, precision: str) -> None:
    if sync not in LEGAL_SYNC[stage]:
        raise ConfigError(
            f"learners.sync={sync} is not possible at ZeRO stage {stage}",
            why="partitioned gradients cannot be held back whole"
            if sync == "no_sync"
            else "DeepSpeed refuses it",
            fix=f"use one of {', '.join(LEGAL_SYNC[stage])}, or auto",
        )
    if sync == "coalesced" and precision in ("bf16", "fp16"):
        raise ConfigError(
            f"learners.sync=coalesced with precision={precision} would accumulate gradients in {precision}",
            why="DeepSpeed holds the parameters' own gradients until the end of the step",
            fix="use sync=no_sync at stage 1, per_micro_batch at stages 2 and 3, or precision=bf16_autocast",
        )


def _layout(recipe: Recipe, algorithm: AlgorithmSpec, choices: list[Choice]) -> Layout:
    config = load_config(recipe.model)
    can = capabilities(config.get_text_config())
    wanted = recipe.batch.layout
    shares = algorithm.branches > 1
    best: Layout = "prefix_shared" if shares else ("packed" if recipe.learners.gpus else "padded")
    if wanted != "auto":
        if wanted not in can.layouts:
            raise ConfigError(
                f"batch.layout={wanted} is not possible",
                why=can.reason,
                fix="set batch.layout=auto or padded",
            )
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


def _one_row(recipe: Recipe, layout: Layout) -> bool:
    """A GPU computes one long row under masks of blocks; on a CPU short rows are faster than a long one."""
    can = capabilities(load_config(recipe.model).get_text_config())
    return bool(recipe.learners.gpus) and layout != "padded" and can.blocks


def _fit(work: Work, layout: Layout, choices: list[Choice]) -> Way:
    """What takes least time by estimate of all that fits: where gradients and parameters lie, and what is
    computed again."""
    learners = work.recipe.learners
    ways, modes = ways_of(work.recipe), modes_of(work.recipe, work.model.checkpoints)
    whole = [
        Cut(learners.count, None, None, layout, stage, sync, one_row=_one_row(work.recipe, layout))
        for stage, sync in ways
    ]
    best, possible = None, []
    for mode in modes:
        for index, cut in enumerate(whole):
            if best is not None and work.least_seconds(cut, mode) >= best.seconds:
                possible.append(
                    index
                )  # it may fit, and cannot be quicker: its memory is not looked at, which takes seconds
            elif (found := work.largest(cut, mode)) is not None:
                possible.append(index)
                best = found if best is None or found.seconds < best.seconds else best
    if best is None:  # the caller says by how much
        return work.way(given(work.recipe, work.algorithm, whole[-1]), modes[-1])
    cut, lowest = best.cut, min(possible)
    at = ways.index((cut.zero_stage, cut.sync))
    why = (
        "the lowest stage whose state fits: fewest collectives"
        if at == 0
        else "what needs fewer bytes on the wire does not fit the memory"
        if at == lowest
        else "quicker by estimate than a lower stage, which leaves room for smaller micro-batches or has to "
        "compute more again"
    )
    choices.append(
        Choice(
            "ZeRO stage", str(cut.zero_stage), why if learners.zero_stage == "auto" else "set in the recipe"
        )
    )
    choices.append(
        Choice(
            "sync",
            cut.sync,
            ("set in the recipe; " if learners.sync != "auto" else "") + SYNC_REASONS[cut.sync],
        )
    )
    why = (
        "set in the recipe"
        if learners.activation_checkpointing != "auto"
        else CHECKPOINTING_REASONS[best.checkpointing]
    )
    choices.append(Choice("checkpointing", best.checkpointing, why))
    choices.append(_micro_batch_choice(work.recipe, cut))
    return best


def _too_large(memory: MemoryEstimate, limits: Limits) -> NotEnoughResources:
    parts = ", ".join(f"{name} {size(value)}" for name, value in memory.parts.items() if value)
    fix = (
        "more learners.workers with a higher learners.zero_stage, a smaller batch.micro_batch, "
        "learners.activation_checkpointing=full, or learners.offload.optimizer=cpu"
    )
    if memory.ram > limits.ram:
        why = (
            f"{size(memory.ram)} of RAM for each, to load the model in fp32 or to keep "
            f"{size(memory.offloaded)} offloaded"
        )
        return NotEnoughResources(
            f"a worker may use {size(limits.ram)} of the machine's RAM",
            why=why,
            fix="fewer workers on a machine, or more RAM",
        )
    if memory.total <= limits.device:
        why = "it comes whole and in fp32 to every worker before DeepSpeed partitions it"
        return NotEnoughResources(
            f"loading the model takes {size(memory.loading)} of a worker, it may use {size(limits.device)}",
            why=why,
            fix="larger devices",
        )
    return NotEnoughResources(
        f"a worker needs about {size(memory.total)}, it may use {size(limits.device)}", why=parts, fix=fix
    )


def finer_cut(plan: Plan, data: DataSet, cut: Cut) -> Cut:
    """The cut to try where `cut` took more memory than was predicted: smaller micro-batches, and where they
    cannot be smaller the next way to partition that fits by prediction. None of it changes a result.
    NotEnoughResources where nothing is left."""
    recipe, steps = plan.recipe, first_steps(data)
    now, finer = largest_micro_batch(steps, cut).positions, cut.halved()
    while finer != cut and largest_micro_batch(steps, finer).positions >= now and finer != finer.halved():
        finer = finer.halved()
    if largest_micro_batch(steps, finer).positions < now:
        return finer
    algorithm, limits = build(recipe.algorithm, recipe.rollouts), Limits(plan.memory_limit, plan.ram_limit)
    model, ways = MemoryModel(recipe, algorithm), ways_of(recipe)
    here = (cut.zero_stage, cut.sync)
    largest = largest_micro_batch(steps, cut)
    memory = model.estimate(cut, largest, recipe.learners.checkpointing)
    for stage, sync in ways[ways.index(here) + 1 :] if here in ways else ():
        other = replace(cut, zero_stage=stage, sync=sync)
        found = model.estimate(other, largest, recipe.learners.checkpointing)
        if limits.hold(found) and found.total < memory.total:
            return other
    raise NotEnoughResources(
        f"the smallest micro-batch, {now} positions, does not fit at ZeRO {cut.zero_stage} ({cut.sync}), "
        "and no other way to partition is left",
        why=", ".join(f"{name} {size(value)}" for name, value in memory.parts.items() if value)
        + f" by prediction, of {size(limits.device)}",
        fix="more learners.workers, learners.activation_checkpointing=full, learners.offload.optimizer=cpu, "
        "or a shorter data.max_length",
    )


def _communication(hardware: Hardware, cut: Cut, sent: Traffic) -> list[Choice]:
    """How long the workers of a step talk at least, where the bandwidth is known."""
    if cut.workers == 1 or not hardware.link:
        return []
    share = 2 * (cut.workers - 1) / cut.workers  # an all-reduce sends and receives each byte about twice
    seconds = (share * sent.reduced + share / 2 * sent.gathered) / hardware.link
    where = (
        f"between {len(hardware.machines)} machines" if len(hardware.machines) > 1 else "within the machine"
    )
    what = (
        f"{size(sent.reduced)} reduced, {size(sent.gathered)} gathered, {hardware.link / 1e9:.3g} GB/s "
        f"{where} ({hardware.source})"
    )
    return [Choice("communication", f"at least {seconds:.3g} s a step", what)]


def _micro_batch_choice(recipe: Recipe, cut: Cut) -> Choice:
    if cut.examples is not None:
        return Choice("micro-batch", f"{cut.examples} examples", "set in the recipe")
    if recipe.batch.micro_batch_tokens is not None:
        return Choice("micro-batch", f"{cut.positions} positions", "set in the recipe")
    return Choice(
        "micro-batch",
        f"{cut.positions} positions",
        "fits the predicted memory, which a probe checks where it is tight",
    )


def _arithmetic(effective: int, cut: Cut, first: PackedBatch, algorithm: AlgorithmSpec) -> str:
    """Example: 256 pairs = 2 workers x 16 micro-batches x 8 pairs."""
    count = len(first.micro_batches[0])
    unit = {"pair": "pairs", "token": "examples", "example": "examples", "sequence": "completions"}[
        algorithm.loss_unit
    ]
    workers = f"{cut.workers} worker{'s' if cut.workers > 1 else ''}"
    batches = f"{count} micro-batch{'es' if count > 1 else ''}"
    each = None if cut.examples is None else cut.examples * algorithm.group_examples
    if each is not None and cut.workers * count * each == effective:
        return f"{effective} {unit} = {workers} × {batches} × {each} {unit}"
    bound = f"{each} {unit}" if each is not None else f"{cut.positions} positions"
    return f"{effective} {unit} = {workers} × {batches} of at most {bound}, all divided once by {effective}"


def _nearest(effective: int, cut: Cut, share: int) -> tuple[int, ...]:
    """Effective batches next to this one that divide evenly into full micro-batches; empty where it does
    itself."""
    if cut.examples is None or effective % (unit := cut.workers * cut.examples * share) == 0:
        return ()
    below = effective // unit * unit
    return tuple(n for n in (below, below + unit) if n)


def data_report(data: DataSet, notes: tuple[str, ...] = ()) -> DataReport:
    """What `plan` shows of the data; notes: what the algorithm adds to those of the data."""
    report = data.report
    top = max(report.lengths)
    width = max(1, -(-top // BINS))
    counts = [0] * BINS
    for length in report.lengths:
        counts[min(BINS - 1, (length - 1) // width)] += 1
    return DataReport(
        rows=report.rows,
        bad=tuple(str(row) for row in (*data.loaded.bad, *report.bad)),
        reasons=tuple(grouped((*data.loaded.bad, *report.bad), BAD_REASONS)),
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
        unused=data.unused,
        notes=(*data.notes, *notes),
        turns=report.turns,
    )
