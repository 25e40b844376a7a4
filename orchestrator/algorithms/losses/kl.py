"""KL divergence from log-probs of drawn tokens, and the controller of its coefficient.

Notation: x drawn from pi, r = pi_ref(x)/pi(x), so log r = ref_logp - logp. Each function estimates
KL(pi || pi_ref) per token.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

KlEstimator = Callable[[Float[Tensor, " N"], Float[Tensor, " N"]], Float[Tensor, " N"]]

ERROR_BOUND = 0.2
"""Bound of the controller's relative error (Ziegler et al., sec. 2.2)."""


def k1(logps: Float[Tensor, " N"], ref_logps: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-log r (Schulman, joschu.net/blog/kl-approx.html).

    Unbiased; may be negative. As a term of the LOSS its expected gradient on policy is zero: it belongs into
    the reward.
    """
    return logps - ref_logps


def k2(logps: Float[Tensor, " N"], ref_logps: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """(log r)^2 / 2 (Schulman): biased; on policy its gradient is that of the KL divergence."""
    return 0.5 * (ref_logps - logps).square()


def k3(logps: Float[Tensor, " N"], ref_logps: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """(r - 1) - log r (Schulman; GRPO, arXiv 2402.03300, eq. 4; TRL's per_token_kl).

    Unbiased and never negative.
    """
    log_r = ref_logps - logps
    return torch.expm1(log_r) - log_r


ESTIMATORS: Mapping[str, KlEstimator] = {"k1": k1, "k2": k2, "k3": k3}


def adapt(coefficient: float, observed: float, target: float, horizon: float, rollouts: int) -> float:
    """The next KL coefficient of a proportional controller (Ziegler et al., arXiv 1909.08593, sec. 2.2).

        e = clip((KL - target)/target, -0.2, 0.2)
        beta' = beta (1 + K e) with K = min(1, rollouts/horizon)

    So the coefficient changes by at most a factor e^0.2 per `horizon` rollouts.
    """
    error = max(-ERROR_BOUND, min(ERROR_BOUND, observed / target - 1.0))  # e_t
    return coefficient * (1.0 + error * min(1.0, rollouts / horizon))  # beta_{t+1}
