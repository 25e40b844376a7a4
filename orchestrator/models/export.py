"""A Hugging Face folder from trained weights: safetensors, config, tokenizer, generation config, model card."""

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from orchestrator.checkpoints import fsync_directory, fsync_file


def export(weights: Iterator[tuple[str, Tensor]], *, base: nn.Module, tokenizer: Any, directory: Path, card: str, dtype: str) -> Path:
    """Writes `directory` atomically. weights: (Hugging Face name, fp32 tensor); for LoRA the adapter's alone.

    dtype: "float32" or "bfloat16". The folder loads with AutoModelForCausalLM.from_pretrained (LoRA: through peft).
    """
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights}
        if hasattr(base, "peft_config"):
            _write_adapter(base, state, temporary)
        else:
            _write_model(base, state, temporary, dtype)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card)
        for path in temporary.iterdir():
            fsync_file(path)
        old = None
        if directory.exists():
            old = directory.with_name(f".{directory.name}.old-{uuid.uuid4().hex[:8]}")
            os.rename(directory, old)
        os.rename(temporary, directory)
        fsync_directory(directory.parent)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return directory


def _write_model(base: Any, state: dict[str, Tensor], folder: Path, dtype: str) -> None:
    """save_pretrained with our weights: it shards and drops tied copies as the architecture declares."""
    missing = {name for name, _ in base.named_parameters()} - set(state)
    if missing:
        raise ValueError(f"export lacks {len(missing)} parameters, e.g. {sorted(missing)[0]}")
    for name, tensor in base.state_dict().items():
        if name not in state and name in dict(base.named_buffers()):
            state[name] = tensor
    config_dtype = base.config.dtype
    base.config.dtype = dtype
    base.save_pretrained(folder, state_dict=state, safe_serialization=True)
    base.config.dtype = config_dtype


def _write_adapter(base: Any, state: dict[str, Tensor], folder: Path) -> None:
    """peft's own folder: adapter_model.safetensors and adapter_config.json."""
    names = {name.replace(".default.", "."): tensor.contiguous() for name, tensor in state.items()}
    save_file(names, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    base.peft_config["default"].save_pretrained(folder)
