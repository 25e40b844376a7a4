"""Models and tokenizers: from a folder, from the Hugging Face hub at a pinned revision, or made with random
weights (`model.tiny`)."""

import difflib
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from orchestrator.core import hub
from orchestrator.core.errors import ConfigError, MissingInput
from orchestrator.models.attention import plain_attention
from orchestrator.models.classes import Head, auto_class, check_trainable
from orchestrator.models.generation import savable
from orchestrator.models.rope import pin
from orchestrator.models.tiny import build, byte_tokenizer, check_sizes, tiny_config
from orchestrator.models.unused import freeze_unused
from orchestrator.recipe.schema import Lora, Model


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in fp32 with its tokenizer."""

    model: nn.Module
    tokenizer: Any
    fingerprint: str
    """SHA-256 over the weights by name, before an adapter is added."""
    name: str
    """model.path, or e.g. "tiny-llama"."""


def load(
    cfg: Model, *, seed: int, head: Head, reference: bool = False, longest: int | None = None
) -> LoadedModel:
    """The policy (with its LoRA adapter, if any), or with reference=True the frozen reference policy.

    longest: length in tokens for which rotary frequencies are fixed that would otherwise depend on the batch
    (see rope.pin). None leaves them as they are.
    """
    if reference and cfg.reference is not None:
        cfg = cfg.model_copy(update={"path": cfg.reference, "tiny": None, "revision": None, "lora": None})
    tokenizer = load_tokenizer(cfg)
    config = load_config(cfg)
    auto = auto_class(config, head, _where(cfg))
    options: dict[str, Any] = {} if head == "lm" else {"num_labels": 1}
    if cfg.tiny is not None:
        model: Any = build(cfg.tiny, seed, auto, **options)
        name = f"tiny-{cfg.tiny.architecture}"
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # for the weights of a new scalar head
            model = _pretrained(
                cfg, auto, dtype=torch.float32, attn_implementation=plain_attention(config), **options
            )
        name = str(cfg.path)
    text = model.config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config, _ = savable(model.generation_config)
    if longest is not None:
        pin(model, longest)
    digest = fingerprint(model)
    if not reference:
        idle = _idle(model)
        if cfg.lora is not None:
            model = _with_lora(model, cfg.lora, seed, head, idle)
    return LoadedModel(model, tokenizer, digest, name)


def load_for_text(cfg: Model, *, seed: int, dtype: torch.dtype | str = torch.float32) -> Any:
    """The language model as stored, to generate text: without adapter, freezing, pinned frequencies or
    fingerprint. dtype: "auto" keeps the type of the files."""
    config = load_config(cfg)
    auto = auto_class(config, "lm", _where(cfg))
    if cfg.tiny is not None:
        return build(cfg.tiny, seed, auto)
    return _pretrained(cfg, auto, dtype=dtype, attn_implementation=plain_attention(config))


def load_tokenizer(cfg: Model) -> Any:
    """The tokenizer, with `model.chat_template` and a pad token. The pad token is eos if the tokenizer has
    none, since masking is by position."""
    tokenizer = byte_tokenizer() if cfg.tiny is not None else _pretrained(cfg, AutoTokenizer)
    if cfg.chat_template is not None:
        path = Path(cfg.chat_template)
        if not path.is_file():
            raise MissingInput(
                f"model.chat_template: no file {path}", fix="give the path of a Jinja chat template"
            )
        tokenizer.chat_template = path.read_text()
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no eos token",
            why="generation and completions need an end token",
            fix="use another tokenizer",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(cfg: Model) -> PretrainedConfig:
    """The architecture's configuration, without weights. Raises ConfigError if no learner can train it."""
    if cfg.tiny is not None:
        check_sizes(cfg.tiny)
    config = tiny_config(cfg.tiny) if cfg.tiny is not None else _pretrained(cfg, AutoConfig)
    check_trainable(config, _where(cfg))
    return config


def _where(cfg: Model) -> str:
    """The key that names the model, for messages."""
    return (
        f"model.path: {cfg.path}" if cfg.tiny is None else f"model.tiny.architecture: {cfg.tiny.architecture}"
    )


