"""Planning: a recipe, its data and the hardware to a `Plan`, which says how each optimizer step is cut, and
why.

    lengths, effective batch, memory -> layout, ZeRO stage, sync policy, checkpointing, micro-batch
                                     -> arithmetic, memory, traffic

A plan may change how fast a step is, never its result.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.algorithms.table import AlgorithmSpec, build, kl_notes
from orchestrator.core.batches import Cut, Layout, PackedBatch, Sync
from orchestrator.core.errors import ConfigError, NotEnoughResources
from orchestrator.core.format import size
from orchestrator.data.dataset import PlanInput
from orchestrator.data.micro_batches import cut_step
from orchestrator.models.attention import capabilities
from orchestrator.models.forward import Checkpointing
from orchestrator.models.load import load_config
from orchestrator.plan.checks import check_learners
from orchestrator.plan.choice import Choice
from orchestrator.plan.data_report import DataReport, data_report
from orchestrator.plan.hardware import Hardware, this_machine
from orchestrator.plan.memory import MemoryEstimate, MemoryModel, Traffic
from orchestrator.plan.model_advice import advise
from orchestrator.plan.state_bytes import Sizes
from orchestrator.plan.ways import (
    Limits,
    Way,
    Work,
    first_steps,
    given,
    largest_micro_batch,
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
    "full": "only the inputs of layers are kept: a third more to compute, for micro-batches that otherwise "
    "would not fit or would be too small",
}
SYNC_REASONS: dict[Sync, str] = {
    "no_sync": "gradients stay on the rank until the step: one reduction instead of one per micro-batch",
    "coalesced": "whole gradients are held back and reduced once at the end of the step",
    "per_micro_batch": "gradients are partitioned after every micro-batch: less memory, more traffic",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run: all that `orchestrator plan` prints."""

    recipe: Recipe
    """The recipe, with activation_checkpointing decided."""
    algorithm: str
    """Name of the algorithm."""
    cut: Cut
    """How each optimizer step is cut."""
    micro_batches: int
    """Micro-batches of the first step on each worker."""
    total_steps: int
    """Steps of the run: optimizer steps, or online rollout batches."""
    arithmetic: str
    """The effective batch as a product. Example: "256 pairs = 2 workers × 16 micro-batches × 8 pairs"."""
    nearest: tuple[int, ...]
    """Effective batches next to this one that divide evenly. Empty if it does."""
    choices: tuple[Choice, ...]
    """Decisions with their reasons."""
    data: DataReport
    """Rows and lengths."""
    memory: MemoryEstimate
    """Predicted memory of a worker."""
    memory_limit: int
    """Bytes that a worker may use of its device."""
    ram_limit: int
    """Bytes that a GPU learner may use of its machine's RAM."""
    traffic: Traffic
    """Bytes per worker and step."""
    mean_length: int
    """Mean tokens of a row, for FLOPs."""
    sizes: Sizes
    """Parameters of the policy, tensor by tensor."""
    followed: bool = True
    """Whether activations were counted on a step without storage; False: by a formula."""
    warnings: tuple[str, ...] = ()
    """Settings that make no sense with this model and data (plan/sanity.py)."""

    @property
    def parameters(self) -> int:
        """Number of parameters of the policy."""
        return self.sizes.all

    @property
    def is_online(self) -> bool:
        """Whether a step of the run samples completions first."""
        return self.algorithm in ONLINE

    def to_json(self) -> dict[str, Any]:
        """The plan as `orchestrator plan --json` prints it."""
        values = (
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
            **{name: getattr(self, name) for name in values},
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
    recipe: Recipe, algorithm: AlgorithmSpec, data: PlanInput, hardware: Hardware | None = None
) -> Plan:
    """The plan of a run on `hardware`, or on this machine. Raises ConfigError or NotEnoughResources if the
    run could not work."""
    hardware = hardware or this_machine()
    check_learners(recipe, algorithm.group_examples)
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
    choices += advise(recipe, algorithm, work.model, data)
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


def _layout(recipe: Recipe, algorithm: AlgorithmSpec, choices: list[Choice]) -> Layout:
    """The layout of micro-batches. Adds the reason to `choices`."""
    config = load_config(recipe.model)
    supported = capabilities(config.get_text_config())
    wanted = recipe.batch.layout
    best: Layout = (
        "prefix_shared" if algorithm.branches > 1 else ("packed" if recipe.learners.gpus else "padded")
    )
    if wanted != "auto":
        if wanted not in supported.layouts:
            raise ConfigError(
                f"batch.layout={wanted} is not possible",
                why=supported.reason,
                fix="set batch.layout=auto or padded",
            )
        choices.append(Choice("layout", wanted, "set in the recipe"))
        return wanted
    if best not in supported.layouts:
        choices.append(Choice("layout", "padded", supported.reason))
        return "padded"
    reasons = {
        "prefix_shared": "each prompt is computed once for its branches",
        "packed": "no padding",
        "padded": "one branch per example and sorted lengths: next to no padding, and no mask on a CPU",
    }
    choices.append(Choice("layout", best, reasons[best]))
    return best


def _one_row(recipe: Recipe, layout: Layout) -> bool:
    """Whether micro-batches are one long row under block masks, as is fastest on a GPU. On a CPU short rows
    are faster."""
    supported = capabilities(load_config(recipe.model).get_text_config())
    return bool(recipe.learners.gpus) and layout != "padded" and supported.blocks


