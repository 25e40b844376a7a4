"""Small models and requests for tests of both decoders, and the true log-probs from one forward over all."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from orchestrator.core.rollouts import Completion, Sampling
from orchestrator.models.tiny import build
from orchestrator.recipe.schema import TinyModel
from orchestrator.rollout.engines.engine import Request
from orchestrator.rollout.engines.sampling import drawn_from, policy_logps, sample_seed

EOS = tuple(range(2, 16))
"""Fourteen of 263 tokens end a sequence: about one in twenty does."""
SAMPLING = Sampling(samples=4, max_new_tokens=40)
Generated = Sequence[tuple[Completion, ...]]


@dataclass(frozen=True, slots=True)
class Case:
    """An architecture. Weights are drawn wide, so that attention is far from uniform."""

    architecture: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.architecture

    def model(self, seed: int = 0) -> Any:
        cfg = TinyModel(
            architecture=self.architecture, hidden_size=32, layers=2, heads=4, kv_heads=2, max_positions=256
        )
        return (
            build(cfg, seed, AutoModelForCausalLM, initializer_range=0.2, **self.options)
            .eval()
            .requires_grad_(False)
        )


MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
CASES = (
    Case("llama"),
    Case("qwen2"),
    Case("gpt2"),
    Case("gemma"),
    Case("mistral", {"sliding_window": 7}),
    Case("gemma2", {**MIXED, "attn_logit_softcapping": 2.0}),
)
WINDOWED = tuple(case for case in CASES if "sliding_window" in case.options)


def letters(ids: Sequence[int]) -> str:
    """A decoder of one letter per token."""
    return "".join(chr(ord("a") + i % 26) for i in ids)


def requests(count: int = 7, *, longest: int = 20, limit: int = 40, samples: int = 4) -> list[Request]:
    """Prompts and limits of ragged lengths; the last prompt is one token."""
    random = np.random.default_rng(3)
    prompts = [random.integers(16, 250, length) for length in (*random.integers(2, longest, count - 1), 1)]
    limits = random.integers(1, limit + 1, count)
    seeds = [tuple(sample_seed(0, i, 0, k, 0) for k in range(samples)) for i in range(count)]
    return [Request(p, s, int(n)) for p, s, n in zip(prompts, seeds, limits, strict=True)]


def forward_logprobs(
    model: Any,
    prompt: np.ndarray,
    completion: Completion,
    sampling: Sampling = SAMPLING,
    *,
    narrowed: bool = False,
) -> np.ndarray:
    """Log-probs Float[S] of the completion's tokens by one forward over prompt and completion.

    Under the policy, or if narrowed under the distribution that top-k, top-p and min-p keep of it.
    """
    ids = torch.from_numpy(np.concatenate([prompt, completion.ids]))[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps = drawn_from(logits, sampling) if narrowed else policy_logps(logits, sampling)
    return logps.gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def worst_gap(
    model: Any, asked: Sequence[Request], generated: Generated, sampling: Sampling = SAMPLING
) -> float:
    """Largest |difference| between a completion's log-probs and one forward's."""
    gaps = [
        np.abs(forward_logprobs(model, r.prompt, c, sampling) - c.logprobs).max()
        for r, cs in zip(asked, generated, strict=True)
        for c in cs
    ]
    return float(max(gaps))


def kept_gap(model: Any, asked: Sequence[Request], generated: Generated, sampling: Sampling) -> float:
    """Largest |difference| between logprobs - kept and those of one forward, narrowed."""

    def of(request: Request, completion: Completion) -> float:
        assert completion.kept is not None and len(completion.kept) == len(completion.ids)
        truth = forward_logprobs(model, request.prompt, completion, sampling, narrowed=True)
        return float(np.abs(truth - (completion.logprobs - completion.kept)).max())

    return max(of(r, c) for r, cs in zip(asked, generated, strict=True) for c in cs)


def same(first: Generated, second: Generated, tolerance: float = 1e-5) -> bool:
    """Whether two decoders made the same tokens, for the same reason, with the same log-probs."""
    return len(first) == len(second) and all(
        np.array_equal(a.ids, b.ids)
        and a.finish == b.finish
        and np.allclose(a.logprobs, b.logprobs, rtol=0, atol=tolerance)
        for left, right in zip(first, second, strict=True)
        for a, b in zip(left, right, strict=True)
    )


def cut_at(completion: Completion, stop: Sequence[str]) -> int:
    """Number of tokens up to the one that completes a stop text, or of all tokens."""
    return next(
        (n for n in range(1, len(completion.ids) + 1) if any(s in letters(completion.ids[:n]) for s in stop)),
        len(completion.ids),
    )
