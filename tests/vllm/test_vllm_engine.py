"""The real vLLM on tiny models: its log-probs against a transformers forward, weight updates, seeds, and ends
of sequences."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.core.errors import ConfigError, DataError, OrchestratorError
from orchestrator.core.rollouts import Completion, Sampling
from orchestrator.models.load import load
from orchestrator.models.weight_buckets import Bucket, CorruptWeights, checksum, fill, plan_bucket
from orchestrator.recipe.schema import Model, Recipe, TinyModel
from orchestrator.rollout.engines.engine import Request
from orchestrator.rollout.engines.sampling import drawn_from, policy_logps
from orchestrator.rollout.engines.transformers_engine import TransformersEngine
from orchestrator.rollout.worker import make_engine

INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="vllm is not installed: run `make test-vllm`")
CPU = torch.device("cpu")
CLOSE = 1e-4
"""Largest difference of log-probs in nat. Measured: at most 4e-6."""
PEAKED = 12.0
"""Factor of the head's weights, which makes distributions peaked, so that sampling parameters matter."""
PROMPTS = [np.arange(10, 40), np.array([50, 60, 70]), np.arange(100, 240)]
FREE = Sampling(samples=4, max_new_tokens=24)


def recipe(model: dict[str, Any], engine: str = "vllm", **rollouts: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": model,
            "data": {"train": "toy:arithmetic", "max_length": 256},
            "algorithm": {"name": "grpo"},
            "optimizer": {"learning_rate": 1e-3},
            "rollouts": {"engine": engine, "rows_at_once": 16, **rollouts},
        }
    )


def tiny(architecture: str, **sizes: int) -> dict[str, Any]:
    """A tiny model with heads of 32 values, the smallest that vLLM supports on a CPU."""
    return {"tiny": {"architecture": architecture, "heads": 2, **sizes}}


def peaked(model: Any, seed: int, scale: float = PEAKED) -> Any:
    """The model with different weights, and a head scaled by `scale`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        model.get_output_embeddings().weight.mul_(scale)
    return model.eval()


def buckets(model: Any) -> list[Bucket]:
    """The weights as learners send them, in two buckets."""
    named = list(model.named_parameters())
    sent = []
    for half in (named[: len(named) // 2], named[len(named) // 2 :]):
        entries, total = plan_bucket([(name, tuple(p.shape)) for name, p in half], torch.float32)
        flat = fill(entries, total, dict(half), CPU)
        sent.append(Bucket(entries, flat.numpy(), checksum(flat)))
    return sent


def logits(model: Any, prompt: np.ndarray, ids: np.ndarray) -> Tensor:
    """Logits Float[S, V] for each of ids, from a forward over the whole sequence."""
    with torch.no_grad():
        all_logits = model(torch.from_numpy(np.concatenate([prompt, ids]))[None]).logits[0]
    return all_logits[len(prompt) - 1 : -1]


def gap(
    model: Any, requests: Sequence[Request], completions: Sequence[tuple[Completion, ...]], sampling: Sampling
) -> float:
    """Largest difference between the returned log-probs and the policy's, from the transformers logits. Also
    checks that the sampler allows every token."""
    worst = 0.0
    for request, drawn in zip(requests, completions, strict=True):
        assert len(drawn) == len(request.seeds)
        for c in drawn:
            z, index = logits(model, request.prompt, c.ids), torch.from_numpy(c.ids)[:, None]
            logps = policy_logps(z, sampling).gather(1, index)[:, 0]
            assert drawn_from(z, sampling).gather(1, index).isfinite().all()
            worst = max(worst, float((logps - torch.from_numpy(c.logprobs)).abs().max()))
    return worst


def requests(room: int = 24, samples: int = 4) -> list[Request]:
    return [
        Request(p, tuple(2**64 - 1 - 1000 * i - k for k in range(samples)), room)
        for i, p in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Any, Any]]:
    """(engine, a transformers model with other weights)."""
    cfg = recipe(tiny("llama", kv_heads=1))
    engine = make_engine(cfg, CPU)
    yield engine, peaked(load(cfg.model, seed=0, head="lm").model, 1)
    engine.close()


@pytest.fixture
def held(shared: tuple[Any, Any]) -> tuple[Any, Any]:
    """`shared`, with the model's weights loaded as version 1."""
    engine, model = shared
    engine.load(1, buckets(model))
    return engine, model


