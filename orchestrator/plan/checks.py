"""Settings of a recipe that cannot work on any machine: values of `learners`, `critic`, `rollouts` and
`batch`."""

from orchestrator.core.batches import Sync
from orchestrator.core.errors import ConfigError
from orchestrator.plan.ways import LEGAL_SYNC, lowest_stage
from orchestrator.recipe.schema import Recipe


def check_learners(recipe: Recipe, group_examples: int) -> None:
    """Raises ConfigError for learners that cannot work together or with batch.effective.

    group_examples: examples that count for one group of sequences.
    """
    learners, effective = recipe.learners, recipe.batch.effective
    one_gpu_each(recipe)
    if effective < learners.count * group_examples:
        raise ConfigError(
            f"batch.effective={effective} is too small for learners.workers={learners.count}",
            why="every worker needs at least one example of each optimizer step",
            fix=f"set learners.workers to {effective // group_examples} or fewer, or batch.effective to "
            f"{learners.count * group_examples} or more",
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
            why="DeepSpeed offloads only partitioned state",
            fix=f"set learners.zero_stage={lowest}, or auto",
        )
    if learners.fused and (learners.zero_stage == 3 or lowest_stage(learners) == 3):
        raise ConfigError(
            "learners.fused is not possible at ZeRO stage 3",
            why="its hooks gather the parameters of every module, which breaks each compiled graph",
            fix="set learners.fused=false, or learners.zero_stage=2 without offload.parameters",
        )
    if learners.zero_stage != "auto" and learners.sync != "auto":
        _check_sync(learners.sync, learners.zero_stage, learners.precision)


def _check_sync(sync: Sync, stage: int, precision: str) -> None:
    """Raises ConfigError for a sync policy that the stage or the precision does not have."""
    if sync not in LEGAL_SYNC[stage]:
        raise ConfigError(
            f"learners.sync={sync} is not possible at ZeRO stage {stage}",
            why="gradients are partitioned, so no rank can hold all of them back"
            if sync == "no_sync"
            else "DeepSpeed rejects it",
            fix=f"use one of {', '.join(LEGAL_SYNC[stage])}, or auto",
        )
    if sync == "coalesced" and precision in ("bf16", "fp16"):
        raise ConfigError(
            f"learners.sync=coalesced with precision={precision} would accumulate gradients in {precision}",
            why="DeepSpeed sums in the gradients of the parameters until the end of the step",
            fix="use sync=no_sync at stage 1, per_micro_batch at stages 2 and 3, or precision=bf16_autocast",
        )


def one_gpu_each(recipe: Recipe) -> None:
    """Raises ConfigError if a process gets more than the one GPU that it computes on, or if two ranks share
    one."""
    gpus_of = {
        "learners.gpus_per_worker": recipe.learners.gpus,
        "critic.gpus_per_worker": recipe.critic.gpus_per_worker,
        "rollouts.gpus_per_worker": recipe.rollouts.gpus,
        **{
            f"rewards.functions, gpus of {function.name}": function.gpus
            for function in recipe.rewards.functions
        },
    }
    for key, gpus in gpus_of.items():
        if gpus > 1:
            raise ConfigError(
                f"{key} is {gpus:g}, and a worker computes on one GPU",
                why="each worker is one process on one device; further GPUs would be reserved and idle",
                fix="set it to 1, or to a part of a GPU such as 0.5, and add workers: the effective batch "
                "stays the same",
            )
    colocated = recipe.rollouts.gpus if recipe.rollouts.placement == "colocated" else 0.0
    learners, critic = recipe.learners, recipe.critic
    ranks = (
        ("learners", learners.count, learners.gpus, colocated),
        ("critic", critic.workers, critic.gpus_per_worker, 0.0),
    )
    for section, workers, gpus, others in ranks:
        if workers > 1 and gpus > 0 and gpus + others <= 0.5:
            raise ConfigError(
                f"{section}.gpus_per_worker={gpus:g} puts two of {workers} workers on one GPU",
                why="NCCL takes one rank per GPU",
                fix=f"set {section}.gpus_per_worker above 0.5, or {section}.workers=1",
            )