def _fit(work: Work, layout: Layout, choices: list[Choice]) -> Way:
    """The way that is quickest by estimate among those that fit: a ZeRO stage, a sync policy, and what is
    computed again. Adds the reasons to `choices`."""
    learners = work.recipe.learners
    ways, modes = ways_of(work.recipe), modes_of(work.recipe, work.model.checkpoints)
    cuts = [
        Cut(learners.count, None, None, layout, stage, sync, one_row=_one_row(work.recipe, layout))
        for stage, sync in ways
    ]
    best, possible = None, []
    for mode in modes:
        for index, cut in enumerate(cuts):
            if best is not None and work.least_seconds(cut, mode) >= best.seconds:
                # it cannot be quicker, so its memory is not predicted, which takes seconds: it may fit
                possible.append(index)
            elif (way := work.largest(cut, mode)) is not None:
                possible.append(index)
                best = way if best is None or way.seconds < best.seconds else best
    if best is None:  # the caller raises the error, with the memory of this way
        return work.way(given(work.recipe, work.algorithm, cuts[-1]), modes[-1])
    cut, lowest = best.cut, min(possible)
    at = ways.index((cut.zero_stage, cut.sync))
    why = (
        "the lowest stage whose state fits: fewest collectives"
        if at == 0
        else "ways with less traffic do not fit the memory"
        if at == lowest
        else "quicker by estimate than a lower stage, which would need smaller micro-batches or more "
        "recomputation"
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
    """Error for a run that does not fit, with the smallest estimate that was found."""
    parts = ", ".join(f"{name} {size(value)}" for name, value in memory.parts.items() if value)
    if memory.ram > limits.ram:
        return NotEnoughResources(
            f"a worker needs {size(memory.ram)} of RAM, and may use {size(limits.ram)} of its machine's",
            why=f"it loads the model in fp32, or keeps {size(memory.offloaded)} of offloaded state",
            fix="run fewer workers on a machine, or use machines with more RAM",
        )
    if memory.total <= limits.device:
        return NotEnoughResources(
            f"a worker needs {size(memory.loading)} to load the model, and may use {size(limits.device)}",
            why="every worker loads the whole model in fp32 before DeepSpeed partitions it",
            fix="use larger devices",
        )
    return NotEnoughResources(
        f"a worker needs about {size(memory.total)}, and may use {size(limits.device)}",
        why=parts,
        fix="use more learners.workers with a higher learners.zero_stage, a smaller batch.micro_batch, "
        "learners.activation_checkpointing=full, or learners.offload.optimizer=cpu",
    )


def finer_cut(plan: Plan, data: PlanInput, cut: Cut) -> Cut:
    """The cut to try after `cut` took more memory than predicted. It does not change a result.

    Micro-batches get smaller. If they cannot, the next way to partition that fits by prediction is taken.
    Raises NotEnoughResources if there is none.
    """
    recipe, steps = plan.recipe, first_steps(data)
    now, finer = largest_micro_batch(steps, cut).positions, cut.halved()
    while finer != cut and largest_micro_batch(steps, finer).positions >= now and finer != finer.halved():
        finer = finer.halved()
    if largest_micro_batch(steps, finer).positions < now:
        return finer
    algorithm, limits = build(recipe.algorithm, recipe.rollouts), Limits(plan.memory_limit, plan.ram_limit)
    model, ways = MemoryModel(recipe, algorithm), ways_of(recipe)
    current = (cut.zero_stage, cut.sync)
    largest = largest_micro_batch(steps, cut)
    memory = model.estimate(cut, largest, recipe.learners.checkpointing)
    for stage, sync in ways[ways.index(current) + 1 :] if current in ways else ():
        other = replace(cut, zero_stage=stage, sync=sync)
        estimate = model.estimate(other, largest, recipe.learners.checkpointing)
        if limits.hold(estimate) and estimate.total < memory.total:
            return other
    raise NotEnoughResources(
        f"the smallest micro-batch, {now} positions, does not fit at ZeRO {cut.zero_stage} ({cut.sync}), "
        "and no other way to partition is left",
        why=", ".join(f"{name} {size(value)}" for name, value in memory.parts.items() if value)
        + f" by prediction, of {size(limits.device)}",
        fix="use more learners.workers, learners.activation_checkpointing=full, "
        "learners.offload.optimizer=cpu, or a shorter data.max_length",
    )


def _communication(hardware: Hardware, cut: Cut, sent: Traffic) -> list[Choice]:
    """Least time that the workers communicate in a step, if the bandwidth is known."""
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
    """The micro-batch and who decided it."""
    if cut.examples is not None:
        return Choice("micro-batch", f"{cut.examples} examples", "set in the recipe")
    if recipe.batch.micro_batch_tokens is not None:
        return Choice("micro-batch", f"{cut.positions} positions", "set in the recipe")
    return Choice(
        "micro-batch",
        f"{cut.positions} positions",
        "fits the predicted memory; a probe step checks it if it is tight",
    )


def _arithmetic(effective: int, cut: Cut, first: PackedBatch, algorithm: AlgorithmSpec) -> str:
    """The effective batch as a product. Example: 256 pairs = 2 workers × 16 micro-batches × 8 pairs."""
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


def _nearest(effective: int, cut: Cut, group_examples: int) -> tuple[int, ...]:
    """Effective batches next to this one that divide evenly into full micro-batches. Empty if it does."""
    if cut.examples is None or effective % (unit := cut.workers * cut.examples * group_examples) == 0:
        return ()
    below = effective // unit * unit
    return tuple(n for n in (below, below + unit) if n)
