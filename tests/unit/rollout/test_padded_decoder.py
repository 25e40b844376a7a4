"""The refilled padded batch: tokens do not depend on it, and log-probs are those of one forward."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.errors import ConfigError
from orchestrator.core.rollouts import Sampling
from orchestrator.rollout.engines.engine import Request
from orchestrator.rollout.engines.padded_decoder import StaticDecoder
from tests.unit.rollout.decoding_cases import (
    CASES,
    EOS,
    SAMPLING,
    WINDOWED,
    Case,
    cut_at,
    forward_logprobs,
    kept_gap,
    letters,
    requests,
    same,
    worst_gap,
)

LLAMA = CASES[0].model()
REQUESTS = requests()
EXPECTED = StaticDecoder(LLAMA, EOS, 64, letters).generate(REQUESTS, SAMPLING)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rows", [6, 64])
def test_log_probs_are_those_of_one_forward(case, rows):
    model = case.model()
    found = StaticDecoder(model, EOS, rows, letters).generate(REQUESTS, SAMPLING)
    assert worst_gap(model, REQUESTS, found) < 1e-4
    assert max(len(c.ids) for cs in found for c in cs) > 20


@pytest.mark.parametrize("case", WINDOWED, ids=str)
def test_rollouts_are_long_enough_for_the_window_to_matter(case):
    model = case.model()
    found = StaticDecoder(model, EOS, 6, letters).generate(REQUESTS, SAMPLING)
    model.config.sliding_window = 1000
    assert worst_gap(model, REQUESTS, found) > 1e-2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_do_not_depend_on_rows_at_once(case):
    model = case.model()
    found = [StaticDecoder(model, EOS, rows, letters).generate(REQUESTS, SAMPLING) for rows in (1, 5, 9, 64)]
    assert all(same(found[0], other) for other in found[1:])


@given(
    order=st.permutations(range(len(REQUESTS))), take=st.integers(1, len(REQUESTS)), rows=st.integers(1, 30)
)
@settings(max_examples=15)
def test_tokens_do_not_depend_on_the_other_requests(order, take, rows):
    chosen = order[:take]
    found = StaticDecoder(LLAMA, EOS, rows, letters).generate([REQUESTS[i] for i in chosen], SAMPLING)
    assert same(found, [EXPECTED[i] for i in chosen])


def test_a_sample_is_the_same_alone_as_in_its_group():
    request = REQUESTS[0]
    alone = [
        StaticDecoder(LLAMA, EOS, 4, letters).generate([replace(request, seeds=(seed,))], SAMPLING)[0]
        for seed in request.seeds
    ]
    assert same([tuple(c for (c,) in alone)], EXPECTED[:1])
    assert len({tuple(c.ids.tolist()) for c in EXPECTED[0]}) > 1


def test_every_completion_ends_for_its_reason():
    reasons = set()
    for request, completions in zip(REQUESTS, EXPECTED, strict=True):
        assert len(completions) == len(request.seeds)
        for c in completions:
            ended = np.isin(c.ids, EOS)
            assert 1 <= len(c.ids) <= request.tokens_left and len(c.ids) == len(c.logprobs)
            assert not ended[:-1].any()
            assert c.finish == ("stop" if ended[-1] else "length")
            assert c.finish == "stop" or len(c.ids) == request.tokens_left
            reasons.add(c.finish)
    assert reasons == {"stop", "length"}


def test_ragged_lengths_are_refilled_many_times_over():
    """60 samples, six at a time; one in twenty tokens ends a sample."""
    many = requests(20, samples=3)
    found = StaticDecoder(LLAMA, EOS, 6, letters).generate(many, SAMPLING)
    assert worst_gap(LLAMA, many, found) < 1e-4
    lengths = {len(c.ids) for cs in found for c in cs}
    assert len(lengths) > 15
    assert same(found, StaticDecoder(LLAMA, EOS, 64, letters).generate(many, SAMPLING))


@pytest.mark.parametrize("cut", [1, 3])
def test_a_request_can_continue_where_another_stopped(cut):
    request, whole = max(zip(REQUESTS, EXPECTED, strict=True), key=lambda pair: pair[0].tokens_left)
    for seed, completion in zip(request.seeds, whole, strict=True):
        if len(completion.ids) <= cut:
            continue
        prompt = np.concatenate([request.prompt, completion.ids[:cut]])
        ((rest,),) = StaticDecoder(LLAMA, EOS, 4, letters).generate(
            [Request(prompt, (seed,), request.tokens_left - cut, cut)], SAMPLING
        )
        assert np.array_equal(rest.ids, completion.ids[cut:]) and rest.finish == completion.finish
        ((other,),) = StaticDecoder(LLAMA, EOS, 4, letters).generate(
            [Request(prompt, (seed,), request.tokens_left - cut, 0)], SAMPLING
        )
        assert not np.array_equal(other.ids, rest.ids)  # the position is part of the noise


@pytest.mark.parametrize("length", [1, 2, 30])
def test_a_stop_text_ends_a_completion_and_stays_in_it(length):
    """30 letters are longer than the decoded tail of tokens."""
    free = StaticDecoder(LLAMA, (), 64, letters).generate(REQUESTS, SAMPLING)
    longest = max((c for cs in free for c in cs), key=lambda c: len(c.ids))
    stop = (letters(longest.ids)[5 : 5 + length], "never written")
    found = StaticDecoder(LLAMA, (), 6, letters).generate(REQUESTS, replace(SAMPLING, stop=stop))
    stopped = 0
    for c, whole in zip((c for cs in found for c in cs), (c for cs in free for c in cs), strict=True):
        cut = cut_at(whole, stop)
        assert np.array_equal(c.ids, whole.ids[:cut])
        assert c.finish == ("stop" if stop[0] in letters(c.ids) else "length")
        stopped += c.finish == "stop"
    assert stopped >= 1


@pytest.mark.parametrize(
    "sampling",
    [replace(SAMPLING, temperature=0.7, top_k=50, top_p=0.9, min_p=0.01), replace(SAMPLING, temperature=2.0)],
)
def test_log_probs_are_the_policys_at_the_temperature(sampling):
    found = StaticDecoder(LLAMA, EOS, 6, letters).generate(REQUESTS, sampling)
    assert worst_gap(LLAMA, REQUESTS, found, sampling) < 1e-4
    assert worst_gap(LLAMA, REQUESTS, found) > 0.1
    if sampling.truncates:
        assert kept_gap(LLAMA, REQUESTS, found, sampling) < 1e-4
    else:
        assert all(c.kept is None for cs in found for c in cs)


def test_greedy_is_generate_without_sampling():
    for request in REQUESTS[:4]:
        ((found,),) = StaticDecoder(LLAMA, EOS, 6, letters).generate(
            [Request(request.prompt, (0,), 20)], Sampling(1, 20, temperature=0.0)
        )
        ids = torch.from_numpy(request.prompt)[None]
        output = LLAMA.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=list(EOS),
            pad_token_id=0,
        )
        assert output[0, len(request.prompt) :].tolist() == found.ids.tolist()


def test_new_weights_in_place_are_used_at_once():
    model = CASES[0].model()
    decoder = StaticDecoder(model, EOS, 6, letters)
    decoder.generate(REQUESTS, SAMPLING)
    for parameter in model.parameters():
        parameter.add_(
            torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())),
            alpha=0.05,
        )
    found = decoder.generate(REQUESTS, SAMPLING)
    assert worst_gap(model, REQUESTS, found) < 1e-4 < worst_gap(LLAMA, REQUESTS, found)


def test_nothing_to_do():
    assert StaticDecoder(LLAMA, EOS, 6, letters).generate([], SAMPLING) == []


@pytest.mark.parametrize("architecture", ["mamba", "jamba", "qwen3_next", "rwkv"])
def test_a_model_with_another_kind_of_cache_is_refused(architecture):
    with pytest.raises(ConfigError, match="keeps more than keys and values") as refusal:
        StaticDecoder(Case(architecture).model(), EOS, 6, letters)
    assert "vllm" in refusal.value.fix


def test_the_reference_of_these_tests_sees_a_wrong_token():
    completion = EXPECTED[0][0]
    wrong = replace(completion, ids=np.roll(completion.ids, 1))
    assert np.abs(forward_logprobs(LLAMA, REQUESTS[0].prompt, wrong) - completion.logprobs).max() > 0.1
