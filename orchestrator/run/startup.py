"""Between building the workers and the first step: reference log-probs, checks, the memory probe."""

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
from orchestrator.data.dataset import PlanInput
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
"""Largest allowed gap between two ways to compute log-probs, in units of what rounding alone changes.

Measured on a CPU: correct layouts 0.0 to 1.1; a branch that sees its neighbour at least 11 in bf16 and 48,000
in fp32. GPU kernels also add in another order."""
RECHECKED = 2
"""Examples whose cached reference log-probs are computed again at each start."""
SAFE = 0.6
"""Share of the memory limit. A CPU run whose predicted peak is at most this share is not probed."""


def tolerance(recipe: Recipe) -> float:
    """Largest allowed difference between two passes over an example, in nat, as a mean over its tokens.

    Kernels and batches differ between runs, so the difference of a sum over a long answer has no bound.
    """
    return 1e-4 if precision_of(recipe.learners.precision).exact else 0.05


def learners_are_reference(recipe: Recipe) -> bool:
    """Whether the start weights are the reference: no second model is loaded then."""
    return recipe.model.reference is None


def attach_reference(
    recipe: Recipe,
    algorithm: AlgorithmSpec,
    data: PlanInput,
    cut: Cut,
    group: Ranks,
    note: Note,
    *,
    train: bool = True,
    built: bool = False,
) -> Attach:
    """Returns the function that adds reference log-probs to a batch.

    The function adds none if the algorithm needs none; it computes them live for TR-DPO; else it reads them
    from the cache on disk, which the workers fill here. train: fills the cache for the training examples too,
    not only for the held-out ones; built: the workers hold a learner with the start weights (LoRA adapters
    are switched off), else they load the reference model.
    """
    if not algorithm.needs_reference:
        return lambda batch: batch
    if recipe.algorithm.reference_sync_every is not None:
        return lambda batch: batch.with_reference(group.token_logprobs(batch, reference=True))
    fingerprint = group.call(model_fingerprint)[0] if built else group.build_reference(recipe)
    root = Path(recipe.reference.cache_dir or cache_folder("reference"))
    cache = ReferenceCache(root.expanduser() / f"{fingerprint[:32]}-{recipe.learners.precision}")
    # one set after the other: ids are unique only within the training examples, or the held-out ones
    sets = [groups for groups in ((data.groups if train else ()), data.held_out) if groups]

    def cut_groups(groups: Sequence[SequenceGroup]) -> PackedBatch:
        return cut_step(groups, cut)

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


def probed_cut(plan: Plan, data: PlanInput, cut: Cut, group: Ranks, note: Note) -> Cut:
    """With `micro_batch: auto`: measures the peak memory of the largest micro-batch, and cuts finer until it
    fits (plan.finer_cut).

    A result that was measured before is used again. A CPU run with a predicted peak below SAFE of the limit
    is not measured: on a CPU the prediction is exact to a fifth.
    """
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
    """(peak bytes of a rank with this micro-batch, ", as measured before" or "").

    Adam's moments are added: they do not exist yet.
    """
    shape = [list(largest.input_ids.shape), len(largest.targets), len(largest.last_at)]
    remembered = Remembered(
        "probes",
        {**_computing(plan.recipe, group), "cut": asdict(cut), "shape": shape, "algorithm": plan.algorithm},
    )
    if (result := remembered.get()) is not None:
        return result["peak"] + plan.memory.moments, ", as measured before"
    peak = max(group.call(probe_peak, largest, units))
    remembered.put({"peak": peak})
    return peak + plan.memory.moments, ""


def _computing(recipe: Recipe, group: Ranks) -> dict[str, Any]:
    """What decides the numbers that a model computes here, apart from its rows."""
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
    recipe: Recipe, algorithm: AlgorithmSpec, data: PlanInput, cut: Cut, group: Ranks, note: Note
) -> None:
    """Compares the chosen row layout with padded rows, and our chunked head with the model's own logits, on a
    short and a long example.

    It computes once per model, rows and device. ConfigError if layout or head differ.
    """
    ordered = sorted(data.groups[:64], key=lambda g: g.longest)
    # the long example shows errors that depend on positions
    examples = [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered
    padded, chosen = pack(examples, "padded"), pack(examples, cut.layout, one_row=cut.one_row)
    deciding = {
        "layout": cut.layout,
        "one_row": cut.one_row,
        "stage": cut.zero_stage,
        "head": algorithm.head,
        "rows": _digest(chosen),
    }
    remembered = Remembered("layouts", {**_computing(recipe, group), **deciding})
    if (result := remembered.get()) is not None:
        note(f"{result['said']} (checked before)")
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
            fix="report it with the model's name, and do not train this model",
        )
    verdict = (
        f"layout check: {cut.layout} equals padded, to {layout}"
        if cut.layout != "padded"
        else f"head check: the model's own logits, to {head}"
    )
    note(verdict)
    if cut.one_row:
        note(
            f"perf/compilations: attention was compiled {max(group.call(attention_compilations))} times (at "
            f"most {MAX_COMPILATIONS} for a model)"
        )
    remembered.put({"said": verdict})


def _digest(rows: MicroBatch) -> str:
    """SHA-256 of all arrays that a forward pass gets."""
    digest = hashlib.sha256()
    for field in fields(rows):
        if isinstance(value := getattr(rows, field.name), np.ndarray):
            digest.update(
                f"{field.name} {value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes()
            )
    return digest.hexdigest()


def measured_throughput(plan: Plan, algorithm: AlgorithmSpec, group: Ranks, note: Note) -> Throughput:
    """FLOPs of the model, and the peak of all workers together.

    Empty for an architecture that TRL cannot count: the metrics then lack perf/mfu.
    """
    config = load_config(plan.recipe.model).get_text_config()
    try:
        flops = model_flops(config, head=algorithm.head == "lm", frozen=plan.recipe.model.lora is not None)
    except Exception as error:  # TRL's count reads config fields that only common architectures have
        note(
            f"perf/mfu is left out: FLOPs of {config.model_type} are not known ({type(error).__name__}: "
            f"{error})"
        )
        return Throughput()
    peaks = group.call(peak_flops)
    return replace(flops, peak_flops=None if None in peaks else sum(peaks))


def model_flops(config: Any, *, head: bool, frozen: bool) -> Throughput:
    """Forward and backward FLOPs, by TRL's count of the products with weights.

    Frozen weights (LoRA's base) get no gradient: a third less. Attention has two products, each of
    2 * heads * head_dim FLOPs per (query, key) pair; the backward pass takes twice as many.
    """
    from trl.trainer.utils import compute_flops_per_token

    learns = 2 / 3 if frozen else 1.0
    output = 3 * 2 * config.vocab_size * config.hidden_size
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Throughput(
        flops_per_position=learns * (compute_flops_per_token(config, 0) - output),
        flops_per_pair=3 * 2 * 2 * config.num_attention_heads * width,
        flops_per_scored=learns * output if head else 0.0,
    )
