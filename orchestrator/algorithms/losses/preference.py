"""The preference family: one pure function per equation, from n pairs to n losses.

Notation: h_c, h_r: log pi(y)/pi_ref(y) of chosen and rejected ("log-ratios"), d = h_c - h_r (after the
f-divergence's link), beta: inverse temperature, eps: label smoothing. arXiv numbers name the papers.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Pairs:
    """Quantities of the sequences of n pairs."""

    chosen: Float[Tensor, " n"]
    rejected: Float[Tensor, " n"]
    """log pi(y) of chosen and rejected."""
    ref_chosen: Float[Tensor, " n"]
    ref_rejected: Float[Tensor, " n"]
    """log pi_ref(y); zeros for reference-free losses."""
    score_chosen: Float[Tensor, " n"]
    score_rejected: Float[Tensor, " n"]
    """Log-ratios under the f-divergence's link."""
    tokens_chosen: Float[Tensor, " n"]
    tokens_rejected: Float[Tensor, " n"]
    """Scored tokens."""

    @property
    def ratio_chosen(self) -> Float[Tensor, " n"]:
        return self.chosen - self.ref_chosen

    @property
    def ratio_rejected(self) -> Float[Tensor, " n"]:
        return self.rejected - self.ref_rejected

    @property
    def delta(self) -> Float[Tensor, " n"]:
        return self.score_chosen - self.score_rejected

    @property
    def delta_per_token(self) -> Float[Tensor, " n"]:
        return self.score_chosen / self.tokens_chosen.clamp(
            min=1
        ) - self.score_rejected / self.tokens_rejected.clamp(min=1)


@dataclass(frozen=True, slots=True)
class PreferenceParams:
    """Hyper-parameters of the family; each loss reads those of its equation."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    ipo_length_average: bool = True
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05


def f_divergence_link(ratio: Float[Tensor, "*shape"], name: str, alpha: float) -> Float[Tensor, "*shape"]:
    """f'(t) at t = exp(ratio), up to constants; replaces the log-ratio (f-DPO, arXiv 2309.16240, table 1).

    reverse_kl  log t
    forward_kl  1 - 1/t
    js          log(2t/(1+t))
    alpha       (t^(a-1) - 1)/(a-1); log t at a = 1
    """
    if name == "forward_kl":
        return 1.0 - torch.exp(-ratio)
    if name == "js":
        return math.log(2.0) + F.logsigmoid(ratio)
    if name == "alpha" and abs(alpha - 1.0) >= 1e-6:
        return (torch.exp(((alpha - 1.0) * ratio).clamp(max=80.0)) - 1.0) / (alpha - 1.0)
    return ratio


def _smoothed(logit: Float[Tensor, " n"], eps: float) -> Float[Tensor, " n"]:
    """-(1 - eps) log sigmoid(x) - eps log sigmoid(-x)."""
    return -(1.0 - eps) * F.logsigmoid(logit) - eps * F.logsigmoid(-logit)


def sigmoid(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """DPO (2305.18290, eq. 7): -log sigmoid(beta d); with eps > 0 conservative DPO (cDPO)."""
    return _smoothed(k.beta * p.delta, k.label_smoothing)


def robust(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """Robust DPO (2403.00409, eq. 12).

    (-(1 - eps) log sigmoid(beta d) + eps log sigmoid(-beta d)) / (1 - 2 eps)
    """
    eps, x = k.label_smoothing, k.beta * p.delta
    return (-(1.0 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1.0 - 2.0 * eps)


def hinge(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """SLiC (2305.10425) on DPO's rewards, as in RSO (2309.06657): max(0, 1 - beta d)."""
    return torch.relu(1.0 - k.beta * p.delta)


def ipo(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """IPO (2310.12036, eq. 17): (d - 1/(2 beta))^2, d per token (the authors' and TRL's form) or summed."""
    delta = p.delta_per_token if k.ipo_length_average else p.delta
    return (delta - 1.0 / (2.0 * k.beta)).square()


def exo_pair(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """EXO (2402.00856, eq. 16): KL(p_theta || p_r) for K = 2 with p_r = (1 - eps, eps)."""
    x = k.beta * p.delta
    win = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-k.label_smoothing))
    return win + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(k.label_smoothing))


def nca_pair(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """NCA (2402.05369, eq. 11 for a pair) with r = beta h.

    -log sigmoid(r_c) - 1/2 log sigmoid(-r_c) - 1/2 log sigmoid(-r_r)
    """
    c, r = k.beta * p.ratio_chosen, k.beta * p.ratio_rejected
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r)


