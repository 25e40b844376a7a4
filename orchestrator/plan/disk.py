"""Disk space of a run folder: checkpoints by checkpoint.keep and checkpoint.final, and the export."""

from orchestrator.algorithms.table import AlgorithmSpec, critic
from orchestrator.core.format import size
from orchestrator.models.rounding import FULL, may_be_too_coarse
from orchestrator.models.source import export_dtype
from orchestrator.plan.memory import model_sizes
from orchestrator.plan.state_bytes import Sizes
from orchestrator.recipe.schema import Recipe

STATE_BYTES = 12
"""Bytes of a trainable parameter in a checkpoint: the fp32 master weight and Adam's two moments."""
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a weight by dtype."""


def checkpoint_bytes(recipe: Recipe, algorithm: AlgorithmSpec, sizes: Sizes) -> int:
    """Bytes of one checkpoint: the state of the policy, TR-DPO's moving reference, and the state of PPO's
    critic.

    sizes: parameters of the policy.
    """
    total = STATE_BYTES * sizes.learns
    if recipe.algorithm.reference_sync_every is not None:
        total += (4 if recipe.learners.precision in ("fp32", "bf16_autocast") else 2) * sizes.all
    if algorithm.online is not None and algorithm.online.critic:
        model = recipe.critic.model or recipe.model.model_copy(update={"lora": None})
        sizes = model_sizes(recipe.model_copy(update={"model": model}), critic(recipe.algorithm))
        total += STATE_BYTES * sizes.learns
    return total


def export_bytes(recipe: Recipe, sizes: Sizes) -> int:
    """Bytes of the exported weights, at most. An adapter's weights are fp32."""
    element = ELEMENT_BYTES[
        FULL if may_be_too_coarse(recipe) else export_dtype(recipe.export.dtype, recipe.model)
    ]
    if recipe.model.lora is None:
        return element * sizes.all
    merged = element * (sizes.all - sizes.learns) if recipe.export.lora != "adapter" else 0
    return merged + (4 * sizes.learns if recipe.export.lora != "merged" else 0)


def in_words(recipe: Recipe, algorithm: AlgorithmSpec, sizes: Sizes) -> tuple[str, str]:
    """(size of a checkpoint, the rest) for the plan. Example: ("a checkpoint is 1.60 GB", "every 10m, 2 kept
    …")."""
    saved = checkpoint_bytes(recipe, algorithm, sizes)
    keep, every = recipe.checkpoint.keep, recipe.checkpoint.every
    when = (
        f"every {every} steps" if isinstance(every, int) else f"every {every}" if every else "at the end only"
    )
    final = {"full": "", "weights": "; weights alone at the end", "none": "; none at the end"}[
        recipe.checkpoint.final
    ]
    exported = export_bytes(recipe, sizes)
    most = (keep + 1) * saved + exported
    reason = (
        f"{when}, {keep} kept{final}; export {size(exported)} ({recipe.export.dtype}); {size(most)} at most"
    )
    return f"a checkpoint is {size(saved)}", reason