def build_fake(
    cfg: Model,
    head: Head,
    dtype: torch.dtype,
    mode: FakeTensorMode,
    *,
    layers: int | None = None,
    longest: int | None = None,
) -> nn.Module:
    """The model from its configuration alone, of tensors without storage, for shapes and memory estimates.

    mode: owner of the tensors. layers: number of layers, if not all. longest: as in load().
    """
    config = load_config(cfg)
    auto = auto_class(config, head, _where(cfg))
    if head != "lm":
        config.num_labels = 1
    if layers is not None:
        text: Any = config.get_text_config()
        own = text.num_hidden_layers
        for name, value in vars(text).items():
            if isinstance(value, list) and len(value) == own:  # one value per layer: kinds, sizes …
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
    with torch.device("meta"):
        try:
            model = auto.from_config(
                config, attn_implementation=plain_attention(config), dtype=dtype, **_remote(cfg)
            )
        except Exception as error:
            raise _not_made("model", cfg, error) from error
        if longest is not None:
            pin(model, longest)
        idle = _idle(model)
        if cfg.lora is not None:
            model = _with_lora(model, cfg.lora, 0, head, idle)
    with mode:  # entered late, since peft's conversions work on meta tensors and not on fake ones
        model.to_empty(device="cpu")
        base: Any = model if cfg.lora is None else model.get_base_model()  # pyright: ignore[reportCallIssue]
        base.tie_weights()  # to_empty gives each name separate storage
    return model


M = TypeVar("M", bound=nn.Module)


def placed(model: M, device: torch.device, dtype: torch.dtype) -> M:
    """The model on a device with its weights in `dtype`. Buffers keep their type, as under DeepSpeed and
    from_pretrained: rotary frequencies in bf16 would be off by 1e-3, an angle of 1 rad at position 1,000."""
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
    """auto.from_pretrained at the recipe's revision. Its errors become errors with a fix."""
    assert cfg.path is not None
    _check_source(cfg.path, cfg.revision)
    if not Path(cfg.path).is_dir() and not hub.reachable():
        options["local_files_only"] = True
    try:
        return auto.from_pretrained(
            cfg.path, revision=cfg.revision or "main", trust_remote_code=cfg.trust_remote_code, **options
        )
    except OSError as error:
        if "local_files_only" in options:
            raise hub.absent(cfg.path, "model") from error
        raise MissingInput(
            f"model.path: {cfg.path} cannot be loaded",
            why=_first_line(error),
            fix="check the name, the revision and the network",
        ) from error
    except SafetensorError as error:
        raise MissingInput(
            f"model.path: {cfg.path}: a weights file is broken", why=_first_line(error), fix=COPY_AGAIN
        ) from error
    except (
        ValueError,
        LookupError,
        ImportError,
        AttributeError,
        TypeError,
        RuntimeError,
        AssertionError,
    ) as error:
        raise _not_made(
            {"AutoConfig": "configuration", "AutoTokenizer": "tokenizer"}.get(auto.__name__, "model"),
            cfg,
            error,
        ) from error


