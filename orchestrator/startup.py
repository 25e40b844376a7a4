"""What happens between building the workers and the first step: reference log-probs, checks, the memory probe."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.algorithms import Algorithm
from orchestrator.cluster.workers import LearnerGroup
from orchestrator.config import Recipe
from orchestrator.controllers.reference import ReferenceCache
from orchestrator.cut import cut_step, loss_units
from orchestrator.data.packing import pack
from orchestrator.dataset import DataSet
from orchestrator.errors import ConfigError
from orchestrator.learner.checks import attention_compilations, head_check, layout_gap, peak_flops, probe_peak, worst
from orchestrator.models.block_attention import MAX_COMPILATIONS
from orchestrator.models.load import load_config
from orchestrator.observe.metrics import Throughput
from orchestrator.plan import Plan, finer_cut
from orchestrator.records import Cut, PackedBatch, SequenceGroup
from orchestrator.ways import first_steps, largest_micro_batch

Note = Callable[[str], None]
Attach = Callable[[PackedBatch], PackedBatch]
ROUNDINGS = {"fp32": 1000.0, "low": 5.0}
"""How many times as far as rounding alone moves them two ways to compute log-probs may be apart. Measured on a CPU: correct layouts
0.0 to 1.1, a branch that sees its neighbour at least 11 in bf16 and 48,000 in fp32, where GPU kernels also add up in another order."""
RECHECKED = 8
"""Examples whose cached reference log-probs are computed again at every start."""


def tolerance(recipe: Recipe) -> float:
    """Largest mean difference in nat of a token's log-prob that two passes over an example may show: kernels and batches differ
    between runs, so that a sum over a long answer differs by any amount."""
    return 1e-4 if recipe.learners.precision == "fp32" else 0.05


def attach_reference(
    recipe: Recipe, algorithm: Algorithm, data: DataSet, cut: Cut, group: LearnerGroup, note: Note, *, train: bool = True
) -> Attach:
    """How a batch (training data included, or held-out examples only) gets its reference log-probs: not at all, live each
    step (TR-DPO), or from the cache on disk, filled by the workers here, before they hold a learner."""
    if not algorithm.needs_reference:
        return lambda batch: batch
    if recipe.algorithm.reference_sync_every is not None:
        return lambda batch: batch.with_reference(group.token_logprobs(batch, reference=True))
    fingerprint = group.build_reference(recipe)
    root = Path(recipe.reference.cache_dir or Path.home() / ".cache" / "orchestrator" / "reference")
    cache = ReferenceCache(root.expanduser() / f"{fingerprint[:32]}-{recipe.learners.precision}")
    # one after the other: an example's id is unique among the training examples, or among the held-out ones
    sets = [groups for groups in ((data.groups if train else ()), data.held_out) if groups]

    def cut_groups(some: Sequence[SequenceGroup]) -> PackedBatch:
        return cut_step(some, cut)

    def score(batch: PackedBatch) -> tuple:
        return group.token_logprobs(batch, reference=True)

    computed = sum(cache.fill(groups, cut_groups, score, lambda done, of: note(f"reference log-probs: {done}/{of}")) for groups in sets)
    cached = sum(map(len, sets)) - computed
    if cached:
        gap = cache.recheck(sets[0][:RECHECKED], cut_groups, score, tolerance(recipe))
        note(f"reference log-probs: {cached} from the cache, {computed} computed; re-check differs by {gap:.1e} a token")
    return cache.attach


def probed_cut(plan: Plan, data: DataSet, cut: Cut, group: LearnerGroup, note: Note) -> Cut:
    """With `micro_batch: auto`: measures the largest micro-batch, and cuts finer until it fits: see plan.finer_cut."""
    batch = plan.recipe.batch
    if batch.micro_batch != "auto" or batch.micro_batch_tokens is not None or cut.positions is None:
        return cut
    later = plan.memory.moments  # Adam's moments do not exist yet
    while True:
        largest = largest_micro_batch(first_steps(data), cut)
        peak = max(group.call(probe_peak, largest, loss_units(data.groups[:1]))) + later
        if peak <= plan.memory_limit:
            note(f"probe: {largest.positions} positions take {peak / 1e9:.2f} GB of {plan.memory_limit / 1e9:.2f} GB")
            return cut
        cut = finer_cut(plan, data, cut)
        note(f"probe: {peak / 1e9:.2f} GB is above {plan.memory_limit / 1e9:.2f} GB, trying {cut}")
        assert group.spec is not None, "a probe needs a learner"
        group.build(replace(group.spec, cut=cut))


def check_layout(recipe: Recipe, algorithm: Algorithm, data: DataSet, cut: Cut, group: LearnerGroup, note: Note) -> None:
    """Compares the chosen rows with padded ones, and our chunked head with the model's own logits, on real examples."""
    ordered = sorted(data.groups[:64], key=lambda g: g.longest)
    examples = [*ordered[:3], ordered[-1]] if len(ordered) > 3 else ordered  # a long row too: what depends on positions shows there
    padded, allowed = pack(examples, "padded"), ROUNDINGS["fp32" if recipe.learners.precision == "fp32" else "low"]
    if cut.layout != "padded":
        gap = worst(group.call(layout_gap, pack(examples, cut.layout, one_row=cut.one_row), padded))
        if not gap.roundings <= allowed:
            raise ConfigError(
                f"layout {cut.layout} gives other log-probs than padded rows, by {gap}",
                why="this model or kernel does not respect the attention mask",
                fix="set batch.layout=padded",
            )
        note(f"layout check: {cut.layout} equals padded, to {gap}")
    if cut.one_row:
        note(f"perf/compilations: attention was compiled {max(group.call(attention_compilations))} times (at most {MAX_COMPILATIONS} for a model)")
    gap = worst(group.call(head_check, padded))
    if not gap.roundings <= allowed:
        raise ConfigError(
            f"{'log-probs' if algorithm.head == 'lm' else 'rewards'} differ from the model's own logits by {gap}",
            why="this architecture computes its logits in a way models/scoring.py does not know",
            fix="report it with the model's name; do not train with it",
        )


def measured_throughput(plan: Plan, algorithm: Algorithm, group: LearnerGroup, note: Note) -> Throughput:
    """FLOPs of the model and the peak of all workers; without an MFU for architectures that TRL's count lacks."""
    config = load_config(plan.recipe.model).get_text_config()
    try:
        flops = model_flops(config, head=algorithm.head == "lm", frozen=plan.recipe.model.lora is not None)
    except Exception as error:  # a metric: TRL's count knows the fields of the common architectures only
        note(f"perf/mfu is left out: FLOPs of {config.model_type} are not known ({type(error).__name__}: {error})")
        return Throughput()
    peaks = group.call(peak_flops)
    return replace(flops, peak_flops=None if None in peaks else sum(peaks))


def model_flops(config: Any, *, head: bool, frozen: bool) -> Throughput:
    """FLOPs by TRL's count of the products with weights, forward + backward; frozen weights (LoRA's base) have no gradient of
    their own, a third less. Attention's two products are 2 * heads * head_dim FLOPs each for a pair, backward twice as many."""
    from trl.trainer.utils import compute_flops_per_token

    learns = 2 / 3 if frozen else 1.0
    output = 3 * 2 * config.vocab_size * config.hidden_size
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Throughput(
        flops_per_position=learns * (compute_flops_per_token(config, 0) - output),
        flops_per_pair=3 * 2 * 2 * config.num_attention_heads * width,
        flops_per_scored=learns * output if head else 0.0,
    )
