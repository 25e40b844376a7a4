"""Which class of transformers reads a configuration, and which configurations no learner can train. Both are
decided before weights are read.

config.json --check_trainable--> ConfigError, or
config.json --auto_class-------> AutoModelForCausalLM | …ImageTextToText | …SequenceClassification
"""

from typing import Any, Literal

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,  # pyright: ignore[reportPrivateImportUsage]
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,  # pyright: ignore[reportPrivateImportUsage]
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,  # pyright: ignore[reportPrivateImportUsage]
)

from orchestrator.core.errors import ConfigError

Head = Literal["lm", "scalar", "value"]
"""Head of a model: log-probs of scored tokens ("lm"), one reward per sequence ("scalar"), or a critic's value
before each scored token ("value"). The last two have the same weights, read at other positions."""
TWO_SIDED = frozenset({"xlnet"})
"""Language models whose tokens see both sides, whatever their configuration says."""
CHUNKED = frozenset({"reformer"})
"""Language models whose forward in training refuses rows of most lengths."""
DRAFTERS = frozenset({"gemma4_assistant", "gemma4_unified_assistant"})
"""Language models that take the hidden states of another model as input."""
AHEAD = frozenset({"prophetnet"})
"""Language models with a separate stream of hidden states for each of several tokens ahead."""


def auto_class(config: PretrainedConfig, head: Head, where: str = "model") -> Any:
    """The class whose from_pretrained reads the folder. Raises ConfigError if transformers has none for the
    head.

    A model of text and images keeps its image towers if its `architectures` name such a class, or if
    transformers has no class for its text alone.
    """
    kind, remote = type(config), getattr(config, "auto_map", None) or {}
    if head != "lm":
        if (
            kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
            or "AutoModelForSequenceClassification" in remote
        ):
            return AutoModelForSequenceClassification
        raise ConfigError(
            f"{where}: transformers has no {config.model_type} with a scalar head",
            why="a reward model and a critic are read by AutoModelForSequenceClassification",
            fix="start from a model of another architecture, e.g. llama or qwen2",
        )
    composite = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(kind, None)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote
    if composite is not None and (not causal or _named(composite) & set(config.architectures or ())):
        return AutoModelForImageTextToText
    if causal:
        return AutoModelForCausalLM
    raise ConfigError(
        f"{where}: transformers has no causal language model for {config.model_type}",
        why="the policy must predict each token from those before it",
        fix="give a decoder: a folder that AutoModelForCausalLM or AutoModelForImageTextToText reads",
    )


def _named(classes: Any) -> set[str]:
    return {c.__name__ for c in (classes if isinstance(classes, tuple) else (classes,))}


def check_trainable(config: PretrainedConfig, where: str) -> None:
    """Raises ConfigError for a model that cannot be trained as a causal one: an encoder, an encoder with a
    decoder, packed weights."""
    _check_causal(config, where)
    _check_input(config, where)
    _check_weights(config, where)


def _check_causal(config: PretrainedConfig, where: str) -> None:
    """Each token must be predicted from those before it."""
    if config.is_encoder_decoder:
        raise ConfigError(
            f"{where}: {config.model_type} is an encoder with a decoder",
            why="rows are one sequence in which each token is predicted from those before it",
            fix="give a decoder-only model",
        )
    encoder = hasattr(config, "add_cross_attention") and not getattr(config, "is_decoder", True)
    if encoder or config.model_type in TWO_SIDED or getattr(config, "causal", True) is False:
        raise ConfigError(
            f"{where}: {config.model_type} lets a token see those after it",
            why="it would learn to copy the answer instead of predicting it",
            fix='give a decoder; one that was made from an encoder has "is_decoder": true in its config.json',
        )


def _check_input(config: PretrainedConfig, where: str) -> None:
    """One pass over a row of text of any length must give the log-probs of the next tokens."""
    if config.model_type in CHUNKED:
        raise ConfigError(
            f"{where}: {config.model_type} trains on rows of a multiple of its chunk length only",
            why="rows are as long as their examples, and padding would be hashed into the same buckets as "
            "tokens",
            fix="give a model with plain attention",
        )
    if config.model_type in AHEAD:
        raise ConfigError(
            f"{where}: {config.model_type} predicts several tokens ahead",
            why="its log-probs come from separate streams, and an objective needs those of the next token "
            "from one pass",
            fix="give a model that predicts the next token",
        )
    if config.model_type in DRAFTERS:
        raise ConfigError(
            f"{where}: {config.model_type} drafts for another model, whose hidden states and keys its "
            "forward takes",
            why="a row of text is not enough for it",
            fix="give the model that it drafts for",
        )


def _check_weights(config: PretrainedConfig, where: str) -> None:
    """All rows of the head must count, and the weights must be plain floating-point numbers."""
    text = config.get_text_config()
    kept = getattr(text, "unpadded_vocab_size", None)
    if kept is not None and kept < text.vocab_size:
        raise ConfigError(
            f"{where}: {config.model_type} leaves out the last rows of its head (unpadded_vocab_size={kept})",
            why="log-probs here are over all rows of the head",
            fix="cut the head's weight in the file to those rows, and set vocab_size to their number",
        )
    packed = getattr(config, "quantization_config", None)
    if packed is not None:
        method = (
            packed.get("quant_method") if isinstance(packed, dict) else getattr(packed, "quant_method", None)
        )
        raise ConfigError(
            f"{where}: its weights are packed ({getattr(method, 'value', method) or 'quantization_config'})",
            why="a learner keeps fp32 master weights; packed ones cannot learn",
            fix="give the same model in bf16 or fp32, and remove quantization_config from config.json if "
            "its weights are",
        )
