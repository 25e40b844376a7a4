"""What happens between building the workers and the first step: reference log-probs, checks, the memory
probe."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.cluster.ranks import Ranks
from orchestrator.core.batches import Cut, LossUnits, MicroBatch, PackedBatch, SequenceGroup
from orchestrator.core.errors import ConfigError
from orchestrator.data.dataset import DataSet
from orchestrator.data.micro_batches import cut_step, loss_units
from orchestrator.data.packing import pack
from orchestrator.learner.probes import (
    attention_compilations,
    device_kind,
    model_fingerprint,
    peak_flops,
    probe_peak,
    start_gaps,
    worst,
)
from orchestrator.models.block_attention import MAX_COMPILATIONS
from orchestrator.models.load import load_config
from orchestrator.models.precision import precision_of
from orchestrator.observe.metrics import Throughput
from orchestrator.plan.planner import Plan, finer_cut
from orchestrator.plan.ways import first_steps, largest_micro_batch
from orchestrator.recipe.schema import Recipe
from orchestrator.run.remembered import Remembered, cache_folder
from orchestrator.trainers.reference_cache import ReferenceCache

Note = Callable[[str], None]
Attach = Callable[[PackedBatch], PackedBatch]
ROUNDINGS = {"fp32": 1000.0, "low": 5.0}
"""How many times as far as rounding alone moves them two ways to compute log-probs may be apart. Measured on
a CPU: correct layouts 0.0 to 1.1, a branch that sees its neighbour at least 11 in bf16 and 48,000 in fp32,
where GPU kernels also add up in another order."""
RECHECKED = 2
"""Examples whose cached reference log-probs are computed again at every start."""
SAFE = 0.6
"""Of the memory limit: a CPU run that is predicted to take no more is not probed."""


def tolerance(recipe: Recipe) -> float:
    """Largest mean difference in nat of a token's log-prob that two passes over an example may show: kernels
    and batches differ between runs, so that a sum over a long answer differs by any amount."""
    return 1e-4 if precision_of(recipe.learners.precision).exact else 0.05


def learners_are_reference(recipe: Recipe) -> bool:
    """Whether learners that have just been built are the reference: no second model is loaded then."""
    return recipe.model.reference is None


def attach_reference(
    recipe: Recipe,
    algorithm: AlgorithmSpec,
    data: DataSet,
    cut: Cut,
    group: Ranks,
    note: Note,
    *,
    train: bool = True,
    built: bool = False,
) -> Attach:
    """How a batch (training data included, or held-out examples only) gets its reference log-probs: not at
    all, live each step (TR-DPO), or from the cache on disk, filled by the workers here: before they hold a
    learner, or built: by learners that hold the start weights, with adapters off."""
    if not algorithm.needs_reference:
        return lambda batch: batch
    if recipe.algorithm.reference_sync_every is not None:
        return lambda batch: batch.with_reference(group.token_logprobs(batch, reference=True))
    fingerprint = group.call(model_fingerprint)[0] if built else group.build_reference(recipe)
    root = Path(recipe.reference.cache_dir or cache_folder("reference"))
    cache = ReferenceCache(root.expanduser() / f"{fingerprint[:32]}-{recipe.learners.precision}")
    # one after the other: an example's id is unique among the training examples, or among the held-out ones
    sets = [groups for groups in ((data.groups if train else ()), data.held_out) if groups]

    def cut_groups(some: Sequence[SequenceGroup]) -> PackedBatch:
        return cut_step(some, cut)

    def score(batch: PackedBatch) -> tuple:
        return group.token_logprobs(batch, reference=not built or recipe.model.lora is not None)

    computed = sum(
        cache.fill(groups, cut_groups, score, lambda done, of: note(f"reference log-probs: {done}/{of}"))
        for groups in sets
    )
    cached = sum(map(len, sets)) - computed
    if cached:
        gap = cache.recheck(sets[0][:RECHECKED], cut_groups, score, tolerance(recipe))
        note(
            f"reference log-probs: {cached} from the cache, {computed} computed; re-check differs by "
            f"{gap:.1e} a token"
        )
    return cache.attach


def probed_cut(plan: Plan, data: DataSet, cut: Cut, group: Ranks, note: Note) -> Cut:
    """With `micro_batch: auto`: measures the largest micro-batch, and cuts finer until it fits: see
    plan.finer_cut. Where the prediction, which is exact to a fifth on a CPU, leaves more room than that, and
    where the same was measured before, nothing is."""
    batch = plan.recipe.batch
    if batch.micro_batch != "auto" or batch.micro_batch_tokens is not None or cut.positions is None:
        return cut
    if (
        not plan.recipe.learners.gpus
        and plan.followed
        and plan.memory.peak <= SAFE * plan.memory_limit
        and cut == plan.cut
    ):
        return cut
    while True:
        largest = largest_micro_batch(first_steps(data), cut)
        peak, again = _peak(plan, largest, loss_units(data.groups[:1]), cut, group)
        if peak <= plan.memory_limit:
            note(
                f"probe: {largest.positions} positions take {peak / 1e9:.2f} GB of "
                f"{plan.memory_limit / 1e9:.2f} GB{again}"
            )
            return cut
        cut = finer_cut(plan, data, cut)
        note(f"probe: {peak / 1e9:.2f} GB is above {plan.memory_limit / 1e9:.2f} GB{again}, trying {cut}")
        assert group.spec is not None, "a probe needs a learner"
        group.build(replace(group.spec, cut=cut))


def _peak(plan: Plan, largest: MicroBatch, units: LossUnits, cut: Cut, group: Ranks) -> tuple[int, str]:
    """Peak bytes of a rank with this micro-batch, Adam's moments included, which do not exist yet; and
    whether it is remembered."""
    shape = [list(largest.input_ids.shape), len(largest.targets), len(largest.last_at)]
    known = Remembered(
        "probes",
        {**_computing(plan.recipe, group), "cut": asdict(cut), "shape": shape, "algorithm": plan.algorithm},
    )
    if (found := known.get()) is not None:
        return found["peak"] + plan.memory.moments, ", as measured before"
    peak = max(group.call(probe_peak, largest, units))
    known.put({"peak": peak})
    return peak + plan.memory.moments, ""


def _computing(recipe: Recipe, group: Ranks) -> dict[str, Any]:
    """What decides how a model computes here, beside its rows."""
    learners = recipe.learners.model_dump(
        mode="json", include={"precision", "activation_checkpointing", "fused", "offload"}
    )
    lora = recipe.model.lora.model_dump(mode="json") if recipe.model.lora is not None else None
    return {
        "weights": group.call(model_fingerprint)[0],
        "device": sorted(set(group.call(device_kind))),
        "lora": lora,
        **learners,
    }


def check_layout(
    recipe: Recipe, algorithm: AlgorithmSpec, data: DataSet, cut: Cut, group: Ranks, note: Note
) -> None:
    """Compares the chosen rows with padded ones, and our chunked head with the model's own logits, on a short
    and a long example; once for a model, its rows and a device. ConfigError where rows or head are not the
    model's."""
    ordered = sorted(data.groups[:64], key=lambda g: g.longest)
    examples = (
        [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered
    )  # a long row too: what depends on positions shows there
    padded, chosen = pack(examples, "padded"), pack(examples, cut.layout, one_row=cut.one_row)
    deciding = {
        "layout": cut.layout,
        "one_row": cut.one_row,
        "stage": cut.zero_stage,
        "head": algorithm.head,
        "rows": _digest(chosen),
    }
    known = Remembered("layouts", {**_computing(recipe, group), **deciding})
    if (found := known.get()) is not None:
        note(f"{found['said']} (found before)")
        return
    allowed = ROUNDINGS["fp32" if precision_of(recipe.learners.precision).exact else "low"]
    gaps = group.call(start_gaps, chosen if cut.layout != "padded" else None, padded)
    layout, head = worst([gap for gap, _ in gaps]), worst([gap for _, gap in gaps])
    if not layout.roundings <= allowed:
        raise ConfigError(
            f"layout {cut.layout} gives other log-probs than padded rows, by {layout}",
            why="this model or kernel does not respect the attention mask",
            fix="set batch.layout=padded",
        )
    if not head.roundings <= allowed:
        raise ConfigError(
            f"{'log-probs' if algorithm.head == 'lm' else 'rewards'} differ from the model's own logits by "
            f"{head}",
            why="this architecture computes its logits in a way models/forward.py does not know",
            fix="report it with the model's name; do not train with it",
        )
    said = (
        f"layout check: {cut.layout} equals padded, to {layout}"
        if cut.layout != "padded"
        else f"head check: the model's own logits, to {head}"
    )
    note(said)
    if cut.one_row:
        note(
            f"perf/compilations: attention was compiled {max(group.call(attention_compilations))} times (at "
            f"most {MAX_COMPILATIONS} for a model)"
        )
    known.put({"said": said})


def _digest(rows: MicroBatch) -> str:
    """SHA-256 of all that a forward is given."""
    digest = hashlib.sha256()
    for field in fields(rows):
        if isinstance(value := getattr(rows, field.name), np.ndarray):
            digest.update(
                f"{field.name} {value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes()
            )
    return digest.hexdigest()


def measured_throughput(plan: Plan, algorithm: AlgorithmSpec, group: Ranks, note: Note) -> Throughput:
    """FLOPs of the model and the peak of all workers; without an MFU for architectures that TRL's count
    lacks."""
    config = load_config(plan.recipe.model).get_text_config()
    try:
        flops = model_flops(config, head=algorithm.head == "lm", frozen=plan.recipe.model.lora is not None)
    except Exception as error:  # a metric: TRL's count knows the fields of the common architectures only
        note(
            f"perf/mfu is left out: FLOPs of {config.model_type} are not known ({type(error).__name__}: "
            f"{error})"
        )
        return Throughput()
    peaks = group.call(peak_flops)
    return replace(flops, peak_flops=None if None in peaks else sum(peaks))


def model_flops(config: Any, *, head: bool, frozen: bool) -> Throughput:
    """FLOPs by TRL's count of the products with weights, forward + backward; frozen weights (LoRA's base)
    have no gradient of their own, a third less. Attention's two products are 2 * heads * head_dim FLOPs each
    for a pair, backward twice as many."""
    from trl.trainer.utils import compute_flops_per_token

    learns = 2 / 3 if frozen else 1.0
    output = 3 * 2 * config.vocab_size * config.hidden_size
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Throughput(
        flops_per_position=learns * (compute_flops_per_token(config, 0) - output),
        flops_per_pair=3 * 2 * 2 * config.num_attention_heads * width,
        flops_per_scored=learns * output if head else 0.0,
    )
