"""Drawing tokens so that who draws them cannot matter.

    logits --temperature--> the policy --top-k, top-p, min-p--> the distribution drawn from --Gumbel-max--> token

The noise, f(seed, position, token), is a function of a sample's seed and the position, never of the batch it
sits in or the actor that holds it. What is kept of a token is its log-prob under the policy, over the whole
vocabulary as the learner computes it: log-probs over what top-k, top-p and min-p leave are larger by the mass
that they cut away, so a learner would take the sampler for another policy.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.core.rollouts import Sampling
from orchestrator.models.noise import WORD, hashed, mixed

_CACHED = 1 << 16
"""Numbers that a CPU's cache holds while they are mixed."""


def sample_seed(run_seed: int, prompt_id: int, draw: int, sample: int, version: int) -> int:
    """The 64-bit seed of one sample: a hash of what it is, and of nothing else."""
    return hashed(run_seed, prompt_id, draw, sample, version)


def gumbel(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise Float[R, V] from a counter-based generator keyed by (seed, position, token).

    seeds: Int[R, 2], the two 32-bit words of each row's seed; positions: Int[R], tokens already drawn. The
    mixer is murmur3's finaliser, a bijection of 32 bits with full avalanche, so the uniforms of a row never
    repeat. Each word of the seed is mixed with the position on its own: where two rows meet in the first,
    they are shifted copies only before the second.
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
    """Log-probs Float[R, V] of the distribution that is drawn from: after temperature, then top-k, top-p and
    min-p, in the order of transformers; -inf where a token cannot be drawn. Renormalised over what is left.
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
    """Log-probs Float[R, V] of the policy: softmax of the logits over the temperature, nothing left out."""
    return torch.log_softmax(logits.float() / sampling.temperature, 1)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token for each of R rows. tokens: Int[R]; logprobs: Float[R], under the policy (0 where greedy);
    kept: Float[R], log of the policy's mass that top-k, top-p and min-p left to draw from, None where none of
    them is set. logprobs - kept is the log-prob under the distribution drawn from."""

    tokens: Tensor
    logprobs: Tensor
    kept: Tensor | None = None


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
    whole = policy_logps(logits, sampling).gather(1, tokens[:, None])[:, 0]
    return Drawn(tokens, whole, whole - picked)
