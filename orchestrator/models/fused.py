"""The parts of a layer that wait for memory, compiled: norms and feed-forward blocks, each a fused kernel in
place of five to ten.

Attention has a kernel of its own (block_attention.py) and matrix products are the library's. What is left of
a layer reads and writes its activations many times over in a plain transformers model; torch.compile makes
one pass of it.
"""

from torch import nn

FUSED = ("RMSNorm", "LayerNorm", "MLP")
"""Ends of the names of transformers' classes: LlamaRMSNorm, Qwen3MLP, GPTNeoXMLP …"""


def fuse(model: nn.Module, backend: str = "inductor") -> int:
    """Compiles the norms and feed-forward blocks of `model` in place, for rows of any length; how many they
    are.

    Parameters, their names and the results stay (up to the order of rounding). All blocks of a class share
    their graphs. Not for modules with hooks: ZeRO 3's break the graph of every one.
    """
    found = [module for module in model.modules() if type(module).__name__.endswith(FUSED)]
    for module in found:
        module.compile(dynamic=True, backend=backend)
    return len(found)
