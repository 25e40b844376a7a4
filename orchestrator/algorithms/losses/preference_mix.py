"""The objective of preference pairs: a weighted mix of the family's losses, token weights, metrics.

token log-probs --token weights, sums--> Pairs --each loss, weighted--> sum / pairs of the effective batch
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from orchestrator.algorithms.losses import preference
from orchestrator.algorithms.losses.interface import LossSum, Means, PerExample, TokenScores, required, totals
from orchestrator.algorithms.losses.logprobs import ld_weights
from orchestrator.algorithms.losses.preference import Pairs, PreferenceParams, f_divergence_link
from orchestrator.algorithms.losses.ties import margin_noise, preferred, tied
from orchestrator.core.batches import LossUnits

PairLoss = Callable[[Pairs, PreferenceParams], Float[Tensor, " n"]]

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
    """sum_k w_k loss_k over pairs / pairs of the effective batch. The term `sft` is a mean over the tokens of
    the chosen branch."""

    terms: Mapping[str, float]
    """Loss name -> weight. Example: {"sigmoid": 1.0, "sft": 0.1}."""
    params: PreferenceParams = field(default_factory=PreferenceParams)
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    ld_alpha: float | None = None
    """LD-DPO's weight of tokens beyond the shared length; None: all tokens weigh 1."""
    wpo: bool = False
    """Weights each pair by its length-normalised probability under the policy,
    exp(mean_t (log p_t - log sum p^2)) (WPO, arXiv 2406.11827)."""

    def __call__(self, scores: TokenScores, units: LossUnits) -> LossSum:
        pairs = self._pairs(scores)
        weight = _wpo_weights(scores) if self.wpo else torch.ones_like(pairs.chosen)
        total = scores.logps.sum() * 0.0
        per_pair = torch.zeros_like(pairs.chosen)
        for name, share in self.terms.items():
            if name == SFT:
                total = total - share * scores.sums()[:, 0].sum() / units.branch_tokens[0]
            else:
                losses = (WITH_REFERENCE.get(name) or REFERENCE_FREE[name])(pairs, self.params)
                total = total + share * (losses * weight).sum() / units.examples
                per_pair = per_pair + share * (losses * weight).detach()
        per_example = self._per_pair(pairs, scores)
        metrics = self._metrics(pairs, scores) | totals(per_example)
        if SFT not in self.terms and not COUPLED & self.terms.keys():  # then the loss is a mean over pairs
            per_example["loss"] = (per_pair, None)
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
        """Margins and accuracies. A tie counts one half in rewards/accuracies; TRL counts it as wrong."""
        chosen, rejected = self._rewards(pairs)
        tokens_chosen, tokens_rejected = pairs.tokens_chosen.clamp(min=1), pairs.tokens_rejected.clamp(min=1)
        noise = margin_noise(tokens_chosen + tokens_rejected, scores.precision)
        if "simpo" in self.terms or "orpo" in self.terms:
            noise = margin_noise(1.0 / tokens_chosen + 1.0 / tokens_rejected, scores.precision)
        noise = self.params.beta * noise
        return {
            "rewards/margins": (chosen - rejected, None),
            "rewards/accuracies": (preferred(chosen - rejected, noise), None),
            "rewards/ties": (tied(chosen - rejected, noise), None),
        }

    def _rewards(self, pairs: Pairs) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Rewards of chosen and rejected: beta times the log-ratio.

        SimPO and ORPO: beta times the mean log-prob.
        """
        chosen, rejected = pairs.ratio_chosen.detach(), pairs.ratio_rejected.detach()
        if "simpo" in self.terms or "orpo" in self.terms:
            chosen, rejected = (
                chosen / pairs.tokens_chosen.clamp(min=1),
                rejected / pairs.tokens_rejected.clamp(min=1),
            )
        return self.params.beta * chosen, self.params.beta * rejected

    def _metrics(self, pairs: Pairs, scores: TokenScores) -> Means:
        """Means under TRL's names."""
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


def _wpo_weights(scores: TokenScores) -> Float[Tensor, " n"]:
    """Product over both branches of exp(mean of wpo), without gradient."""
    wpo = required(scores.wpo, "WPO", "the head's log sum p^2")
    mean = scores.per_sequence(wpo.to(scores.logps.dtype)) / scores.lengths().clamp(min=1)
    return mean.exp().prod(1).detach()
