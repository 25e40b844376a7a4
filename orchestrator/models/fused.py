"""Compiles the parts of a layer that are bound by memory bandwidth: norms and feed-forward blocks.

Attention has its own kernel (block_attention.py) and matrix products come from the library. In a plain
transformers model the rest of a layer reads and writes its activations many times. torch.compile fuses five
to ten of its kernels into one.
"""

from torch import nn

FUSED = ("RMSNorm", "LayerNorm", "MLP")
"""Endings of the names of transformers' classes: LlamaRMSNorm, Qwen3MLP, GPTNeoXMLP …"""


def fuse(model: nn.Module, backend: str = "inductor") -> int:
    """Compiles the norms and feed-forward blocks of `model` in place, for rows of any length. Returns their
    number.

    Parameters, their names and the results stay the same (up to the order of rounding). All blocks of a class
    share their graphs. Not for modules with hooks: those of ZeRO 3 break the graph of each module.
    """
    blocks = [module for module in model.modules() if type(module).__name__.endswith(FUSED)]
    for module in blocks:
        module.compile(dynamic=True, backend=backend)
    return len(blocks)
