"""A small model of any architecture of transformers: its default configuration with small sizes, which are
chosen by the names of the fields.

    model type --default configuration--> fields --RULES (first match of a name)--> small configuration

The rules contain words (heads, experts, rank, ...), not models. EXCEPTIONS has the sizes that depend on the
model.
"""

import dataclasses
import re
from typing import Any

from transformers import AutoConfig, PretrainedConfig

VOCABULARY, POSITIONS = 320, 512
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16

RULES: tuple[tuple[str, int], ...] = (
    (r"(num|n)_(hidden_layers|layers?)|num_blocks|depth|(encoder|decoder|prelude|coda|core)_layers", 2),
    (r"num_(encoder|decoder)_layers|num_hidden_groups", 2),
    (
        r".*max_(position|source_position|target_position)(_embedding)?s|n_positions|n_ctx|seq_length",
        POSITIONS,
    ),
    (r"max_seq(_?uence)?_?(len|length)|max_sequence_length", POSITIONS),
    (r"image_size|input_size", 28),
    (r"(patch|temporal_patch)_size", 14),
    (r"num_channels|in_channels|in_chans", 3),
    (r".*vocab_size(_per_layer_input)?|.*vocabulary_size", VOCABULARY),
    (r"(num|n)_(key_value|kv|global_key_value|swa_key_value|key)_heads|multi_query_group_num", KV_HEADS),
    (r".*num_(key_value|kv)_heads|n_head_kv|linear_num_key_heads", KV_HEADS),
    (
        r".*(num|n)_(\w+_)?(heads|head|attention_heads)|n_heads?|num_heads|(encoder|decoder)_attention_heads",
        HEADS,
    ),
    (r"qk_nope_head_dim|v_head_dim|(linear_)?(key|value)_head_dim", HEAD_DIM),
    (r"qk_rope_head_dim|rotary_dim|rope_head_dim", 8),
    (r"qk_head_dim", 24),
    (r".*head_dim|.*d_head|.*head_size|d_kv|kv_channels|mamba_headdim", HEAD_DIM),
    (
        r".*(num_experts_per_tok|num_experts_per_token|top_k|moe_topk|num_selected_experts|moe_k"
        r"|experts_per_token)",
        2,
    ),
    (r"n_groups?|topk_group|num_expert_groups?|n_expert_groups?|mamba_n_groups|num_groups", 1),
    (r".*(num|n)(_\w+)?_shared_experts|moe_num_shared_experts|num_shared_expert", 1),
    (r".*(num|n)(_\w+)?_experts|ffn_num_experts|moe_num_experts|zero_expert_num", 4),
    (r".*(lora_rank|low_rank_dim|_rank)", 16),
    (r".*(state_size|d_state|state_dim|ssm_state_size)", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r".*(chunk_size|chunk_length)", 16),
    (r".*(moe|expert)_?\w*(intermediate|ffn|hidden)\w*_(size|dim)|\w*(expert|moe)_intermediate_size", 32),
    (
        r".*(intermediate|ffn|inner|mlp|feed_forward|ff)_?\w*(size|dim|hidden)|n_inner|d_ff|d_inner",
        2 * HIDDEN,
    ),
    (
        r".*(hidden_size|hidden_size_global|embedding_size|embed_dim|hidden_dim|model_dim|embd|embed_size"
        r"|lru_width|d_model)",
        HIDDEN,
    ),
    (r".*(embedding_dim|proj_dim|width)|dim|n_embd", HIDDEN),
    (r".*sliding_window(_size)?|local_attention|attention_window(_size)?|.*window(_size)?", 8),
)
"""(pattern of a field's whole name, small value). A field with a smaller value keeps it."""

ID = re.compile(r".*(token_ids?|token_index|_idx|_id)")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers")


def small(model_type: str) -> PretrainedConfig:
    """A small configuration of the architecture."""
    if model_type in PARTS:
        return AutoConfig.for_model(
            model_type, **{name: small(part).to_dict() for name, part in PARTS[model_type].items()}
        )
    default = AutoConfig.for_model(model_type)
    changes = _changes(default)
    if "text_config" in default.sub_configs and default.text_config is None:  # a drafter for another model
        text = model_type.replace("_assistant", "_text")
        changes["text_config"] = type(AutoConfig.for_model(text))(
            **_changes(AutoConfig.for_model(text)) | _BARE
        )
    return type(default)(**changes)


