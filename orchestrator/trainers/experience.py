"""From rewarded rollouts to training data: log-probs, values and advantages of each token.

RewardedGroup -> SequenceGroup (tokens) --learner: old, reference log-probs; critic: values--> Columns
              --AdvantageEstimator: rewards, KL penalties, values--> Experience of every branch

RewardedGroup -> SequenceGroup (best, worst)         online DPO
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from orchestrator.algorithms.losses.advantages import Episodes
from orchestrator.algorithms.losses.kl import ESTIMATORS, k3
from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.batches import Branch, Cut, Experience, Floats, PackedBatch, SequenceGroup
from orchestrator.core.roles import Learner, PerMicroBatch
from orchestrator.core.rollouts import RewardedGroup
from orchestrator.data.micro_batches import cut_step, loss_units
from orchestrator.data.packing import by_branch

Columns = list[Floats]
"""Float[scored tokens] of each branch, one group after the other."""


@dataclass(frozen=True, slots=True)
class ExperienceInputs:
    """Columns that an Experience needs."""

    old: bool
    """Log-probs before the update: the policy (or LoRA's dropout) changes before they are used, or the KL is
    part of the reward."""
    reference: bool
    """Log-probs of the reference."""
    penalty: float
    """Coefficient of the KL in the reward; 0 if it is not part of the reward."""
    estimator: str
    """Estimator of that KL. Example: k1"""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Training data of a rollout batch."""

    groups: tuple[SequenceGroup, ...]
    kl: float | None
    """Mean of k3 per token against the reference; None if the log-probs were not computed here."""


def sequences(rewarded: Sequence[RewardedGroup], *, mask_truncated: bool) -> tuple[SequenceGroup, ...]:
    """The tokens of each group, a prompt and a branch per rollout; ids count from 0 in the rollout batch."""
    groups = []
    for index, item in enumerate(rewarded):
        rollouts = item.group.rollouts
        branches = tuple(
            Branch(
                r.ids,
                np.zeros(len(r.ids), np.bool_) if mask_truncated and r.finish == "length" else r.loss_mask,
            )
            for r in rollouts
        )
        groups.append(SequenceGroup(index, item.group.prompt.ids, branches, item.group.prompt.source))
    return tuple(groups)


def make_experience(
    rewarded: Sequence[RewardedGroup],
    rewards: Sequence[Floats],
    algorithm: AlgorithmSpec,
    needs: ExperienceInputs,
    policy: Learner,
    critic: Learner | None,
    cut: Cut,
    *,
    mask_truncated: bool = False,
) -> TrainingData:
    """Groups whose branches carry advantages. rewards: Float[n] of each group, as given to the estimator."""
    assert algorithm.online is not None and algorithm.online.advantage is not None
    groups = sequences(rewarded, mask_truncated=mask_truncated)
    batch = (
        cut_step(groups, cut)
        if needs.old or needs.reference or critic is not None
        else PackedBatch(groups, (), loss_units(groups))
    )
    old = _columns(batch, policy.token_logprobs(batch)) if needs.old else None
    reference = _columns(batch, policy.token_logprobs(batch, reference=True)) if needs.reference else None
    values = None if critic is None else _columns(batch, critic.token_values(batch))
    lengths = tuple(int(b.loss_mask.sum()) for g in groups for b in g.branches)
    per_token, returns = algorithm.online.advantage(
        Episodes(
            rewards=torch.from_numpy(np.stack(rewards)).double(),
            penalties=_penalties(old, reference, needs, sum(lengths)),
            lengths=lengths,
            values=None if values is None else torch.from_numpy(np.concatenate(values)).double(),
        )
    )
    advantages, targets = _split(per_token, lengths), None if returns is None else _split(returns, lengths)
    learned, at = [], 0
    for item, group in zip(rewarded, groups, strict=True):
        branches = []
        for rollout, branch in zip(item.group.rollouts, group.branches, strict=True):
            sampled = rollout.logprobs if branch.loss_mask.any() else np.zeros(0, np.float32)
            columns = (None if c is None else c[at] for c in (old, reference, values, targets))
            branches.append(replace(branch, experience=Experience(advantages[at], sampled, *columns)))
            at += 1
        learned.append(replace(group, branches=tuple(branches)))
    kl = None if old is None or reference is None else _mean_kl(old, reference)
    return TrainingData(tuple(learned), kl)


def pairs(rewarded: Sequence[RewardedGroup], rewards: Sequence[Floats]) -> tuple[SequenceGroup, ...]:
    """(best, worst) of each group by reward. Groups of equal rewards hold no preference and are left out."""
    groups = []
    for index, (item, values) in enumerate(zip(rewarded, rewards, strict=True)):
        best, worst = int(values.argmax()), int(values.argmin())
        if values[best] > values[worst]:
            chosen = tuple(
                Branch(item.group.rollouts[i].ids, item.group.rollouts[i].loss_mask) for i in (best, worst)
            )
            groups.append(SequenceGroup(index, item.group.prompt.ids, chosen, item.group.prompt.source))
    return tuple(groups)


def has_signal(item: RewardedGroup) -> bool:
    """False if all samples have equal rewards, so advantages of 0 (DAPO, arXiv 2503.14476, sec. 3.2)."""
    return bool(np.ptp(item.rewards) > 1e-6)


def _columns(batch: PackedBatch, values: PerMicroBatch) -> Columns:
    """Values [rank][i]: Float[N] as columns of the branches that they belong to."""
    by_group: Mapping[int, tuple[Floats, ...]] = {
        int(group): branches
        for rank, parts in zip(batch.micro_batches, values, strict=True)
        for micro_batch, part in zip(rank, parts, strict=True)
        if micro_batch.weight
        for group, branches in zip(micro_batch.examples, by_branch(micro_batch, part), strict=True)
    }
    return [branch for group in batch.groups for branch in by_group[group.id]]


def _penalties(
    old: Columns | None, reference: Columns | None, needs: ExperienceInputs, tokens: int
) -> torch.Tensor:
    """Float[N]: KL coefficient times the KL of each token against the reference; zeros without a penalty."""
    if not needs.penalty:
        return torch.zeros(tokens, dtype=torch.float64)
    assert old is not None and reference is not None, (
        "a KL in the reward needs the learner's and the reference's log-probs"
    )
    policy, ref = (torch.from_numpy(np.concatenate(c)).double() for c in (old, reference))
    return needs.penalty * ESTIMATORS[needs.estimator](policy, ref)


def _mean_kl(old: Columns, reference: Columns) -> float:
    policy, ref = (torch.from_numpy(np.concatenate(c)).double() for c in (old, reference))
    return float(k3(policy, ref).mean()) if len(policy) else 0.0


def _split(values: torch.Tensor, lengths: Sequence[int]) -> Columns:
    return [part.float().numpy() for part in values.split(list(lengths))]