def same(a: Completion, b: Completion) -> bool:
    return (
        a.ids.tolist() == b.ids.tolist()
        and a.finish == b.finish
        and bool(np.abs(a.logprobs - b.logprobs).max() < CLOSE)
    )


@needs_vllm
def test_log_probs_follow_the_weights_and_no_stale_prefix_is_read(shared: tuple[Any, Any]) -> None:
    engine, second = shared
    first = load(
        Model(tiny=TinyModel(architecture="llama", heads=2, kv_heads=1)), seed=7, head="lm"
    ).model.eval()
    engine.load(1, buckets(first))
    before = engine.generate(requests(), FREE)
    assert engine.version == 1 and gap(first, requests(), before, FREE) < CLOSE
    engine.load(2, buckets(second))
    after = engine.generate(requests(), FREE)  # the same prompts, which the prefix cache held
    assert engine.version == 2 and gap(second, requests(), after, FREE) < CLOSE
    assert gap(first, requests(), after, FREE) > 1.0


@needs_vllm
@pytest.mark.parametrize(
    "drawn",
    [
        {"temperature": 0.6},
        {"temperature": 0.005},
        {"temperature": 3.0},
        {"temperature": 1.7, "top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 500},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 10, "min_p": 0.05},
        {"temperature": 0.7, "top_p": 0.9, "stop": ("a", "e", "i", "o")},
    ],
    ids=str,
)
def test_log_probs_are_the_policys_for_every_sampler(held: tuple[Any, Any], drawn: dict[str, Any]) -> None:
    """So every weight is 1 on policy. vLLM's own limits of the temperature, 0.01 and 2, do not apply."""
    engine, model = held
    sampling = replace(FREE, **drawn)
    assert gap(model, requests(), engine.generate(requests(), sampling), sampling) < CLOSE / min(
        1.0, sampling.temperature
    )


@needs_vllm
def test_token_frequencies_are_those_of_the_narrowed_policy(held: tuple[Any, Any]) -> None:
    """The temperature acts on the sampled tokens and not only on the reported log-probs. Counts the first
    tokens of 2,000 samples."""
    engine, model = held
    sampling = replace(FREE, temperature=1.6, top_k=6, max_new_tokens=1)
    request = Request(PROMPTS[0], tuple(range(2000)), 1)
    (completions,) = engine.generate([request], sampling)
    counts = np.bincount([int(c.ids[0]) for c in completions], minlength=300)
    expected = 2000 * drawn_from(logits(model, request.prompt, np.array([0])), sampling)[0].exp().numpy()
    counts, possible = counts[: len(expected)], expected > 0
    assert not counts[~possible].any() and possible.sum() == 6
    freedom = int(possible.sum()) - 1
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < freedom + 5 * np.sqrt(
        2 * freedom
    )


@needs_vllm
def test_top_p_applies_after_min_p(held: tuple[Any, Any]) -> None:
    """vLLM's order: no token is sampled that this order excludes, and it excludes some that ours keeps."""
    engine, model = held
    both = replace(FREE, top_p=0.8, min_p=0.2)
    completions = engine.generate(requests(samples=16), both)
    assert gap(model, requests(samples=16), completions, both) < CLOSE
    orders_differ = False
    for request, drawn in zip(requests(samples=16), completions, strict=True):
        for c in drawn:
            z, index = logits(model, request.prompt, c.ids), torch.from_numpy(c.ids)[:, None]
            kept = z.masked_fill(torch.isinf(drawn_from(z, replace(FREE, min_p=0.2))), -torch.inf)
            theirs = drawn_from(kept, replace(FREE, top_p=0.8)).isfinite()
            assert theirs.gather(1, index).all()
            orders_differ |= not torch.equal(theirs, drawn_from(z, both).isfinite())
    assert orders_differ


@needs_vllm
def test_greedy_is_the_transformers_engine(held: tuple[Any, Any]) -> None:
    engine, model = held
    other = TransformersEngine(recipe(tiny("llama", kv_heads=1), "transformers", batching="static"), CPU)
    other.load(1, buckets(model))
    greedy = replace(FREE, temperature=0.0)
    for stop in ((), tuple("aeiouAEIOU")):
        prompts = requests(room=100, samples=1)
        ours = engine.generate(prompts, replace(greedy, stop=stop))
        for (a,), (b,) in zip(ours, other.generate(prompts, replace(greedy, stop=stop)), strict=True):
            assert same(a, b) and not a.logprobs.any()


@needs_vllm
def test_a_damaged_bucket_is_refused_and_no_version_is_held(held: tuple[Any, Any]) -> None:
    engine, model = held
    good = buckets(model)
    data = good[1].data.copy()
    data[len(data) // 2] ^= 1
    with pytest.raises(CorruptWeights, match="bucket 1 of weight version 5"):
        engine.load(5, [good[0], Bucket(good[1].entries, data, good[1].checksum)])
    assert engine.version is None
    with pytest.raises(OrchestratorError, match="not the whole model"):
        engine.load(5, good[:1])
    assert engine.version is None
    wider = load(recipe(tiny("llama", kv_heads=1, intermediate_size=256)).model, seed=0, head="lm").model
    with pytest.raises(OrchestratorError, match="not the whole model"):
        engine.load(5, buckets(wider))
    assert engine.version is None
    engine.load(5, good)
    assert engine.version == 5 and gap(model, requests(), engine.generate(requests(), FREE), FREE) < CLOSE


@needs_vllm
def test_buckets_of_a_broadcast_count_once_they_are_committed(held: tuple[Any, Any]) -> None:
    engine, _ = held
    other = peaked(load(recipe(tiny("llama", kv_heads=1)).model, seed=3, head="lm").model, 4)
    for bucket in buckets(other):
        flat = torch.from_numpy(bucket.data.copy())
        engine.take(bucket.entries, flat)
        flat.zero_()  # the sender uses its buffer again
        assert engine.version is None
    engine.commit(2)
    assert engine.version == 2 and gap(other, requests(), engine.generate(requests(), FREE), FREE) < CLOSE
    engine.take(bucket.entries, flat)
    engine.commit(None)
    assert engine.version is None
    with pytest.raises(OrchestratorError, match="not the whole model"):
        engine.commit(3)


@needs_vllm
def test_a_sample_does_not_depend_on_the_other_requests(held: tuple[Any, Any]) -> None:
    engine, _ = held
    prompts = requests()
    together = engine.generate(prompts, FREE)
    for request, drawn in zip(prompts, together, strict=True):
        assert len({tuple(c.ids.tolist()) for c in drawn}) == len(drawn)  # different seeds, different samples
        for seed, c in zip(request.seeds, drawn, strict=True):
            (alone,) = engine.generate([replace(request, seeds=(seed,))], FREE)[0]
            assert same(alone, c)


@needs_vllm
def test_a_second_turn_draws_other_noise(held: tuple[Any, Any]) -> None:
    engine, _ = held
    turns = [
        Request(PROMPTS[0], (17,), 24),
        Request(PROMPTS[0], (17,), 24, position=24),
        Request(PROMPTS[0], (17,), 24),
    ]
    (first,), (later,), (again,) = engine.generate(turns, FREE)
    assert same(first, again) and later.ids.tolist() != first.ids.tolist()


@needs_vllm
def test_eos_is_the_last_token_and_room_is_the_longest(held: tuple[Any, Any]) -> None:
    engine, model = held
    hot = replace(FREE, temperature=2.0)
    prompts = [replace(r, tokens_left=room) for r, room in zip(requests(samples=32), (64, 3, 1), strict=True)]
    completions = engine.generate(prompts, hot)
    eos = load(recipe(tiny("llama")).model, seed=0, head="lm").tokenizer.eos_token_id
    assert {c.finish for c in completions[0]} == {"stop", "length"}
    for request, drawn in zip(prompts, completions, strict=True):
        for c in drawn:
            assert len(c.ids) == len(c.logprobs) and eos not in c.ids[:-1].tolist()
            assert (c.ids[-1] == eos) if c.finish == "stop" else (len(c.ids) == request.tokens_left)
    assert gap(model, prompts, completions, hot) < CLOSE  # eos included


@needs_vllm
def test_a_stop_text_of_two_tokens_ends_a_completion_and_stays(held: tuple[Any, Any]) -> None:
    engine, model = held
    tokenizer = load(recipe(tiny("llama")).model, seed=0, head="lm").tokenizer
    prompts = requests(room=64, samples=8)
    free = [c for drawn in engine.generate(prompts, FREE) for c in drawn]
    # ids below 94 are printable ASCII
    pairs = ((c, i) for c in free for i in range(len(c.ids) - 3) if max(c.ids[i : i + 2]) < 94)
    chosen, at = next(pairs)
    stopping = replace(FREE, stop=(tokenizer.decode(chosen.ids[at : at + 2].tolist()),))
    stopped = engine.generate(prompts, stopping)
    position = next(i for i, c in enumerate(free) if c is chosen)
    ended = stopped[position // 8][position % 8]
    assert ended.finish == "stop" and len(ended.ids) <= at + 2
    assert ended.ids.tolist() == chosen.ids[: len(ended.ids)].tolist()
    assert tokenizer.decode(ended.ids.tolist()).endswith(stopping.stop[0])
    assert gap(model, prompts, stopped, stopping) < CLOSE


@needs_vllm
def test_requests_that_vllm_would_truncate_are_refused(held: tuple[Any, Any]) -> None:
    engine, _ = held
    with pytest.raises(DataError, match=r"data\.max_length=256"):
        engine.generate(requests(room=200), FREE)
    assert engine.generate([], FREE) == []


@needs_vllm
@pytest.mark.parametrize(("architecture", "tied"), [("gemma", True), ("gpt2", True), ("qwen2", False)])
def test_a_folder_with_a_tied_head_and_two_ends(tmp_path: Path, architecture: str, tied: bool) -> None:
    loaded = load(Model(tiny=TinyModel(architecture=architecture, heads=2)), seed=0, head="lm")
    model: Any = loaded.model
    model.generation_config.eos_token_id = [loaded.tokenizer.eos_token_id, 64]
    model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    assert ("lm_head.weight" not in dict(model.named_parameters())) is tied
    with closing(make_engine(recipe({"path": str(tmp_path)}), CPU)) as engine:
        assert engine.version is None and engine.eos == [258, 64]
        first = engine.generate(requests(), FREE)  # with the folder's own weights
        assert gap(model.eval(), requests(), first, FREE) < CLOSE
        for version in (1, 2):
            changed = peaked(model, version, scale=1.0)
            engine.load(version, buckets(changed))
            completions = engine.generate(requests(samples=16), FREE)
            assert gap(changed, requests(samples=16), completions, FREE) < CLOSE
        assert {c.ids[-1] for drawn in completions for c in drawn if c.finish == "stop"} <= {258, 64}


@needs_vllm
@pytest.mark.parametrize(
    ("model", "rollouts", "reason"),
    [
        (tiny("llama") | {"lora": {"rank": 4}}, {}, "LoRA"),
        (tiny("mixtral"), {}, "other names"),
        (tiny("llama", max_positions=128), {}, "vLLM refuses the model"),
        (tiny("llama", hidden_size=32), {}, "heads of 16 values"),
    ],
    ids=["lora", "converted", "positions", "heads"],
)
def test_a_recipe_that_this_engine_cannot_run_is_refused(
    model: dict[str, Any], rollouts: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_engine(recipe(model, **rollouts), CPU)
    assert reason in str(caught.value) and caught.value.fix


@pytest.mark.skipif(INSTALLED, reason="vllm is installed")
def test_the_fix_for_a_missing_package_is_to_install_it() -> None:
    with pytest.raises(ConfigError, match="pip install"):
        make_engine(recipe(tiny("llama")), CPU)