def _changes(default: PretrainedConfig) -> dict[str, Any]:
    """Differences from the default: small sizes, one layer of each kind, no dropout. A field whose default is
    None stays so, since the configuration computes it from others, except for the kinds of layers."""
    fields = {f.name: f for f in dataclasses.fields(type(default)) if f.init}
    layers = next((name for name in LAYERS if isinstance(getattr(default, name, None), int)), None)
    picked = _picked(default, getattr(default, layers)) if layers else []
    changes: dict[str, Any] = {}
    for name, field in fields.items():
        value = vars(default).get(name)
        if name in default.sub_configs:
            if isinstance(value, PretrainedConfig):
                # other values are computed from the fields
                inner = {f.name for f in dataclasses.fields(type(value))}
                explicit = {k: v for k, v in value.to_diff_dict().items() if k in inner}
                changes[name] = {**explicit, **_changes(value), "model_type": value.model_type}
        elif layers and _per_layer(value, getattr(default, layers)):
            changes[name] = [_small(name, value[i]) for i in picked]
        elif value is None and name in FILLED:
            changes[name] = FILLED[name]
        elif field.default is not None:
            changes[name] = _small(name, value)
    for name in LAYERS:
        if name in changes and picked:
            changes[name] = len(picked)
    heads = getattr(default, "num_attention_heads", None)
    shared = getattr(default, "num_key_value_heads", None)
    if heads is not None and heads == shared and "num_key_value_heads" in fields:
        changes["num_key_value_heads"] = HEADS  # low-rank attention has no groups of heads
    changes = {
        name: value
        for name, value in changes.items()
        if name in default.sub_configs or value != vars(default).get(name)
    }
    return changes | EXCEPTIONS.get(default.model_type, {})


def _per_layer(value: Any, layers: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == layers and layers > 4


def _picked(config: PretrainedConfig, layers: int) -> list[int]:
    """Layers of the default model to keep: one of each kind in any list of kinds, and at least two."""
    lists = [v for v in vars(config).values() if _per_layer(v, layers) and isinstance(v[0], str | bool | int)]
    seen: set[tuple[int, Any]] = set()
    picked = []
    for layer in range(layers):
        kinds = {(i, kind[layer]) for i, kind in enumerate(lists)}
        if not kinds <= seen:
            picked.append(layer)
            seen |= kinds
    picked += [i for i in range(layers) if i not in picked][: max(0, 2 - len(picked))]
    return sorted(picked[:4])


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float) and ("dropout" in name or name.endswith(("_pdrop", "layerdrop"))):
        return 0.0
    if isinstance(value, int):
        if ID.fullmatch(name):
            return min(value, VOCABULARY - 1)
        most = next((most for pattern, most in RULES if re.fullmatch(pattern, name)), None)
        return value if most is None or value <= 0 else min(value, most)
    if isinstance(value, list) and ID.fullmatch(name) and all(isinstance(v, int) for v in value):
        return [min(v, VOCABULARY - 1) for v in value]
    return value


_OF_MUSIC = {"text_encoder": "t5", "audio_encoder": "encodec"}
PARTS = {
    "musicgen": {**_OF_MUSIC, "decoder": "musicgen_decoder"},
    "musicgen_melody": {**_OF_MUSIC, "decoder": "musicgen_melody_decoder"},
}
"""Configurations that consist of others and have no defaults."""

FILLED: dict[str, Any] = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": KV_HEADS,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 16,
    "indexer_compress_ratio": 2,
    "output_gate_type": "sigmoid",
    "default_language": "en_XX",
}
"""Fields without a default that the model needs."""

DECODER: dict[str, dict[str, Any]] = {
    name: {"is_decoder": True}
    for name in (
        *(
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
        ),
        *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    )
}
"""Encoders that are causal if their configuration says so."""

_MAMBA = {"mamba_n_heads": 8}
_BARE = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **DECODER,
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "dots1": {"n_shared_experts": 1},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [16, 32],
        "attn_layers": ["local", "local"],
    },
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "qwen4_exp_text": {"indexer_kv_heads": 1},
    "longcat_flash": {"head_dim": 8},
    "qwen2_5_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    },
    "falcon_h1": _MAMBA,
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8},
    "zamba2": {"n_mamba_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "xlm": {"emb_dim": HIDDEN, "causal": True},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
        },
        "pooling": None,
    },
    "emu3": {"vocabulary_map": {"<image>": 201, "<|extra_200|>": 202}},
    "emu3_vqgan": {"base_channels": 32},
    "gemma3n_text": {"num_kv_shared_layers": 0},
}
"""Values that do not follow from a field's name, by model type."""
