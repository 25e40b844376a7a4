"""On policy every token has weight 1, whatever the sampler: a grid of samplers on shared logits, and both
decoders on a model.

the same logits --engines.sampling.draw--> sampled log-probs  ─┐
                --learner's head at HeadSpec.temperature--> old ┴─> weight = exp(old - sampled) = 1
"""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from orchestrator.algorithms.losses.interface import ExperienceTensors, TokenScores
from orchestrator.algorithms.losses.logprobs import chunked_logprobs
from orchestrator.algorithms.losses.policy import CorrectionKind, correction_weights
from orchestrator.algorithms.table import build
from orchestrator.core.batches import LossUnits
from orchestrator.core.rollouts import Sampling
from orchestrator.recipe.schema import AlgorithmConfig, Correction, Rollouts
from orchestrator.rollout.engines.padded_decoder import StaticDecoder
from orchestrator.rollout.engines.paged_decoder import ContinuousDecoder
from orchestrator.rollout.engines.sampling import draw, drawn_from
from tests.unit.rollout.decoding_cases import CASES, EOS, kept_gap, letters, requests, worst_gap

ROWS, VOCABULARY, LENGTH = 96, 128, 12
GRID = tuple(product((0.2, 0.6, 1.0, 1.7, 3.0), (1.0, 0.9, 0.5), (None, 1, 20, 500), (0.0, 0.1)))
"""120 samplers by (temperature, top_p, top_k, min_p). A top_k of 500 is larger than the vocabulary."""
KINDS: tuple[CorrectionKind, ...] = ("none", "token", "sequence", "decoupled")
EXACT = 1e-6


def named(temperature: float, top_p: float, top_k: int | None, min_p: float) -> Rollouts:
    return Rollouts.model_validate(
        {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "max_new_tokens": LENGTH}
    )


def sampled(rollouts: Rollouts) -> tuple[Sampling, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sampling, logits Float[R, V], tokens, the generator's log-probs) of one step of a decoder."""
    sampling = Sampling(1, LENGTH, rollouts.temperature, rollouts.top_p, rollouts.top_k, rollouts.min_p)
    generator = torch.Generator().manual_seed(7)
    logits = 2.0 * torch.randn(ROWS, VOCABULARY, generator=generator)
    seeds = torch.randint(0, 2**32, (ROWS, 2), generator=generator)
    drawn = draw(logits, seeds, torch.arange(ROWS) % LENGTH, sampling)
    return sampling, logits, drawn.tokens, drawn.logprobs


def learned(
    rollouts: Rollouts, logits: torch.Tensor, tokens: torch.Tensor, name: str = "grpo"
) -> torch.Tensor:
    """Log-probs of the learner's head for the same logits, with the algorithm's own head spec."""
    spec = build(AlgorithmConfig(name=name), rollouts).head_spec  # pyright: ignore[reportArgumentType]
    return chunked_logprobs(logits, torch.eye(VOCABULARY), None, tokens, spec).logps


def scores_of(logps: torch.Tensor, sampled_logps: torch.Tensor) -> TokenScores:
    sequence = torch.arange(ROWS) // LENGTH
    advantages = torch.randn(ROWS, generator=torch.Generator().manual_seed(1))
    experience = ExperienceTensors(advantages, sampled_logps, None, logps.detach())
    return TokenScores(logps, sequence, ROWS // LENGTH, 1, entropy=torch.zeros(ROWS), experience=experience)


@pytest.mark.parametrize("sampler", GRID, ids=str)
def test_on_policy_every_weight_is_one(sampler):
    rollouts = named(*sampler)
    _, logits, tokens, sampled_logps = sampled(rollouts)
    logps = learned(rollouts, logits, tokens)
    scores = scores_of(logps, sampled_logps)
    for kind in KINDS:
        weights = correction_weights(scores, logps, sampled_logps, kind, 2.0)
        bound = EXACT * (LENGTH if kind == "sequence" else 1)  # a sequence's weight is a product of LENGTH
        assert float((weights - 1.0).abs().max()) < bound, kind


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "ppo"])
@pytest.mark.parametrize("sampler", [(0.6, 0.9, 20, 0.0), (1.7, 0.5, None, 0.1)], ids=str)
def test_the_gradient_is_that_of_no_correction(name, sampler):
    """This holds for every row of the table and each kind of correction: tokens that the sampler excludes do
    not matter."""
    rollouts = named(*sampler)
    _, logits, tokens, sampled_logps = sampled(rollouts)
    gradients = {}
    for kind in KINDS:
        correction = Correction(kind=kind)
        cfg = AlgorithmConfig(name=name, correction=correction)  # pyright: ignore[reportArgumentType]
        logps = learned(rollouts, logits, tokens, name).requires_grad_()
        loss = build(cfg, rollouts).objective(
            scores_of(logps, sampled_logps), LossUnits(ROWS // LENGTH, (ROWS,))
        )
        assert float(loss.means["policy/train_rollout_gap"][0]) / ROWS < EXACT
        gradients[kind] = torch.autograd.grad(loss.total, logps)[0]
    assert float(gradients["none"].abs().max()) > 1e-4
    for kind in KINDS[1:]:
        torch.testing.assert_close(gradients[kind], gradients["none"], rtol=2e-5, atol=1e-9)


def test_renormalised_log_probs_would_be_seen():
    """Control: with log-probs renormalised over the tokens that top_p keeps, weights are below 1 by the
    excluded probability."""
    rollouts = named(1.0, 0.8, None, 0.0)
    sampling, logits, tokens, _ = sampled(rollouts)
    renormalised = drawn_from(logits, sampling).gather(1, tokens[:, None])[:, 0]
    logps = learned(rollouts, logits, tokens)
    weights = correction_weights(scores_of(logps, renormalised), logps, renormalised, "token", 2.0)
    assert 0.75 < float(weights.mean()) < 0.9


STOPS = ((), ("ee", "q", "o"))
DECODED = [(0.5, 0.9, None, 0.0), (1.5, 1.0, 30, 0.0), (0.8, 0.8, 40, 0.05), (2.5, 1.0, None, 0.2)]


@pytest.mark.parametrize("decoder", [StaticDecoder, ContinuousDecoder], ids=["static", "continuous"])
@pytest.mark.parametrize("sampler", DECODED, ids=str)
def test_a_decoders_log_probs_are_those_of_one_forward(decoder: Callable, sampler) -> None:
    """Log-probs from the cache, with stop texts and without, differ only by the kernels' rounding."""
    model, prompts = CASES[0].model(), requests(4, limit=16)
    for stop in STOPS:
        sampling = Sampling(4, 16, *sampler, stop=stop)
        completions = decoder(model, EOS, 8, letters).generate(prompts, sampling)
        assert worst_gap(model, prompts, completions, sampling) < 1e-4
        assert kept_gap(model, prompts, completions, sampling) < 1e-4
    # at least one completion ended with a stop text
    assert any(c.finish == "stop" and not np.isin(c.ids[-1], EOS) for cs in completions for c in cs)
