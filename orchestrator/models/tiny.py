"""Models of a named architecture with random weights, and a byte-level tokenizer: for the demo and tests,
without a download."""

import difflib
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
)

from orchestrator.core.errors import ConfigError
from orchestrator.models.attention import plain_attention
from orchestrator.recipe.schema import TinyModel

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}{% generation %}{{ message['content'] + "
    "eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and seven special ones. Decoding restores any text exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(cfg: TinyModel) -> PretrainedConfig:
    """The architecture's configuration with the sizes of `cfg` and without dropout.

    transformers maps common names (hidden_size, num_hidden_layers …) to the architecture's own (n_embd,
    n_layer …).
    """
    if cfg.architecture not in CONFIG_MAPPING_NAMES:
        close = difflib.get_close_matches(cfg.architecture, CONFIG_MAPPING_NAMES, n=3)
        raise ConfigError(
            f"model.tiny.architecture: no architecture is named {cfg.architecture!r}",
            fix=f"did you mean {', '.join(close)}?",
        )
    tokenizer = byte_tokenizer()
    sizes = {
        "vocab_size": cfg.vocab_size or len(tokenizer),
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "max_position_embeddings": cfg.max_positions,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(cfg.architecture, **sizes)
    optional = {
        "intermediate_size": cfg.intermediate_size or 2 * cfg.hidden_size,
        "num_key_value_heads": cfg.kv_heads or cfg.heads,
        "head_dim": cfg.hidden_size // cfg.heads,
    }
    present: dict[str, float] = {
        k: v
        for k, v in optional.items()
        if hasattr(config, k) and k not in config.attribute_map and not _computed(config, k)
    }
    for name in (
        "attention_dropout",
        "hidden_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "resid_dropout",
        "embd_dropout",
    ):
        if hasattr(config, name):
            present[name] = 0.0
    return AutoConfig.for_model(cfg.architecture, **sizes, **present)


def check_sizes(cfg: TinyModel) -> None:
    """Raises ConfigError if the recipe names a size that the architecture does not have. GPT-2, say, has no
    separate number of key and value heads."""
    config = tiny_config(cfg)
    for key, name in (("kv_heads", "num_key_value_heads"), ("intermediate_size", "intermediate_size")):
        size = getattr(cfg, key)
        if size is not None and getattr(config, name, None) != size:
            raise ConfigError(
                f"model.tiny.{key}: {cfg.architecture} does not read it",
                why=f"its configuration has no {name}",
                fix=f"remove model.tiny.{key}",
            )


def _computed(config: PretrainedConfig, name: str) -> bool:
    return isinstance(getattr(type(config), name, None), property)


def build(cfg: TinyModel, seed: int, auto_class: Any, **options: object) -> torch.nn.Module:
    """A model with weights drawn from `seed`. The global generator keeps its state.

    transformers chooses SDPA attention for architectures that have it, and its eager one for the others
    (GPT-J, BLOOM …).
    """
    config = tiny_config(cfg)
    for name, value in options.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto_class.from_config(config, attn_implementation=plain_attention(config))
