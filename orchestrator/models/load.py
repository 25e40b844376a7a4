"""Models and tokenizers from a folder, the Hugging Face hub at a pinned revision, or made on the spot (`model.tiny`)."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PretrainedConfig

from orchestrator import hub
from orchestrator.config import Lora, Model
from orchestrator.errors import ConfigError, MissingInput
from orchestrator.models.attention import plain_attention
from orchestrator.models.tiny import build, byte_tokenizer, check_sizes, tiny_config

Head = Literal["lm", "scalar", "value"]
"""A language model, or a scalar head: of a reward model or a critic (the same weights, read at other positions)."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in fp32 with its tokenizer. fingerprint: SHA-256 over the weights by name."""

    model: nn.Module
    tokenizer: Any
    fingerprint: str
    name: str


def load(cfg: Model, *, seed: int, head: Head, reference: bool = False) -> Loaded:
    """The policy (with its LoRA adapter, if any), or with reference=True the frozen reference policy."""
    if reference and cfg.reference is not None:
        cfg = cfg.model_copy(update={"path": cfg.reference, "tiny": None, "revision": None, "lora": None})
    tokenizer = load_tokenizer(cfg)
    auto: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    options: dict[str, Any] = {} if head == "lm" else {"num_labels": 1}
    if cfg.tiny is not None:
        model: Any = build(cfg.tiny, seed, auto, **options)
        name = f"tiny-{cfg.tiny.architecture}"
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # a new scalar head is drawn here
            model = _pretrained(cfg, auto, dtype=torch.float32, attn_implementation=plain_attention(load_config(cfg)), **options)
        name = str(cfg.path)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    digest = fingerprint(model)
    if cfg.lora is not None and not reference:
        model = _with_lora(model, cfg.lora, seed, head)
    return Loaded(model, tokenizer, digest, name)


def load_tokenizer(cfg: Model) -> Any:
    """The tokenizer, with `model.chat_template` and a pad token (eos where there is none: masking is by position)."""
    tokenizer = byte_tokenizer() if cfg.tiny is not None else _pretrained(cfg, AutoTokenizer)
    if cfg.chat_template is not None:
        path = Path(cfg.chat_template)
        if not path.is_file():
            raise MissingInput(f"model.chat_template: no file {path}", fix="give the path of a Jinja chat template")
        tokenizer.chat_template = path.read_text()
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no eos token", why="generation and completions need an end", fix="use another tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(cfg: Model) -> PretrainedConfig:
    """The architecture's configuration, without weights."""
    if cfg.tiny is None:
        return _pretrained(cfg, AutoConfig)
    check_sizes(cfg.tiny)
    return tiny_config(cfg.tiny)


def build_fake(cfg: Model, head: Head, dtype: torch.dtype, mode: FakeTensorMode, *, layers: int | None = None) -> nn.Module:
    """The model from its configuration alone, without storage, for shapes and memory estimates: tensors of `mode`. layers: the
    first so many only."""
    auto: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    config = load_config(cfg)
    if head != "lm":
        config.num_labels = 1
    if layers is not None:
        text: Any = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        model = auto.from_config(config, attn_implementation=plain_attention(config), dtype=dtype)
        if cfg.lora is not None:
            model = _with_lora(model, cfg.lora, 0, head)
    with mode:  # peft's conversions work on meta tensors, not on fake ones
        return model.to_empty(device="cpu")


M = TypeVar("M", bound=nn.Module)


def placed(model: M, device: torch.device, dtype: torch.dtype) -> M:
    """The model on a device with its weights in `dtype`. Buffers keep their type, as under DeepSpeed and from_pretrained: rotary
    frequencies in bf16 are off by 1e-3, at position 1,000 an angle of 1 rad."""
    model.to(device)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter's name, dtype and bytes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pretrained(cfg: Model, auto: Any, **options: Any) -> Any:
    """auto.from_pretrained with what the recipe pins, and errors that say what to do."""
    assert cfg.path is not None
    local = Path(cfg.path)
    looks_local = local.is_absolute() or cfg.path.startswith(".") or cfg.path.count("/") != 1
    if not local.is_dir():
        if looks_local:
            raise MissingInput(f"model.path: no folder {cfg.path}", fix="give a folder with config.json, or a hub name ORG/NAME")
        if cfg.revision is None:
            raise ConfigError(
                f"model.path: {cfg.path} comes from the hub and has no pinned revision",
                why="a branch may change under a run",
                fix="set model.revision to a commit hash (shown on the model's `Files` page), or give a local folder",
            )
    elif not (local / "config.json").is_file():
        raise MissingInput(f"model.path: {cfg.path} holds no config.json", fix="point to the folder with the weights (…/export)")
    if not local.is_dir() and not hub.reachable():
        options["local_files_only"] = True
    try:
        return auto.from_pretrained(cfg.path, revision=cfg.revision or "main", trust_remote_code=cfg.trust_remote_code, **options)
    except OSError as error:
        if "local_files_only" in options:
            raise hub.absent(cfg.path, "model") from error
        raise MissingInput(
            f"model.path: {cfg.path} cannot be loaded", why=str(error).splitlines()[0], fix="check the name, the revision and the network"
        ) from error


def _with_lora(model: nn.Module, lora: Lora, seed: int, head: Head) -> nn.Module:
    """The model with a fresh adapter; base weights frozen, the adapter in fp32."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ConfigError("model.lora: peft is not installed", fix='pip install "orchestrator[peft]"') from error

    targets = lora.target_modules
    if not isinstance(targets, str) and any("lm_head" in t for t in targets):
        raise ConfigError("model.lora.target_modules: lm_head cannot be adapted", why="log-probs read its weight directly")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM" if head == "lm" else "SEQ_CLS",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
