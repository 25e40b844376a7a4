"""Objectives made of the preference family's equations: weighted mixes, token weights, metrics; and KTO.

token log-probs --token weights, sums--> Pairs --each loss, weighted--> sum / pairs of the effective batch
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orchestrator.algorithms.losses import preference
from orchestrator.algorithms.losses.interface import LossSum, Means, PerExample, TokenScores, totals
from orchestrator.algorithms.losses.logprobs import ld_weights
from orchestrator.algorithms.losses.preference import Pairs, PreferenceParams, f_divergence_link
from orchestrator.algorithms.losses.ties import margin_noise, preferred, tied
from orchestrator.core.batches import LossUnits

PairLoss = Callable[[Pairs, PreferenceParams], Tensor]

WITH_REFERENCE: Mapping[str, PairLoss] = {
    "sigmoid": preference.sigmoid,
    "robust": preference.robust,
    "hinge": preference.hinge,
    "ipo": preference.ipo,
    "exo_pair": preference.exo_pair,
    "nca_pair": preference.nca_pair,
    "bco_pair": preference.bco_pair,
    "sppo_hard": preference.sppo_hard,
    "aot": preference.aot,
    "aot_unpaired": preference.aot_unpaired,
    "apo_zero": preference.apo_zero,
    "apo_down": preference.apo_down,
    "discopop": preference.discopop,
    "sigmoid_norm": preference.sigmoid_norm,
}
REFERENCE_FREE: Mapping[str, PairLoss] = {
    "simpo": preference.simpo,
    "cpo": preference.cpo,
    "orpo": preference.orpo,
}
COUPLED = frozenset({"aot", "aot_unpaired"})
SFT = "sft"
PAIR_LOSSES = (*WITH_REFERENCE, *REFERENCE_FREE, SFT)


@dataclass(frozen=True, slots=True)
class PreferenceMix:
    """sum_k w_k loss_k over pairs / pairs of the effective batch; `sft` is the chosen branch's token mean
    instead.

    terms: loss name -> weight. ld_alpha: LD-DPO's weight of tokens beyond the shared length. wpo: weights
    each pair by its length-normalised probability under the policy, exp(mean_t (log p_t - log sum p^2)) (WPO,
    arXiv 2406.11827).
    """

    terms: Mapping[str, float]
    knobs: PreferenceParams = field(default_factory=PreferenceParams)
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    ld_alpha: float | None = None
    wpo: bool = False

    def __call__(self, scores: TokenScores, units: LossUnits) -> LossSum:
        pairs = self._pairs(scores)
        weight = _wpo_weights(scores) if self.wpo else torch.ones_like(pairs.chosen)
        total = scores.logps.sum() * 0.0
        each = torch.zeros_like(pairs.chosen)
        for name, share in self.terms.items():
            if name == SFT:
                total = total - share * scores.sums()[:, 0].sum() / units.branch_tokens[0]
            else:
                losses = (WITH_REFERENCE.get(name) or REFERENCE_FREE[name])(pairs, self.knobs)
                total = total + share * (losses * weight).sum() / units.examples
                each = each + share * (losses * weight).detach()
        per_example = self._per_pair(pairs, scores)
        metrics = self._metrics(pairs, scores) | totals(per_example)
        if (
            SFT not in self.terms and not COUPLED & self.terms.keys()
        ):  # only then is the loss a mean over pairs
            per_example["loss"] = (each, None)
        return LossSum(total, metrics, per_example=per_example)

    def _pairs(self, scores: TokenScores) -> Pairs:
        weights = None
        if self.ld_alpha is not None:
            weights = ld_weights(scores.sequence, scores.examples, scores.branches, self.ld_alpha)
        policy = scores.sums() if weights is None else scores.per_sequence(scores.logps * weights)
        reference = torch.zeros_like(policy)
        if scores.ref_logps is not None:
            ref_logps = scores.ref_logps.to(policy.dtype)
            reference = scores.ref_sums() if weights is None else scores.per_sequence(ref_logps * weights)
        link = f_divergence_link(policy - reference, self.f_divergence, self.f_alpha)
        lengths = scores.lengths()
        return Pairs(*policy.unbind(1), *reference.unbind(1), *link.unbind(1), *lengths.unbind(1))

    def _per_pair(self, pairs: Pairs, scores: TokenScores) -> PerExample:
        """A tie counts one half in rewards/accuracies, where TRL counts it as wrong."""
        chosen, rejected = self._rewards(pairs)
        one, other = pairs.tokens_chosen.clamp(min=1), pairs.tokens_rejected.clamp(min=1)
        noise = margin_noise(one + other, scores.precision)
        if "simpo" in self.terms or "orpo" in self.terms:
            noise = margin_noise(1.0 / one + 1.0 / other, scores.precision)
        noise = self.knobs.beta * noise
        return {
            "rewards/margins": (chosen - rejected, None),
            "rewards/accuracies": (preferred(chosen - rejected, noise), None),
            "rewards/ties": (tied(chosen - rejected, noise), None),
        }

    def _rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Of chosen and rejected, Float[n] each: beta times the log-ratio (SimPO, ORPO: beta times the mean
        log-prob)."""
        chosen, rejected = pairs.ratio_chosen.detach(), pairs.ratio_rejected.detach()
        if "simpo" in self.terms or "orpo" in self.terms:
            chosen, rejected = (
                chosen / pairs.tokens_chosen.clamp(min=1),
                rejected / pairs.tokens_rejected.clamp(min=1),
            )
        return self.knobs.beta * chosen, self.knobs.beta * rejected

    def _metrics(self, pairs: Pairs, scores: TokenScores) -> Means:
        """TRL's names."""
        count = float(scores.examples)
        chosen, rejected = self._rewards(pairs)
        metrics: Means = {
            "rewards/chosen": (chosen.sum(), count),
            "rewards/rejected": (rejected.sum(), count),
            "logps/chosen": (pairs.chosen.detach().sum(), count),
            "logps/rejected": (pairs.rejected.detach().sum(), count),
        }
        if SFT in self.terms:
            metrics["nll_loss"] = (-scores.sums()[:, 0].detach().sum(), pairs.tokens_chosen.sum())
        return metrics


