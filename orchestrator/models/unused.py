"""Finds and freezes parameters that never learn from text: towers for images and sound, attention to an
encoder that the model does not have.

    parameters --a short forward--+--> in its graph: they learn
                                  +--> not in it --freeze_unused--> no gradient, no moments, no decay

Plain torch does not change a parameter without a gradient. DeepSpeed gives it zeros, decays it, and at ZeRO 3
lets it keep the gradient of an earlier step. A frozen parameter is the same everywhere. This also works on
tensors without storage, so that a plan sees what a learner does.
"""

import copy
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS = 8
"""Length of the short forward. Which parameters a text reaches does not depend on its length."""
ROUTED = "expert"
"""Part of the names of parameters that only some tokens reach. They are never frozen."""


class GroupedShapes(TorchDispatchMode):
    """Gives grouped products (of experts) the shape of their kernel's results in forward and backward, with
    zeros as values. torch's own rule for tensors without storage refuses every type but bf16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        left, right, *rest = args
        if right.ndim == 3:  # rows of tokens, each times its expert
            return left.new_zeros(left.shape[0], right.shape[-1])
        offsets = rest[0] if rest else (kwargs or {})["offs"]  # the gradient of the experts
        return left.new_zeros(len(offsets), left.shape[0], right.shape[1])


def freeze_unused(model: nn.Module) -> tuple[str, ...]:
    """Freezes the parameters that a forward over text does not reach, and returns their names. Errors of the
    model's own code are not caught."""
    names = unused(model)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    return tuple(sorted(names))


def unused(model: nn.Module) -> frozenset[str]:
    """Names of the trainable parameters (by `requires_grad`) on which the output for a short text does not
    depend."""
    device = next(model.parameters()).device
    shapes: Any = nullcontext()
    if device.type == "meta":
        # where transformers asks for values it accepts fake tensors, which it takes for traced ones
        shapes = FakeTensorMode(allow_non_fake_inputs=True)
        # the mode keeps references to the tensors it has seen, which could not be moved afterwards
        model = copy.deepcopy(model)
    ids = torch.arange(TOKENS, device="cpu").clamp(max=_vocabulary(model) - 1)[None].to(device)
    with _evaluating(model), shapes, GroupedShapes():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    held = _leaves([logits])
    return frozenset(
        name
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in held and ROUTED not in name
    )


def _vocabulary(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    was = model.training
    model.eval()
    with torch.enable_grad():
        yield
    model.train(was)


def _leaves(outputs: Iterable[Tensor]) -> set[int]:
    """Ids of the leaf tensors in the autograd graph of `outputs`."""
    todo: list[Any] = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen, leaves = set(todo), set()
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return leaves