def _check_source(path: str, revision: str | None) -> None:
    """Raises an error unless `path` is a folder with config.json, or a name on the hub with a revision."""
    local = Path(path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise MissingInput(
                f"model.path: {path} has no config.json", fix="give the folder with the weights (…/export)"
            )
        return
    if (
        local.is_absolute()
        or path.startswith(".")
        or path.count("/") != 1
        or (revision is None and local.parent.is_dir())
    ):
        raise MissingInput(f"model.path: no folder {path}", fix=_folders_beside(local))
    if revision is None:
        raise ConfigError(
            f"model.path: {path} comes from the hub and has no pinned revision",
            why="a branch may change during a run",
            fix="set model.revision to a commit hash (shown on the model's `Files` page), or give a local "
            "folder",
        )


def _folders_beside(missing: Path) -> str:
    """The fix for a folder that does not exist: folders of a similar name, else the names beside it."""
    parent = missing.parent
    names = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
    similar = [str(parent / name) for name in difflib.get_close_matches(missing.name, names, n=3, cutoff=0.5)]
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    listed = f"; {parent} holds {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else ""
    return f"give a folder with config.json, or a hub name ORG/NAME{listed}"


def _not_made(what: str, cfg: Model, error: BaseException) -> ConfigError:
    """The error for a folder that transformers cannot use. A ConfigError is returned unchanged."""
    if isinstance(error, ConfigError):
        return error
    return ConfigError(
        f"{_where(cfg)}: transformers cannot make its {what}",
        why=f"{type(error).__name__}: {_first_line(error)}",
        fix=_fix_for(error, cfg),
    )


def check_files(cfg: Model) -> None:
    """Raises MissingInput if a folder's safetensors are truncated, or if one that its index names is missing.
    Reads only their headers."""
    folder = Path(cfg.path) if cfg.path is not None else None
    if folder is None or not folder.is_dir():
        return
    index = folder / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    for file in sorted({*(folder / name for name in named), *folder.glob("*.safetensors")}):
        if not file.is_file():
            raise MissingInput(
                f"model.path: {file} is not there", why=f"{index.name} names it", fix=COPY_AGAIN
            )
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise MissingInput(
                f"model.path: {file} is broken", why=_first_line(error), fix=COPY_AGAIN
            ) from error


COPY_AGAIN = "copy the folder again: the copy was interrupted, or the disk was full"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _fix_for(error: BaseException, cfg: Model) -> str:
    if "trust_remote_code" in str(error):
        return (
            "set model.trust_remote_code=true if you trust its code, or give a model that transformers knows"
        )
    if isinstance(error, ImportError):
        return "install the package that it names"
    return (
        f"check that {cfg.path} loads with transformers {transformers.__version__} alone: AutoConfig, "
        "AutoTokenizer and the model"
    )


def _remote(cfg: Model) -> dict[str, bool]:
    return {"trust_remote_code": True} if cfg.trust_remote_code else {}


def _idle(model: nn.Module) -> tuple[str, ...]:
    """Names that freeze_unused() froze. The model may not run where it is (without storage, or on a CPU if
    its kernels need a GPU). Then nothing is frozen, the log reports it, and parameters without a gradient are
    trained with zeros."""
    try:
        return freeze_unused(model)
    except Exception as error:  # of the architecture's own code, which may raise anything
        message = "%s: the parameters that text never reaches are not known, and nothing is frozen: %s: %s"
        logging.getLogger(__name__).warning(
            message, type(model).__name__, type(error).__name__, str(error).partition("\n")[0]
        )
        return ()


def unreached(model: Any) -> tuple[str, ...]:
    """Names of the parameters that load() or build_fake() froze because text never reaches them. Parameters
    of adapters are left out."""
    if not hasattr(model, "peft_config"):
        return tuple(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    base, modules = model.get_base_model(), model.peft_config["default"].exclude_modules or ()
    return tuple(name for name, _ in base.named_parameters() if name.rpartition(".")[0] in modules)


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Raises ConfigError for a name that no layer has. peft accepts a list if one of its names matches, and
    silently ignores the others."""
    kinds = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name and not list(module.children())
    }
    paths = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            close = difflib.get_close_matches(target, kinds, n=3) or sorted(kinds)[:8]
            raise ConfigError(
                f"model.lora.target_modules: no layer of the model is named {target!r}",
                why="it would get no adapter",
                fix=f"did you mean {', '.join(close)}? Or use all-linear",
            )


def _with_lora(model: nn.Module, lora: Lora, seed: int, head: Head, idle: Sequence[str] = ()) -> nn.Module:
    """The model with a new adapter in fp32, and with frozen base weights.

    idle: parameters that never get a gradient. Their layers get no adapter.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ConfigError(
            "model.lora: peft is not installed", fix='pip install "orchestrator[peft]"'
        ) from error

    targets = lora.target_modules
    if not isinstance(targets, str) and any("lm_head" in t for t in targets):
        raise ConfigError(
            "model.lora.target_modules: lm_head cannot be adapted", why="log-probs read its weight directly"
        )
    if not isinstance(targets, str):
        _check_targets(model, targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=sorted({name.rpartition(".")[0] for name in idle}) or None,
        task_type="CAUSAL_LM" if head == "lm" else "SEQ_CLS",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