def _wpo_weights(scores: TokenScores) -> Tensor:
    """Float[n]: product over both branches of exp(mean aligned log-prob), no gradient."""
    assert scores.wpo is not None, "WPO needs the head's log sum p^2"
    mean = scores.per_sequence(scores.wpo.to(scores.logps.dtype)) / scores.lengths().clamp(min=1)
    return mean.exp().prod(1).detach()


@dataclass(frozen=True, slots=True)
class Kto:
    """KTO over the effective batch: branch 0 is the completion, branch 1 a mismatched one that estimates the
    KL.

    z = max(0, mean over the EFFECTIVE batch of log pi(y')/pi_ref(y')), without gradient (arXiv 2402.01306,
    eq. 6-8).
    """

    beta: float
    desirable: float
    undesirable: float

    def __call__(self, scores: TokenScores, units: LossUnits) -> LossSum:
        assert scores.label is not None, "KTO needs a label for each example"
        policy, reference = scores.sums(), scores.ref_sums()
        ratio, mismatched = (policy - reference).unbind(1)
        kl = (mismatched.detach().sum() / units.examples).clamp(min=0)
        losses = preference.kto_losses(ratio, scores.label, kl, self.beta, self.desirable, self.undesirable)
        means = self._metrics(policy[:, 0].detach(), ratio.detach(), scores.label, kl)
        return LossSum(losses.sum() / units.examples, means, per_example={"loss": (losses.detach(), None)})

    def _metrics(self, logps: Tensor, ratio: Tensor, label: Tensor, kl: Tensor) -> Means:
        metrics: Means = {"kl": (kl, 1.0)}
        rewards = self.beta * ratio
        for name, mask in (("chosen", label > 0.5), ("rejected", label <= 0.5)):
            count = mask.sum()
            metrics[f"rewards/{name}"] = (torch.where(mask, rewards, 0.0).sum(), count)
            metrics[f"logps/{name}"] = (torch.where(mask, logps, 0.0).sum(), count)
        return metrics
