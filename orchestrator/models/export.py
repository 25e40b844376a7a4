"""Writes a trained model as a Hugging Face folder: safetensors, configurations, tokenizer, model card."""

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.core.files import fsync_directory, fsync_file


def export(
    weights: Mapping[str, Tensor] | None,
    *,
    base: nn.Module,
    tokenizer: Any,
    directory: Path,
    card: str,
    dtype: str,
    adapter: Any = None,
) -> Path:
    """Writes `directory` atomically. It loads with AutoModelForCausalLM.from_pretrained.

    weights: fp32 tensors of every parameter of `base` by Hugging Face name. None: only the adapter is
    exported. dtype: torch's name of the type to write. adapter: a peft model whose adapter is written in
    fp32, to `directory`/adapter if there are weights, else to `directory`.
    """
    for leftover in directory.parent.glob(f".{directory.name}.*"):  # of an interrupted export
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        if weights is not None:
            _write_model(
                base,
                {name: tensor.detach().to(getattr(torch, dtype)) for name, tensor in weights.items()},
                temporary,
                dtype,
            )
        if adapter is not None:
            place = temporary / "adapter" if weights is not None else temporary
            adapter.save_pretrained(place)
            (place / "README.md").write_text(
                card.replace("library_name: transformers", "library_name: peft", 1), encoding="utf-8"
            )
        tokenizer.save_pretrained(temporary)
        if weights is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        for path in temporary.rglob("*"):
            if path.is_file():
                fsync_file(path)
        _swap(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _swap(temporary: Path, directory: Path) -> None:
    """Replaces the old folder by the new one. A crash in between leaves one of them complete."""
    old = None
    if directory.exists():
        old = directory.with_name(f".{directory.name}.old-{uuid.uuid4().hex[:8]}")
        os.rename(directory, old)
    os.rename(temporary, directory)
    fsync_directory(directory.parent)
    if old is not None:
        shutil.rmtree(old)


def _write_model(base: Any, state: dict[str, Tensor], folder: Path, dtype: str) -> None:
    """Writes our weights with save_pretrained, which shards them and drops tied copies."""
    missing = {name for name, _ in base.named_parameters()} - set(state)
    if missing:
        raise ValueError(f"export lacks {len(missing)} parameters, e.g. {sorted(missing)[0]}")
    buffers = dict(base.named_buffers())
    state |= {
        name: tensor for name, tensor in base.state_dict().items() if name not in state and name in buffers
    }
    config_dtype = base.config.dtype
    base.save_pretrained(folder, state_dict=state, safe_serialization=True)
    # save_pretrained sets the type of `base`, in the config and in the file, not the type of these weights
    base.config.dtype = config_dtype
    path = folder / "config.json"
    path.write_text(json.dumps(_of_type(json.loads(path.read_text()), dtype), indent=2) + "\n")


def _of_type(config: Any, dtype: str) -> Any:
    """The configuration with `dtype` as the type of the weights, also in configurations inside it."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key == "dtype" and isinstance(value, str) else _of_type(value, dtype)
        for key, value in config.items()
    }
