"""Models of known shapes with random weights, and random preference pairs for them."""

from dataclasses import dataclass

import numpy as np
import torch

from gpu_stages.device import release
from orchestrator.core.batches import Branch, SequenceGroup
from orchestrator.models.forward import Checkpointing
from orchestrator.models.load import LoadedModel, load_config, placed
from orchestrator.recipe.schema import Recipe

BETA = 0.1


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and a batch of pairs. All answers have the same length, because padding is not compared."""

    name: str
    sizes: dict[str, object]
    """Keys of model.tiny."""
    pairs: int
    """Pairs of one optimizer step."""
    prompt: int
    """Tokens of a prompt."""
    answer: int
    """Tokens of an answer."""
    rate: float
    """Learning rate."""

    def recipe(self, device: str, checkpointing: Checkpointing = "none", fused: bool = False) -> Recipe:
        """A DPO recipe for the learner: bf16 with fp32 master weights on a GPU, fp32 on a CPU."""
        gpu = device == "cuda"
        return Recipe.model_validate(
            {
                "model": {"tiny": {**self.sizes, "max_positions": self.prompt + self.answer}},
                "data": {"train": "none", "max_length": self.prompt + self.answer},
                "algorithm": {"name": "dpo", "beta": BETA},
                "batch": {"effective": self.pairs},
                "optimizer": {"learning_rate": self.rate, "max_grad_norm": None},
                "learners": {
                    "gpus_per_worker": int(gpu),
                    "precision": "bf16" if gpu else "fp32",
                    "activation_checkpointing": checkpointing,
                    "fused": fused,
                },
            }
        )

    def groups(self) -> list[SequenceGroup]:
        """The same random pairs every time."""
        return made_pairs(self.pairs, self.prompt, self.answer)

    def flops(self, device: str, shared: bool) -> float:
        """Model FLOPs of one step, forward and backward, nothing recomputed.

        6 per weight and position, 12 per head dimension and pair of positions that see each other, and the
        head on answers only. With `shared` prompts are computed once per pair."""
        config = load_config(self.recipe(device).model).get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        wide, narrow = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        layer = config.hidden_size * (2 * wide + 2 * narrow + 3 * config.intermediate_size)
        prompts = 1 if shared else 2
        positions = prompts * self.prompt + 2 * self.answer
        seen = prompts * _triangle(self.prompt) + 2 * (self.answer * self.prompt + _triangle(self.answer))
        head = 6 * config.vocab_size * config.hidden_size * 2 * self.answer
        return self.pairs * (config.num_hidden_layers * (6.0 * layer * positions + 12.0 * wide * seen) + head)

    @property
    def tokens(self) -> int:
        """Tokens of a step, prompts repeated for each answer."""
        return self.pairs * 2 * (self.prompt + self.answer)


def made_pairs(pairs: int, prompt: int, answer: int) -> list[SequenceGroup]:
    """Pairs of random tokens, all of the same lengths."""
    draw = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return draw.integers(8, 200, count)  # ids that every vocabulary has, none of them special

    def branch() -> Branch:
        return Branch(tokens(answer), np.ones(answer, np.bool_))

    return [SequenceGroup(i, tokens(prompt), (branch(), branch())) for i in range(pairs)]


def _triangle(count: int) -> int:
    return count * (count + 1) // 2


def on_device(recipe: Recipe, device: torch.device) -> LoadedModel:
    """The recipe's model, initialised on the device: no disk, no copy in RAM, no fingerprint.

    The weights are the same every time, in the recipe's precision."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            load_config(recipe.model), attn_implementation="sdpa", dtype=torch.float32
        )
    placed(model, device, torch.bfloat16 if recipe.learners.precision == "bf16" else torch.float32)
    release(device)
    return LoadedModel(model, None, "", "random")


LLAMA_7B = {
    "architecture": "llama",
    "hidden_size": 4096,
    "heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
QWEN_1B5 = {
    "architecture": "qwen2",
    "hidden_size": 1536,
    "layers": 28,
    "heads": 12,
    "kv_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
}
SMALL = {
    "architecture": "llama",
    "hidden_size": 64,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "vocab_size": 512,
}


def shapes(device: str) -> list[Shape]:
    """4k-token conversations at real shapes on a GPU, tiny ones on a CPU."""
    if device == "cpu":
        return [Shape("tiny", SMALL, 8, 48, 48, 1e-4)]
    return [
        Shape("1.5B", QWEN_1B5, 16, 2048, 2048, 1e-6),
        Shape("7B x 4 layers", {**LLAMA_7B, "layers": 4}, 16, 2048, 2048, 1e-6),
        Shape("7B x 12 layers", {**LLAMA_7B, "layers": 12}, 8, 2048, 2048, 1e-6),
    ]
