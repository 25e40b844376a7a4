"""Policy-gradient losses by composition: ratio, loss of a token, its correction, its share of the batch.

    log_ratio --exp--> ratio --clipped | clipped_weight | reinforce--> loss of a token
                                            loss of a token --* correction, + KL--> --* share--> sum

| algorithm                        | form      | level      | normaliser | clip_low, clip_high      |
|----------------------------------|-----------|------------|------------|--------------------------|
| PPO, REINFORCE++                 | clip      | token      | token      | 0.2, 0.2                 |
| GRPO                             | clip      | token      | sequence   | 0.2, 0.2                 |
| Dr. GRPO                         | clip      | token      | constant   | 0.2, 0.2                 |
| DAPO                             | clip      | token      | token      | 0.2, 0.28                |
| GSPO                             | clip      | sequence   | sequence   | 3e-4, 4e-4               |
| CISPO                            | cispo     | token      | token      | none, 5.0 (of the ratio) |
| RLOO (TRL's: clipped)            | clip      | trajectory | sequence   | 0.2, 0.2                 |
| REINFORCE, RLOO (of the paper)   | reinforce | any        | constant=1 | none                     |
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from orchestrator.algorithms.losses.interface import ExperienceTensors, LossSum, Means, TokenScores, required
from orchestrator.algorithms.losses.kl import ESTIMATORS, k3
from orchestrator.core.batches import LossUnits

Form = Literal["clip", "cispo", "reinforce"]
Level = Literal["token", "sequence", "trajectory"]
Normaliser = Literal["token", "sequence", "constant"]
CorrectionKind = Literal["none", "token", "sequence", "decoupled"]

LOG_RATIO_MAX = 80.0
"""exp of more overflows fp32. An infinite ratio has a NaN gradient even if it is clipped away."""


def log_ratio(scores: TokenScores, old_logps: Float[Tensor, " N"], level: Level) -> Float[Tensor, " N"]:
    """log(pi/pi_old) of each token at a level.

    token       its own (PPO, arXiv 1707.06347)
    sequence    the mean over its sequence (GSPO, arXiv 2507.18071, eq. 7)
    trajectory  the sum over its sequence: the ratio of whole completions (RLOO, arXiv 2402.14740, as TRL
                clips it)
    """
    per_token = scores.logps - old_logps
    if level == "token":
        return per_token
    total = scores.per_sequence(per_token)
    return _of_sequence(scores, total if level == "trajectory" else total / scores.lengths().clamp(min=1))


def clipped(
    ratio: Float[Tensor, " N"], advantages: Float[Tensor, " N"], low: float, high: float, dual: float | None
) -> Float[Tensor, " N"]:
    """-min(min(r, dual) A, clip(r, 1 - low, 1 + high) A).

    PPO (arXiv 1707.06347, eq. 7). low != high is DAPO's clip-higher (arXiv 2503.14476). With `dual` the loss
    of A < 0 grows only up to r = dual (dual-clip PPO, arXiv 1912.09729; TRL's delta).
    """
    bounded = ratio if dual is None else ratio.clamp(max=dual)
    return -torch.min(bounded * advantages, ratio.clamp(1.0 - low, 1.0 + high) * advantages)


def clipped_weight(
    ratio: Float[Tensor, " N"], advantages: Float[Tensor, " N"], logps: Float[Tensor, " N"], high: float
) -> Float[Tensor, " N"]:
    """-sg(min(r, high)) A log pi (CISPO, arXiv 2506.13585, eq. 4-5; no lower bound, as in TRL)."""
    return -ratio.clamp(max=high).detach() * advantages * logps


def reinforce(advantages: Float[Tensor, " N"], logps: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-A log pi (Williams 1992).

    Its gradient is the policy gradient if the policy drew the tokens itself.
    """
    return -advantages * logps


def correction_weights(
    scores: TokenScores,
    old_logps: Float[Tensor, " N"],
    sampled_logps: Float[Tensor, " N"],
    kind: CorrectionKind,
    cap: float,
) -> Float[Tensor, " N"]:
    """Weights of tokens that were not drawn from pi_old, by w = pi_old/pi_sampled.

    token      min(w, cap): truncated importance sampling (TRL's token_truncate)
    sequence   the product of w over the sequence; 0 if it is beyond cap or NaN (TRL's sequence_mask)
    decoupled  w; 0 if it is beyond cap (AReaL, arXiv 2505.24298)
    """
    gap = old_logps - sampled_logps
    if kind == "none":
        return torch.ones_like(gap)
    if kind == "token":
        return gap.exp().clamp(max=cap)
    weights = gap.exp() if kind == "decoupled" else _of_sequence(scores, scores.per_sequence(gap)).exp()
    return torch.where(weights <= cap, weights, 0.0)


def shares(
    scores: TokenScores, units: LossUnits, normaliser: Normaliser, constant: float
) -> Float[Tensor, " N"]:
    """Share of each token's loss in the effective batch.

    token     1/tokens (DAPO, arXiv 2503.14476, eq. 8)
    sequence  1/(|o| sequences): the mean of means (GRPO, arXiv 2402.03300, eq. 3)
    constant  1/(constant * sequences) (Dr. GRPO, arXiv 2503.20783)

    The shares of `token` and `sequence` add up to 1 over the effective batch, those of `constant` to less.
    """
    if normaliser == "token":
        return torch.full_like(scores.logps, 1.0 / max(units.tokens, 1))
    if normaliser == "constant":
        return torch.full_like(scores.logps, 1.0 / (constant * units.sequences))
    return 1.0 / (_of_sequence(scores, scores.lengths()) * units.sequences)


def _of_sequence(scores: TokenScores, values: Float[Tensor, "n branches"]) -> Float[Tensor, " N"]:
    """For each token the value of its sequence."""
    return values.flatten()[scores.sequence]


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """A policy loss over the effective batch, in sums.

    total = sum_t share_t (correction_t loss_t + beta KL_t) - bonus mean(H)
    """

    form: Form = "clip"
    level: Level = "token"
    """Level of the ratio: see `log_ratio`."""
    normaliser: Normaliser = "token"
    """Count that a token's loss is divided by: see `shares`."""
    constant: float = 1.0
    """Length that the normaliser "constant" divides by (Dr. GRPO: max_new_tokens)."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual: float | None = None
    """Largest ratio of tokens with a negative advantage; None: unbounded."""
    kl_coefficient: float = 0.0
    """beta; units.kl_coefficient overrides it."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_ratio: bool = False
    """Multiplies KL_t by the ratio (of `level`), with its gradient, as TRL 1.16 does for the GRPO family.
    pi_old drew the tokens: without the ratio k3's gradient is not that of the divergence, and k1's expected
    gradient is zero."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy over the tokens of the effective batch, whatever the normaliser."""
    correction: CorrectionKind = "none"
    """Correction for tokens that pi_old did not draw: see `correction_weights`."""
    cap: float = 2.0
    """Largest weight of the correction."""

    def __call__(self, scores: TokenScores, units: LossUnits) -> LossSum:
        experience = required(scores.experience, "a policy gradient", "experience")
        old = scores.logps.detach() if experience.old_logps is None else experience.old_logps
        ratio = log_ratio(scores, old, self.level).clamp(max=LOG_RATIO_MAX).exp()
        weights = correction_weights(scores, old, experience.sampled_logps, self.correction, self.cap)
        losses = weights * self._losses(ratio, experience.advantages, scores.logps)
        beta = self.kl_coefficient if units.kl_coefficient is None else units.kl_coefficient
        if beta:
            ref_logps = required(experience.ref_logps, "a KL term", "reference log-probs")
            divergence = ESTIMATORS[self.kl_estimator](scores.logps, ref_logps)
            losses = losses + beta * (divergence * ratio if self.kl_ratio else divergence)
        total = (shares(scores, units, self.normaliser, self.constant) * losses).sum()
        if self.entropy_bonus:
            entropy = required(scores.entropy, "an entropy bonus", "the entropy at each token")
            total = total - self.entropy_bonus * entropy.sum() / max(units.tokens, 1)
        return LossSum(total, *self._metrics(scores, experience, old, ratio.detach(), weights))

    def _losses(
        self, ratio: Float[Tensor, " N"], advantages: Float[Tensor, " N"], logps: Float[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        if self.form == "clip":
            return clipped(ratio, advantages, self.clip_low, self.clip_high, self.dual)
        if self.form == "cispo":
            return clipped_weight(ratio, advantages, logps, self.clip_high)
        return reinforce(advantages, logps)

    def _metrics(
        self,
        scores: TokenScores,
        experience: ExperienceTensors,
        old: Float[Tensor, " N"],
        ratio: Float[Tensor, " N"],
        weights: Float[Tensor, " N"],
    ) -> tuple[Means, dict[str, Float[Tensor, ""]]]:
        """Means over tokens (a clipped sequence counts with its tokens) and maxima."""
        logps = scores.logps.detach()
        gap = (old - experience.sampled_logps).abs()
        columns = {
            "policy/approx_kl": k3(old, logps),
            "policy/train_rollout_gap": gap,
            "policy/correction_weight": weights,
        }
        if experience.ref_logps is not None:
            columns["kl"] = k3(logps, experience.ref_logps)
        if scores.entropy is not None:
            columns["policy/entropy"] = scores.entropy.detach()
        if self.form != "reinforce":
            high = (ratio > (self.clip_high if self.form == "cispo" else 1.0 + self.clip_high)) & (
                experience.advantages > 0
            )
            low = (
                (ratio < 1.0 - self.clip_low) & (experience.advantages < 0)
                if self.form == "clip"
                else torch.zeros_like(high)
            )
            columns |= {
                "policy/clip_fraction": low | high,
                "policy/clip_fraction_low": low,
                "policy/clip_fraction_high": high,
            }
        means: Means = {name: (column.double().sum(), float(len(logps))) for name, column in columns.items()}
        return means, {"policy/ratio_max": _largest(ratio), "policy/train_rollout_gap_max": _largest(gap)}


def _largest(column: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """The maximum of a column of non-negative values, 0 without tokens."""
    return torch.cat([column, column.new_zeros(1)]).max()
