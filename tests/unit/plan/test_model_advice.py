"""Notes of `plan` on a model, and models that it rejects before anything is placed. Folders are real; of
weights only headers are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from orchestrator.core.errors import ConfigError, Exit, OrchestratorError
from orchestrator.models.classes import check_trainable
from orchestrator.models.tiny import byte_tokenizer
from orchestrator.plan.choice import Choice
from orchestrator.recipe.schema import (
    AlgorithmConfig,
    Batch,
    Data,
    Learners,
    Lora,
    Model,
    Optimizer,
    Recipe,
    RewardFunction,
    Rewards,
    Rollouts,
    Run,
    Source,
)
from orchestrator.run.planned_run import plan_run
from tests.architectures.journey import make_folder

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 32,
}
Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Makes a model folder of an architecture with the options of its configuration."""

    def made(
        kind: str, auto: Any = AutoModelForCausalLM, tokens: tuple[str, ...] = (), **options: Any
    ) -> Path:
        tokenizer = byte_tokenizer()
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            kind, **{**SIZES, "vocab_size": len(tokenizer), "pad_token_id": 0, **options}
        )
        auto.from_config(config).save_pretrained(tmp_path / kind)
        tokenizer.add_tokens(list(tokens))
        tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return made


def recipe(path: Path, **sections: Any) -> Recipe:
    rest: dict[str, Any] = {
        "data": Data(train=[Source(path="toy:sft", max_rows=8)]),
        "algorithm": AlgorithmConfig(name="sft"),
        "batch": Batch(effective=4, micro_batch=2),
        "optimizer": Optimizer(learning_rate=1e-3),
        "learners": Learners(workers=1, zero_stage=0, activation_checkpointing="none"),
        "run": Run(max_steps=1),
    }
    return Recipe(model=Model(path=str(path), lora=sections.pop("lora", None)), **{**rest, **sections})


def notes(path: Path, **sections: Any) -> dict[str, Choice]:
    return {
        choice.name: choice for choice in plan_run(recipe(path, **sections), Console(quiet=True)).plan.choices
    }


def refusal(path: Path, **sections: Any) -> OrchestratorError:
    with pytest.raises(OrchestratorError) as error:
        plan_run(recipe(path, **sections), Console(quiet=True))
    return error.value


def edited(path: Path, name: str = "config.json", **values: Any) -> Path:
    file = path / name
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **values}))
    return path


# ---- tables


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {"n_positions": 8}),
        ("opt", {"max_position_embeddings": 8, "ffn_dim": 64}),
        ("gptj", {"n_positions": 8, "rotary_dim": 4}),
    ],
)
def test_rows_longer_than_a_table_of_positions_are_refused(folder, kind, options):
    error = refusal(folder(kind, **options))
    assert isinstance(error, ConfigError)
    assert "8 positions" in error.what and "data.max_length=8" in error.fix


def test_a_rollout_of_full_length_counts(folder):
    online = {
        "data": Data(train=[Source(path="toy:prompts", max_rows=8)], max_length=128),
        "algorithm": AlgorithmConfig(name="grpo"),
        "rollouts": Rollouts(prompts=2, samples=2, max_new_tokens=100),
        "rewards": Rewards(functions=[RewardFunction(name="exact", function="exact_match")]),
    }
    assert "64 positions" in refusal(folder("gpt2", n_positions=64), **online).what


def test_rotary_positions_beyond_the_trained_ones_are_a_note(folder):
    path = folder("llama", max_position_embeddings=512)
    assert notes(path)["positions"].value == "1024 of 512", "the recipe allows more than the rows here have"
    assert "positions" not in notes(
        path, data=Data(train=[Source(path="toy:sft", max_rows=8)], max_length=512)
    )


def test_a_table_that_the_rows_fit_into_is_a_note_where_the_recipe_allows_more(folder):
    assert notes(folder("gpt2", n_positions=64))["positions"].value.endswith(" of 64")


def test_a_token_without_a_row_in_the_embedding_is_named(folder):
    path = folder("llama", tokens=("<|mood|>",))
    template = "{% for m in messages %}<|mood|>{{ m['content'] }}{% endfor %}"
    (path / "chat_template.jinja").write_text(template)
    rows = path / "rows.jsonl"
    rows.write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
        + "\n"
    )
    error = refusal(path, data=Data(train=str(rows)), batch=Batch(effective=1, micro_batch=1))
    assert "<|mood|>" in error.what and "rows" in error.why and error.exit_code == Exit.CONFIG


