"""Model FLOPs: by hand for a Llama of 7B, and the peaks they are compared with."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen3Config

from orchestrator.algorithms.table import build
from orchestrator.core.reports import LearnReport
from orchestrator.learner.probes import sheet_flops
from orchestrator.models.attention import attention_windows
from orchestrator.observe.metrics import Throughput
from orchestrator.recipe.schema import AlgorithmConfig, Data, Model, Optimizer, Recipe, TinyModel
from orchestrator.run.startup import measured_throughput, model_flops

LLAMA = LlamaConfig(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000
)
BODY = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)


def test_flops_of_a_7b_llama_are_six_per_weight_and_twelve_per_pair_and_channel():
    flops = model_flops(LLAMA, head=True, frozen=False)
    assert flops.flops_per_position == 6 * BODY
    assert flops.flops_per_scored == 6 * 4096 * 32000
    assert flops.flops_per_pair == 12 * 4096


def test_frozen_weights_have_no_gradient_and_a_reward_model_no_vocabulary():
    flops = model_flops(LLAMA, head=False, frozen=True)
    assert flops.flops_per_position == pytest.approx(4 * BODY)
    assert (flops.flops_per_scored, flops.flops_per_pair) == (0.0, 12 * 4096)


def test_flops_that_are_not_known_leave_the_metric_out_with_a_note():
    """DeepSeek's configuration lacks a field that TRL's count reads."""
    tiny = Model(tiny=TinyModel(architecture="deepseek_v3"))
    recipe = Recipe(
        model=tiny,
        data=Data(train="none"),
        algorithm=AlgorithmConfig(name="sft"),
        optimizer=Optimizer(learning_rate=1e-3),
    )
    notes: list[str] = []
    plan: Any = SimpleNamespace(recipe=recipe)
    no_group: Any = SimpleNamespace()
    assert measured_throughput(plan, build(recipe.algorithm), no_group, notes.append) == Throughput()
    assert "deepseek_v3" in notes[0] and "perf/mfu" in notes[0]


def test_utilisation_counts_each_kind_of_work_once():
    report = LearnReport(
        0.0, {}, 1, tokens=9, computed=5, scored_tokens=2, positions=7, seconds=2.0, attended=3
    )
    assert Throughput(10.0, 100.0, 1000.0, 2350.0).mfu(report) == pytest.approx(
        100 * (50 + 300 + 2000) / 2 / 2350
    )
    assert Throughput(10.0, 100.0, 1000.0, None).mfu(report) is None


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bf16_autocast", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA H100 PCIe", "fp32", 51e12),
        ("NVIDIA H200", "fp32", 67e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA A10G", "fp32", 31.2e12),
        ("NVIDIA L40S", "fp32", 91.6e12),
        ("a card of tomorrow", "fp32", None),
    ],
)
def test_the_peak_of_a_card(device, precision, peak):
    assert sheet_flops(device, precision) == peak


def test_each_layer_has_the_window_of_its_kind():
    kinds = ["sliding_attention", "full_attention"]
    mixed = Qwen3Config(num_hidden_layers=2, layer_types=kinds, sliding_window=64, use_sliding_window=True)
    assert attention_windows(mixed) == (64, None)
    assert attention_windows(LLAMA) == (None,) * 32
    assert attention_windows(MistralConfig(num_hidden_layers=3, sliding_window=128)) == (128,) * 3
