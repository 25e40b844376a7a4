"""Noise and the distribution of samples, against statistics and transformers' own warpers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from orchestrator.core.rollouts import Sampling
from orchestrator.models.noise import words
from orchestrator.rollout.engines.sampling import draw, drawn_from, gumbel, sample_seed

ROWS, VOCABULARY = 2000, 64


def seeds_of(*samples: int) -> torch.Tensor:
    return torch.tensor([words(sample_seed(0, 0, 0, k, 0)) for k in samples])


def uniforms(seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int = VOCABULARY) -> np.ndarray:
    """The uniforms behind the noise: Float[R, V]."""
    return torch.exp(-torch.exp(-gumbel(seeds, positions, vocabulary).double())).numpy()


SEEDS = seeds_of(*range(ROWS))
BY_SEED = uniforms(SEEDS, torch.zeros(ROWS, dtype=torch.long))
BY_POSITION = uniforms(SEEDS[:1].expand(ROWS, 2), torch.arange(ROWS))


def chi_square_is_ordinary(counts: np.ndarray, expected: np.ndarray | float) -> bool:
    """Whether counts are within 5 standard deviations of what chance gives: false once in a million."""
    freedom = counts.size - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("noise", [BY_SEED, BY_POSITION], ids=["over seeds", "over positions"])
@pytest.mark.parametrize("bins", [10, 256])
def test_noise_is_uniform_before_it_is_gumbel(noise, bins):
    counts = np.histogram(noise, bins, (0.0, 1.0))[0]
    assert chi_square_is_ordinary(counts, noise.size / bins)


@pytest.mark.parametrize("noise", [BY_SEED, BY_POSITION], ids=["over seeds", "over positions"])
def test_pairs_of_neighbours_fill_the_square_evenly(noise):
    for first, second in (
        (noise[:-1], noise[1:]),
        (noise[:, :-1], noise[:, 1:]),
    ):  # neighbouring rows, neighbouring tokens
        counts = np.histogram2d(first.ravel(), second.ravel(), 16, ((0, 1), (0, 1)))[0]
        assert chi_square_is_ordinary(counts, first.size / 256)


def test_gumbel_moments():
    noise = gumbel(SEEDS, torch.zeros(ROWS, dtype=torch.long), VOCABULARY)
    error = math.pi / math.sqrt(6 * noise.numel())
    assert abs(float(noise.mean()) - 0.5772157) < 5 * error
    assert float(noise.std()) == pytest.approx(math.pi / math.sqrt(6), rel=0.02)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return abs(float(np.corrcoef(first.ravel(), second.ravel())[0, 1]))


def test_rows_tokens_positions_and_words_of_the_seed_do_not_correlate():
    limit = 5 / math.sqrt(BY_SEED.size)
    later = uniforms(SEEDS, torch.ones(ROWS, dtype=torch.long))
    flipped = {
        bit: uniforms(SEEDS ^ torch.tensor([bit, 0]), torch.zeros(ROWS, dtype=torch.long))
        for bit in (1, 1 << 31)
    }
    low = uniforms(SEEDS ^ torch.tensor([0, 1]), torch.zeros(ROWS, dtype=torch.long))
    swapped = uniforms(SEEDS.flip(1), torch.zeros(ROWS, dtype=torch.long))
    for other in (
        later,
        *flipped.values(),
        low,
        swapped,
        np.roll(BY_SEED, 1, 0),
        np.roll(BY_SEED, 1, 1),
        BY_SEED[:, ::-1],
    ):
        assert correlation(BY_SEED, other) < limit
    assert correlation(BY_POSITION, np.roll(BY_POSITION, 1, 0)) < limit
    assert correlation(BY_POSITION, BY_POSITION) > 1 - 1e-6  # the measure itself sees equality


def test_no_position_repeats_the_noise_of_another_shifted_to_other_tokens():
    """With one key for both words of the seed, 5 of these pairs of positions would share a piece of 2500
    tokens."""
    bits = gumbel(SEEDS[:1].expand(2000, 2), torch.arange(2000), 5000).view(torch.int32).long()
    neighbours = (bits[:, :-1] << 32) + bits[:, 1:]
    repeated = neighbours.numel() - len(neighbours.unique())
    assert repeated < 10


@given(order=st.permutations(range(12)), take=st.integers(1, 12))
def test_noise_belongs_to_the_row_whatever_the_batch(order, take):
    seeds, positions = SEEDS[:12], torch.arange(12) * 7
    noise = gumbel(seeds, positions, 50)
    chosen = order[:take]
    assert torch.equal(gumbel(seeds[chosen], positions[chosen], 50), noise[chosen])


def test_a_larger_vocabulary_begins_with_the_noise_of_a_smaller_one():
    assert torch.equal(gumbel(SEEDS[:3], torch.arange(3), 50), gumbel(SEEDS[:3], torch.arange(3), 80)[:, :50])


def test_seeds_differ_in_everything_they_name():
    seeds = {sample_seed(*key) for key in np.ndindex(3, 3, 3, 3, 3)}
    assert len(seeds) == 3**5
    assert sample_seed(1, 11, 0, 0, 0) != sample_seed(11, 1, 0, 0, 0)
    assert all(0 <= word < 2**32 for seed in seeds for word in words(seed))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1, 1), Sampling(1, 1, temperature=0.7, top_k=6), Sampling(1, 1, temperature=1.5, top_p=0.8)],
)
def test_frequencies_are_those_of_the_softmax(sampling):
    logits = torch.linspace(-2, 2, 12).expand(40_000, 12)
    seeds = torch.randint(0, 2**32, (40_000, 2), generator=torch.Generator().manual_seed(0))
    tokens = draw(logits, seeds, torch.arange(40_000) % 100, sampling).tokens
    probabilities = drawn_from(logits[:1], sampling)[0].exp().double().numpy()
    counts = np.bincount(tokens.numpy(), minlength=12)
    possible = probabilities > 0
    assert not counts[~possible].any()
    assert chi_square_is_ordinary(counts[possible], 40_000 * probabilities[possible])


def transformers_way(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probs that transformers samples from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return torch.log_softmax(warpers(torch.zeros(len(logits), 1, dtype=torch.long), logits), 1)


@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(2, 300),
    spread=st.floats(0.1, 8.0),
    temperature=st.floats(0.2, 3.0),
    top_k=st.none() | st.integers(1, 400),
    top_p=st.just(1.0) | st.floats(0.05, 0.999),
    min_p=st.just(0.0) | st.floats(0.001, 0.9),
)
def test_the_distribution_is_that_of_transformers_warpers(
    seed, vocabulary, spread, temperature, top_k, top_p, min_p
):
    logits = spread * torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(1, 1, temperature, top_p, top_k, min_p)
    ours, theirs = drawn_from(logits, sampling), transformers_way(logits, sampling)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.allclose(ours.exp(), theirs.exp(), atol=1e-6)
    assert torch.allclose(ours.exp().sum(1), torch.ones(4), atol=1e-5)


def test_filters_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    third = torch.tensor([[0.625, 0.375, 0.0, 0.0]])
    assert torch.allclose(drawn_from(logits, Sampling(1, 1, top_k=2)).exp(), third)
    assert torch.allclose(drawn_from(logits, Sampling(1, 1, top_p=0.7)).exp(), third)
    assert torch.allclose(drawn_from(logits, Sampling(1, 1, min_p=0.4)).exp(), third)
    assert torch.allclose(
        drawn_from(logits, Sampling(1, 1, temperature=0.5)).exp(),
        logits.exp() ** 2 / (logits.exp() ** 2).sum(),
    )


@pytest.mark.parametrize("sampling", [Sampling(1, 1, 0.6), Sampling(1, 1, 0.6, 0.9, 20, 0.02)])
def test_log_probs_are_the_policys_and_less_the_kept_mass_those_of_the_distribution_drawn_from(sampling):
    logits = 3 * torch.randn(500, 40, generator=torch.Generator().manual_seed(1))
    drawn = draw(logits, SEEDS[:500], torch.arange(500), sampling)
    index = drawn.tokens[:, None]
    assert torch.equal(drawn.logprobs, torch.log_softmax(logits / 0.6, 1).gather(1, index)[:, 0])
    assert (drawn.kept is not None) is sampling.truncates
    narrow = drawn_from(logits, sampling)
    mass = (torch.softmax(logits.double() / 0.6, 1) * narrow.isfinite()).sum(1).log()
    kept = torch.zeros(500) if drawn.kept is None else drawn.kept
    torch.testing.assert_close(kept.double(), mass, rtol=0, atol=2e-6)
    torch.testing.assert_close(drawn.logprobs - kept, narrow.gather(1, index)[:, 0], rtol=0, atol=2e-6)
    assert not sampling.truncates or float(mass.min()) < -0.05


def test_greedy_takes_the_likeliest_token():
    logits = torch.randn(100, 40, generator=torch.Generator().manual_seed(1))
    drawn = draw(logits, SEEDS[:100], torch.arange(100), Sampling(1, 1, temperature=0.0))
    assert torch.equal(drawn.tokens, logits.argmax(1)) and not drawn.logprobs.any() and drawn.kept is None
