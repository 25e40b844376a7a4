"""Draws tokens that depend on the sample alone, not on the batch or the actor.

    logits --temperature--> policy --top-k, top-p, min-p--> narrowed distribution --Gumbel-max--> token

The noise f(seed, position, token) is a function of a sample's seed and the position, never of the batch or
the actor. A token's log-prob is the policy's, over the whole vocabulary, as the learner computes it. Under
the narrowed distribution log-probs are larger by the mass that top-k, top-p and min-p cut away, so the
learner would see another policy.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.core.rollouts import Sampling
from orchestrator.models.noise import WORD, hashed, mixed

_CACHED = 1 << 16
"""Numbers that fit into a CPU's cache while they are mixed."""


def sample_seed(run_seed: int, prompt_id: int, draw: int, sample: int, version: int) -> int:
    """The 64-bit seed of one sample, a hash of these five numbers alone."""
    return hashed(run_seed, prompt_id, draw, sample, version)


def gumbel(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise Float[R, V] from a counter-based generator keyed by (seed, position, token).

    seeds: Int[R, 2], the two 32-bit words of each row's seed; positions: Int[R], tokens already drawn.

    The mixer is murmur3's finaliser, a bijection of 32 bits with full avalanche, so the uniforms of a row
    never repeat. Each word of the seed is mixed with the position separately. So if two rows collide in the
    first word, their noise is a shifted copy only until the second word is mixed in.
    """
    rows = len(seeds) if seeds.is_cuda else max(1, _CACHED // vocabulary)
    if len(seeds) > rows:
        return torch.cat(
            [gumbel(s, p, vocabulary) for s, p in zip(seeds.split(rows), positions.split(rows), strict=True)]
        )
    tokens = torch.arange(vocabulary, device=seeds.device)[None]
    key = mixed((seeds[:, 0] ^ mixed(positions * 0x9E37_79B1 & WORD)) & WORD)
    bits = mixed((tokens * 0x85EB_CA77 + key[:, None]) & WORD)
    bits = mixed(bits ^ mixed((seeds[:, 1] + positions * 0xC2B2_AE3D) & WORD)[:, None])
    uniform = (bits.double() + 0.5) / 2.0**32
    return uniform.log_().neg_().log_().neg_().float()


def drawn_from(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probs Float[R, V] of the narrowed distribution, from which tokens are drawn.

    Temperature, top-k, top-p and min-p are applied in the order of transformers. The log-prob is -inf if a
    token cannot be drawn; the others are renormalised.
    """
    z = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < z.shape[1]:
        z = z.masked_fill(z < z.topk(sampling.top_k, dim=1).values[:, -1:], -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = z.sort(dim=1, descending=True)
        before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)  # mass of the likelier tokens
        z = z.masked_fill((before >= sampling.top_p).scatter(1, order, before >= sampling.top_p), -torch.inf)
    logps = torch.log_softmax(z, 1)
    if sampling.min_p > 0.0:
        low = logps < logps.max(1, keepdim=True).values + math.log(sampling.min_p)
        logps = torch.log_softmax(logps.masked_fill(low, -torch.inf), 1)
    return logps


def policy_logps(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probs Float[R, V] of the policy: softmax over the whole vocabulary of logits / temperature."""
    return torch.log_softmax(logits.float() / sampling.temperature, 1)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token for each of R rows. logprobs - kept is the log-prob under the narrowed distribution."""

    tokens: Tensor
    """Int[R]."""
    logprobs: Tensor
    """Float[R], under the policy; 0 if greedy."""
    kept: Tensor | None = None
    """Float[R], log of the policy's mass that top-k, top-p and min-p keep; None if none of them is set."""


def draw(logits: Tensor, seeds: Tensor, positions: Tensor, sampling: Sampling) -> Drawn:
    """The next token of each row. logits: Float[R, V]; seeds: Int[R, 2]; positions: Int[R]."""
    if sampling.temperature == 0.0:
        tokens = logits.argmax(1)
        return Drawn(tokens, torch.zeros(len(tokens), device=logits.device))
    logps = drawn_from(logits, sampling)
    tokens = (logps + gumbel(seeds, positions, logits.shape[1])).argmax(1)
    picked = logps.gather(1, tokens[:, None])[:, 0]
    if not sampling.truncates:
        return Drawn(tokens, picked)
    logprobs = policy_logps(logits, sampling).gather(1, tokens[:, None])[:, 0]
    return Drawn(tokens, logprobs, logprobs - picked)
