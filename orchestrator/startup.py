"""What happens between building the workers and the first step: reference log-probs, checks, the memory probe."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.algorithms import Algorithm
from orchestrator.cluster.workers import LearnerGroup
from orchestrator.config import Recipe
from orchestrator.controllers.reference import ReferenceCache
from orchestrator.cut import cut_step, loss_units
from orchestrator.data.packing import pack
from orchestrator.dataset import DataSet
from orchestrator.errors import ConfigError
from orchestrator.learner.checks import attention_compilations, head_check, layout_gap, peak_flops, probe_peak
from orchestrator.models.block_attention import MAX_COMPILATIONS
from orchestrator.models.load import load_config
from orchestrator.observe.metrics import Throughput
from orchestrator.plan import Plan, finer_cut
from orchestrator.records import Cut, PackedBatch, SequenceGroup
from orchestrator.ways import first_steps, largest_micro_batch

Note = Callable[[str], None]
Attach = Callable[[PackedBatch], PackedBatch]
RECHECKED = 8
"""Examples whose cached reference log-probs are computed again at every start."""


def tolerance(recipe: Recipe) -> float:
    """Largest difference in nat, summed over a sequence, that two layouts or two passes may show."""
    return 1e-3 if recipe.learners.precision == "fp32" else 0.5


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
        worst = cache.recheck(sets[0][:RECHECKED], cut_groups, score, tolerance(recipe))
        note(f"reference log-probs: {cached} from the cache, {computed} computed; re-check differs by {worst:.1e}")
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
    examples = sorted(data.groups[:64], key=lambda g: g.longest)[:4]
    padded, allowed = pack(examples, "padded"), tolerance(recipe)
    if cut.layout != "padded":
        gap = max(group.call(layout_gap, pack(examples, cut.layout, one_row=cut.one_row), padded))
        if not gap <= allowed:
            raise ConfigError(
                f"layout {cut.layout} gives other log-probs than padded rows, by {gap:.2e} nat",
                why="this model or kernel does not respect the attention mask",
                fix="set batch.layout=padded",
            )
        note(f"layout check: {cut.layout} equals padded to {gap:.1e} nat")
    if cut.one_row:
        note(f"perf/compilations: attention was compiled {max(group.call(attention_compilations))} times (at most {MAX_COMPILATIONS} for a model)")
    gap = max(group.call(head_check, padded))
    if not gap <= allowed:
        raise ConfigError(
            f"log-probs differ from the model's own logits by {gap:.2e} nat",
            why="this architecture transforms its logits in a way models/scoring.py does not know",
            fix="report it with the model's name; do not train with it",
        )


def measured_throughput(plan: Plan, group: LearnerGroup) -> Throughput:
    """FLOPs per token (TRL's count) and the peak of all workers; without an MFU for architectures TRL's count lacks."""
    from trl.trainer.utils import compute_flops_per_token

    config = load_config(plan.recipe.model).get_text_config()
    if not all(hasattr(config, name) for name in ("num_key_value_heads", "intermediate_size")):
        return Throughput()
    head = 3 * 2 * config.vocab_size * config.hidden_size
    peaks = group.call(peak_flops)
    total = None if None in peaks else sum(peaks)
    return Throughput(compute_flops_per_token(config, plan.mean_length) - head, head, total)