def test_frequencies_that_follow_the_batch_are_fixed_and_reported(folder):
    found = notes(folder("phi3", rope_parameters=LONG_ROPE, max_position_embeddings=128))
    assert found["positions"].value == "longrope" and "data.max_length=1024" in found["positions"].reason


# ---- experts, adapters, exports


def test_a_declared_balancing_loss_is_reported_as_left_out(folder):
    found = notes(folder("mixtral", num_local_experts=4, router_aux_loss_coef=0.02))
    assert found["balancing loss"].value == "not learned yet" and "0.02" in found["balancing loss"].reason
    assert "activations" not in found, "experts in fp32 are followed without computing them"


def test_experts_without_adapters_are_reported(folder):
    found = notes(
        folder("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=8), lora=Lora(rank=2)
    )
    assert found["adapters"].value == "none in the experts"


def test_a_target_that_no_layer_has_is_refused_with_close_names(folder):
    error = refusal(folder("llama"), lora=Lora(rank=2, target_modules=["q_proj", "v_porj"]))
    assert "'v_porj'" in error.what and "v_proj" in error.fix


def test_sampling_flags_beside_greedy_are_fixed_and_reported(folder):
    path = edited(folder("llama"), "generation_config.json", do_sample=False, temperature=0.6, top_p=0.9)
    found = notes(path)
    assert found["generation config"].value == "changed" and "do_sample" in found["generation config"].reason


# ---- what cannot be trained


def test_an_encoder_with_a_decoder_is_refused(folder):
    error = refusal(
        folder(
            "t5",
            AutoModelForSeq2SeqLM,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )
    assert (
        isinstance(error, ConfigError)
        and "model.path" in error.what
        and "encoder with a decoder" in error.what
    )


def test_an_encoder_that_sees_both_sides_is_refused(folder):
    error = refusal(folder("bert"))
    assert "lets a token see those after it" in error.what and "is_decoder" in error.fix


def test_an_unknown_model_type_is_refused(folder):
    error = refusal(edited(folder("llama"), model_type="llama-99"))
    assert isinstance(error, ConfigError) and "model.path" in error.what and "llama-99" in error.why


def test_a_drafter_for_another_model_is_refused():
    with pytest.raises(ConfigError, match="drafts for another model"):
        check_trainable(AutoConfig.for_model("gemma4_assistant"), "model.path: here")


def test_a_head_whose_last_rows_are_left_out_is_refused():
    sizes = {**SIZES, "vocab_size": 320}
    check_trainable(
        AutoConfig.for_model("inkling_text", **sizes, unpadded_vocab_size=320), "model.path: here"
    )
    with pytest.raises(ConfigError, match="unpadded_vocab_size=300"):
        check_trainable(
            AutoConfig.for_model("inkling_text", **sizes, unpadded_vocab_size=300), "model.path: here"
        )


def test_a_table_of_positions_that_no_text_reaches_does_not_count(tmp_path):
    """phi4_multimodal's tower for pictures has one of four rows."""
    make_folder("phi4_multimodal", tmp_path)
    assert "embed_tokens_extend" in notes(tmp_path)["not trained"].reason, "and nothing is refused"


def test_packed_weights_are_refused(folder):
    error = refusal(
        edited(folder("llama"), quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    )
    assert isinstance(error, ConfigError) and "bitsandbytes" in error.what


def test_weights_that_were_cut_off_are_a_missing_input(folder):
    path = folder("llama")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    error = refusal(path)
    assert error.exit_code == Exit.NO_INPUT and "model.safetensors is broken" in error.what


def test_a_shard_that_the_index_names_has_to_be_there(folder):
    path = edited(
        folder("llama"), "model.safetensors.index.json", weight_map={"a": "model-00002-of-00002.safetensors"}
    )
    error = refusal(path)
    assert error.exit_code == Exit.NO_INPUT and "model-00002-of-00002.safetensors is not there" in error.what


def test_checkpointing_of_an_architecture_without_it_is_refused(folder):
    path = folder("ctrl", n_embd=32, n_layer=2, n_head=4, dff=64, n_positions=128)
    assert (
        "activation_checkpointing=full is not possible"
        in refusal(path, learners=Learners(workers=1, activation_checkpointing="full")).what
    )
    assert notes(path, learners=Learners(workers=1))["checkpointing"].value == "none"
