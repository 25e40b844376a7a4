"""Shapes of well-known models, so that a run can be planned without weights, a network or an account.

The values are those of each model's config.json. tests/unit/models/test_shapes.py compares them with the
parameter counts on the models' pages.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.core.errors import ConfigError
from orchestrator.recipe.schema import Model


def _shape(
    kind: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv: int,
    vocabulary: int,
    positions: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        **more,
    }


_TIED = {"tie_word_embeddings": True}
_LLAMA, _QWEN, _QWEN_LARGE = 128_256, 151_936, 152_064
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": _shape("llama", 4096, 14336, 32, 32, 8, _LLAMA, 8192),
    "llama-3.1-8b": _shape("llama", 4096, 14336, 32, 32, 8, _LLAMA, 131072),
    "llama-3.1-70b": _shape("llama", 8192, 28672, 80, 64, 8, _LLAMA, 131072),
    "llama-3.2-1b": _shape("llama", 2048, 8192, 16, 32, 8, _LLAMA, 131072, head_dim=64, **_TIED),
    "llama-3.2-3b": _shape("llama", 3072, 8192, 28, 24, 8, _LLAMA, 131072, head_dim=128, **_TIED),
    "qwen2.5-0.5b": _shape("qwen2", 896, 4864, 24, 14, 2, _QWEN, 32768, **_TIED),
    "qwen2.5-1.5b": _shape("qwen2", 1536, 8960, 28, 12, 2, _QWEN, 32768, **_TIED),
    "qwen2.5-7b": _shape("qwen2", 3584, 18944, 28, 28, 4, _QWEN_LARGE, 32768),
    "qwen2.5-32b": _shape("qwen2", 5120, 27648, 64, 40, 8, _QWEN_LARGE, 32768),
    "qwen3-0.6b": _shape("qwen3", 1024, 3072, 28, 16, 8, _QWEN, 40960, head_dim=128, **_TIED),
    "qwen3-1.7b": _shape("qwen3", 2048, 6144, 28, 16, 8, _QWEN, 40960, head_dim=128, **_TIED),
    "qwen3-4b": _shape("qwen3", 2560, 9728, 36, 32, 8, _QWEN, 40960, head_dim=128, **_TIED),
    "qwen3-8b": _shape("qwen3", 4096, 12288, 36, 32, 8, _QWEN, 40960, head_dim=128),
    "mistral-7b": _shape("mistral", 4096, 14336, 32, 32, 8, 32000, 32768, sliding_window=None),
    "smollm2-135m": _shape("llama", 576, 1536, 30, 9, 3, 49152, 8192, **_TIED),
}


def known_shape(path: str | None) -> str | None:
    """The name in SHAPES of a model on the hub or of a model tuned from it. None for an unknown one.

    Example: meta-llama/Llama-3.2-1B-Instruct is a llama-3.2-1b.
    """
    name = (path or "").rpartition("/")[2].lower().removeprefix("meta-")
    return next(
        (
            shape
            for shape in sorted(SHAPES, key=len, reverse=True)
            if name == shape or name.startswith(shape + "-")
        ),
        None,
    )


@contextmanager
def as_folder(model: Model, shape: str) -> Iterator[Model]:
    """The model as a temporary folder with a config.json and no weights.

    shape: a name of SHAPES, or the path of a config.json or of its folder. Raises ConfigError for others.
    """
    path = Path(shape)
    if path.is_dir() or path.suffix == ".json":
        source = path / "config.json" if path.is_dir() else path
        if not source.is_file():
            raise ConfigError(f"--shape {shape}: no file {source}", fix="give the path of a config.json")
        text = source.read_text()
    elif shape.lower() in SHAPES:
        text = json.dumps(SHAPES[shape.lower()])
    else:
        raise ConfigError(
            f"--shape {shape} is not in the table",
            fix=f"use one of {', '.join(SHAPES)}, or the path of a config.json",
        )
    with TemporaryDirectory(prefix="orchestrator-shape-") as folder:
        (Path(folder) / "config.json").write_text(text)
        yield model.model_copy(update={"path": folder, "tiny": None, "revision": None})
