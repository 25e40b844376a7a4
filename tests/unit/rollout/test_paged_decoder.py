"""Continuous batching: the static decoder's tokens whatever the batch, and never a key of old weights."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from orchestrator.core.rollouts import Sampling
from orchestrator.models.load import load
from orchestrator.recipe.schema import Model, Rollouts, TinyModel
from orchestrator.rollout.engines import paged_decoder as continuous
from orchestrator.rollout.engines.engine import Request
from orchestrator.rollout.engines.padded_decoder import StaticDecoder
from orchestrator.rollout.engines.paged_decoder import (
    ContinuousBatchingFailed,
    ContinuousDecoder,
)
from orchestrator.rollout.engines.transformers_engine import make_decoder
from tests.unit.rollout.decoding_cases import (
    CASES,
    EOS,
    MIXED,
    SAMPLING,
    Case,
    letters,
    requests,
    same,
    worst_gap,
)

LLAMA = CASES[0].model()
REQUESTS = requests()
EXPECTED = StaticDecoder(LLAMA, EOS, 64, letters).generate(REQUESTS, SAMPLING)


def update(model: Any) -> None:
    """New weights in place, as a learner sends them."""
    for parameter in model.parameters():
        parameter.add_(
            torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())),
            alpha=0.05,
        )


@pytest.mark.parametrize(
    "case", [*CASES[:-1], Case("gemma3_text", MIXED), Case("qwen3"), Case("gpt_neox")], ids=str
)
def test_tokens_are_those_of_the_static_decoder(case):
    model = case.model()
    expected = StaticDecoder(model, EOS, 9, letters).generate(REQUESTS, SAMPLING)
    found = ContinuousDecoder(model, EOS, 9, letters).generate(REQUESTS, SAMPLING)
    assert same(found, expected)
    assert worst_gap(model, REQUESTS, found) < 1e-4


@pytest.mark.parametrize("rows", [1, 4, 5, 64])
def test_tokens_do_not_depend_on_rows_at_once(rows):
    assert same(ContinuousDecoder(LLAMA, EOS, rows, letters).generate(REQUESTS, SAMPLING), EXPECTED)


@pytest.mark.parametrize("order", [[6, 0], [3], [5, 4, 3, 2, 1, 0, 6]])
def test_tokens_do_not_depend_on_the_other_requests(order):
    found = ContinuousDecoder(LLAMA, EOS, 8, letters).generate([REQUESTS[i] for i in order], SAMPLING)
    assert same(found, [EXPECTED[i] for i in order])


def test_prompts_longer_than_a_step_and_groups_larger_than_the_rows():
    random = np.random.default_rng(0)
    long = [
        Request(random.integers(16, 250, length), tuple(range(10 * i, 10 * i + 6)), 12)
        for i, length in enumerate((190, 200, 3))
    ]
    assert same(
        ContinuousDecoder(LLAMA, EOS, 4, letters).generate(long, SAMPLING),
        StaticDecoder(LLAMA, EOS, 64, letters).generate(long, SAMPLING),
    )


@pytest.mark.parametrize(
    "sampling",
    [
        replace(SAMPLING, temperature=0.7, top_k=50, top_p=0.9, min_p=0.01),
        replace(SAMPLING, temperature=0.0),
        replace(SAMPLING, stop=("ab", "q")),
    ],
    ids=["filtered", "greedy", "stop texts"],
)
def test_every_way_of_sampling_is_the_static_decoders(sampling):
    expected = StaticDecoder(LLAMA, EOS, 64, letters).generate(REQUESTS, sampling)
    assert same(ContinuousDecoder(LLAMA, EOS, 8, letters).generate(REQUESTS, sampling), expected)
    assert not same(expected, EXPECTED)


def test_a_request_can_go_on_where_another_stopped():
    request, (completion, *_) = max(
        zip(REQUESTS, EXPECTED, strict=True), key=lambda pair: len(pair[1][0].ids)
    )
    prompt = np.concatenate([request.prompt, completion.ids[:3]])
    ((rest,),) = ContinuousDecoder(LLAMA, EOS, 4, letters).generate(
        [Request(prompt, request.seeds[:1], request.tokens_left - 3, 3)], SAMPLING
    )
    assert np.array_equal(rest.ids, completion.ids[3:]) and rest.finish == completion.finish


def test_the_model_has_its_attention_back_and_no_thread_is_left():
    model = CASES[0].model()
    attention, threads = model.config._attn_implementation, threading.active_count()
    ContinuousDecoder(model, EOS, 4, letters).generate(REQUESTS[:2], SAMPLING)
    assert model.config._attn_implementation == attention
    assert threading.active_count() == threads


class SharedPages(ContinuousDecoder):
    """What the decoder must not be: pages shared between requests, in a manager that outlives a weight
    update."""

    kept: Any = None

    def _pages(self, requests: Sequence[Request]) -> ContinuousBatchingConfig:
        pages = super()._pages(requests)
        pages.allow_block_sharing = True
        return pages

    @contextmanager
    def _manager(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Any]:
        if self.kept is None:
            self.context = super()._manager(requests, sampling)
            self.kept = self.context.__enter__()
        yield self.kept

    def close(self) -> None:
        self.context.__exit__(None, None, None)


LONG = [Request(np.random.default_rng(1).integers(16, 250, 100), (1, 2), 10)]


def test_new_weights_in_place_are_used_for_the_prompt_too():
    model = CASES[0].model()
    decoder = ContinuousDecoder(model, EOS, 4, letters)
    assert worst_gap(model, LONG, decoder.generate(LONG, SAMPLING)) < 1e-5
    update(model)
    found = decoder.generate(LONG, SAMPLING)
    assert worst_gap(model, LONG, found) < 1e-5
    assert worst_gap(LLAMA, LONG, found) > 0.1


def test_pages_shared_across_a_weight_update_would_be_seen():
    model = CASES[0].model()
    decoder = SharedPages(model, EOS, 4, letters)
    try:
        assert worst_gap(model, LONG, decoder.generate(LONG, SAMPLING)) < 1e-5
        update(model)
        assert worst_gap(model, LONG, decoder.generate(LONG, SAMPLING)) > 0.1
    finally:
        decoder.close()


@pytest.mark.parametrize(
    "case", [Case("bloom"), Case("falcon"), Case("gptj", {"rotary_dim": 4}), CASES[-1]], ids=str
)
def test_a_model_with_an_attention_of_its_own_is_refused(case):
    with pytest.raises(ContinuousBatchingFailed, match="cannot decode with continuous batching") as refusal:
        ContinuousDecoder(case.model(), EOS, 6, letters)
    assert "static" in refusal.value.fix


def test_an_error_in_the_managers_thread_is_raised():
    """A prompt with a token that the model does not have."""
    model = CASES[0].model()
    threads = threading.active_count()
    with pytest.raises(ContinuousBatchingFailed, match="does not decode") as failure:
        ContinuousDecoder(model, EOS, 4, letters).generate(
            [Request(np.array([5, 10_000]), (1,), 5)], SAMPLING
        )
    assert "IndexError" in failure.value.why
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("batching", "device", "kind"),
    [
        ("static", "cuda", StaticDecoder),
        ("continuous", "cpu", ContinuousDecoder),
        ("auto", "cpu", StaticDecoder),
        ("auto", "cuda", ContinuousDecoder),
    ],
)
def test_the_recipe_and_the_device_name_the_decoder(batching, device, kind):
    loaded = load(Model(tiny=TinyModel()), seed=0, head="lm")  # pyright: ignore[reportCallIssue]
    rollouts = Rollouts(batching=batching)  # pyright: ignore[reportCallIssue]
    assert type(make_decoder(rollouts, loaded.model, loaded.tokenizer, torch.device(device))) is kind


def test_auto_is_static_if_the_model_reads_no_pages(capsys):
    tokenizer = load(Model(tiny=TinyModel()), seed=0, head="lm").tokenizer  # pyright: ignore[reportCallIssue]
    rollouts = Rollouts(batching="auto")  # pyright: ignore[reportCallIssue]
    decoder = make_decoder(rollouts, Case("bloom").model(), tokenizer, torch.device("cuda"))
    assert type(decoder) is StaticDecoder
    assert "BloomForCausalLM cannot decode" in capsys.readouterr().out


@dataclass(frozen=True)
class OfTransformers518:
    """Settings of transformers 5.18, where pages are called blocks and no kernel can be chosen."""

    block_size: int = 32
    num_blocks: int | None = None


def test_another_release_of_transformers_is_static_or_an_error_with_the_version_to_install(
    monkeypatch, capsys
):
    monkeypatch.setattr(continuous, "ContinuousBatchingConfig", OfTransformers518)
    tokenizer = load(Model(tiny=TinyModel()), seed=0, head="lm").tokenizer  # pyright: ignore[reportCallIssue]
    rollouts = Rollouts(batching="continuous")  # pyright: ignore[reportCallIssue]
    with pytest.raises(ContinuousBatchingFailed, match="transformers") as refused:
        make_decoder(rollouts, LLAMA, tokenizer, torch.device("cpu"))
    assert "page_size" in refused.value.why and "transformers>=5.19" in refused.value.fix
    rollouts = Rollouts(batching="auto")  # pyright: ignore[reportCallIssue]
    assert type(make_decoder(rollouts, LLAMA, tokenizer, torch.device("cuda"))) is StaticDecoder
    assert "rollouts.batching=auto: static" in capsys.readouterr().out