def bco_pair(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """BCO on pairs (2404.04656, eq. 9, without reward shift, as TRL 1.16) with r = beta h.

    -log sigmoid(r_c) - log sigmoid(-r_r)
    """
    return -F.logsigmoid(k.beta * p.ratio_chosen) - F.logsigmoid(-k.beta * p.ratio_rejected)


def sppo_hard(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """SPPO (2405.00675, eq. 4.7) with hard probabilities: (h_c - 1/(2 beta))^2 + (h_r + 1/(2 beta))^2."""
    return (p.ratio_chosen - 0.5 / k.beta).square() + (p.ratio_rejected + 0.5 / k.beta).square()


def aot(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """AOT paired (2406.05882, eq. 5): DPO on differences sorted over the EFFECTIVE batch, policy against
    reference."""
    policy = torch.sort(p.chosen - p.rejected).values
    reference = torch.sort(p.ref_chosen - p.ref_rejected).values
    return _smoothed(k.beta * (policy - reference), k.label_smoothing)


def aot_unpaired(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """AOT unpaired (2406.05882, eq. 4): chosen against rejected log-ratios, each sorted over the EFFECTIVE
    batch."""
    delta = torch.sort(p.ratio_chosen).values - torch.sort(p.ratio_rejected).values
    return _smoothed(k.beta * delta, k.label_smoothing)


def apo_zero(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """APO-zero (2408.06266, eq. 7): 1 - sigmoid(beta h_c) + sigmoid(beta h_r)."""
    return torch.sigmoid(-k.beta * p.ratio_chosen) + torch.sigmoid(k.beta * p.ratio_rejected)


def apo_down(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """APO-down (2408.06266, eq. 8): sigmoid(beta h_c) + 1 - sigmoid(beta (h_c - h_r))."""
    return torch.sigmoid(k.beta * p.ratio_chosen) + torch.sigmoid(
        -k.beta * (p.ratio_chosen - p.ratio_rejected)
    )


def discopop(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """DiscoPOP (2406.08414, eq. 5): logistic and exponential loss, mixed by sigmoid(beta d / tau)."""
    x = k.beta * p.delta
    mix = torch.sigmoid(x / k.discopop_tau)
    return -F.logsigmoid(x) * (1.0 - mix) + torch.exp(-x) * mix


def sigmoid_norm(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """Length-normalised DPO (Tulu 3, 2411.15124, eq. 6): -log sigmoid(beta (h_c/|y_c| - h_r/|y_r|))."""
    return -F.logsigmoid(k.beta * p.delta_per_token)


def simpo(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """SimPO (2405.14734, eq. 6): -log sigmoid(beta (log pi(y_c)/|y_c| - log pi(y_r)/|y_r|) - gamma)."""
    x = p.chosen / p.tokens_chosen.clamp(min=1) - p.rejected / p.tokens_rejected.clamp(min=1)
    return _smoothed(k.beta * x - k.simpo_gamma, k.label_smoothing)


def cpo(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """CPO's preference term (2401.08417, eq. 3): -log sigmoid(beta (log pi(y_c) - log pi(y_r)))."""
    return _smoothed(k.beta * (p.chosen - p.rejected), k.label_smoothing)


def orpo(p: Pairs, k: PreferenceParams) -> Float[Tensor, " n"]:
    """ORPO's odds-ratio term (2403.07691, eq. 7), odds per token.

    -beta log sigmoid(log odds(y_c) - log odds(y_r))
    """
    c = p.chosen / p.tokens_chosen.clamp(min=1)
    r = p.rejected / p.tokens_rejected.clamp(min=1)
    log_odds = (c - r) - (_log1mexp(c) - _log1mexp(r))
    return -k.beta * F.logsigmoid(log_odds)


def _log1mexp(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """log(1 - e^x) for x < 0, accurate near 0 and far from it (Mächler 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2.0)
    safe_near, safe_far = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(safe_near)), torch.log1p(-torch.exp(safe_far)))


def kto_losses(
    ratio: Float[Tensor, " n"],
    label: Float[Tensor, " n"],
    kl: Float[Tensor, ""],
    beta: float,
    desirable: float,
    undesirable: float,
) -> Float[Tensor, " n"]:
    """KTO (2402.01306, eq. 7-8). z = kl carries no gradient.

    desirable (label 1)  w_D (1 - sigmoid(beta (h - z)))
    undesirable          w_U (1 - sigmoid(beta (z - h)))
    """
    good = desirable * torch.sigmoid(-beta * (ratio - kl))
    bad = undesirable * torch.sigmoid(-beta * (kl - ratio))
    return torch.where(label > 0.5, good, bad)
