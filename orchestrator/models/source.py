"""The type of a model's stored weights, in which an export is written unless the recipe names another."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from orchestrator.models.load import load_config
from orchestrator.recipe.schema import Model

SAFETENSORS_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
RECIPE_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export_dtype(choice: str, model: Model) -> str:
    """torch's name of export.dtype, for a run that starts from `model`."""
    return source_dtype(model) if choice == "source" else RECIPE_TYPES[choice]


def source_dtype(model: Model) -> str:
    """The type of the stored weights: float32, bfloat16 or float16.

    It is the type of most bytes in the folder's safetensors, or that of the configuration if there are no
    files. Other types (float64, packed ones) count as float32.
    """
    if model.tiny is not None:
        return "float32"
    sizes: Counter[str] = Counter()
    for file in Path(str(model.path)).glob("*.safetensors"):
        for tensor in _header(file).values():
            start, end = tensor["data_offsets"]
            sizes[tensor["dtype"]] += end - start
    if sizes:
        return SAFETENSORS_TYPES.get(sizes.most_common(1)[0][0], "float32")
    dtype = getattr(load_config(model), "dtype", None)
    return str(dtype).removeprefix("torch.") if dtype in (torch.bfloat16, torch.float16) else "float32"


def _header(file: Path) -> dict[str, Any]:
    """Names, types and offsets of the tensors in a safetensors file."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}
