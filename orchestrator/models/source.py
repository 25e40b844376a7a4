"""In which type a model's weights came: what an export is written in unless the recipe says otherwise."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from orchestrator.models.load import load_config
from orchestrator.recipe.schema import Model

TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ASKED = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export_dtype(asked: str, model: Model) -> str:
    """torch's name of export.dtype, for a run that starts from `model`."""
    return source_dtype(model) if asked == "source" else ASKED[asked]


def source_dtype(model: Model) -> str:
    """float32, bfloat16 or float16: the type of most of the bytes of a folder's safetensors, else what the
    configuration says; other types (float64, packed ones) count as float32."""
    if model.tiny is not None:
        return "float32"
    found: Counter[str] = Counter()
    for file in Path(str(model.path)).glob("*.safetensors"):
        for tensor in _header(file).values():
            start, end = tensor["data_offsets"]
            found[tensor["dtype"]] += end - start
    if found:
        return TYPES.get(found.most_common(1)[0][0], "float32")
    said = getattr(load_config(model), "dtype", None)
    return str(said).removeprefix("torch.") if said in (torch.bfloat16, torch.float16) else "float32"


def _header(file: Path) -> dict[str, Any]:
    """Names, types and places of a safetensors file."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}
