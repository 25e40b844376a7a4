"""The only randomness of a forward in training: LoRA's dropout, drawn so that no cut can change it.

    (seed, step, layer) x token (example, branch, position) x feature --hash--> kept or dropped

A stateful generator would give a token another mask in another micro-batch, on another rank, in another
layout or order, and when activations are computed again. Here a mask is a function of its layer, step and
token. Branches that share a prompt have the same mask for it, also where a layout repeats the prompt.

The model's own noise (dropout, routers that jitter or sample their experts) is off: every module computes as
in inference.
"""

import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from orchestrator.core.errors import ConfigError
from orchestrator.models.noise import WORD, hashed, mixed, words


def _hash_elements(device: torch.device) -> int:
    """Elements hashed in one pass: as many as a CPU's caches hold, or 128 MB of a GPU."""
    return 1 << (16 if device.type == "cpu" else 24)


def kept(identity: Tensor, key: int, features: int, p: float) -> Tensor:
    """Bool[N, features], whether a feature of a token is kept. The probability is 1 - p.

    identity: Int64[N] of the tokens; key: 64 bits of (seed, step, layer).
    """
    first, second = words(key)
    token = mixed(mixed((identity & WORD) ^ first) ^ ((identity >> 32) & WORD) ^ second)
    feature = mixed(torch.arange(features, device=identity.device) * 0x9E37_79B1 & WORD)
    limit, rows = round(p * 2**32), max(1, _hash_elements(identity.device) // features)
    return torch.cat([mixed((part[:, None] + feature) & WORD) >= limit for part in token.split(rows)])


@dataclass(slots=True)
class Draws:
    """The step and the tokens for which masks are drawn now."""

    key: tuple[int, int] | None = None
    """(seed, step). None: dropout is off."""
    identity: Tensor | None = None
    """Int64[N], identities of the tokens in the model's input, row after row."""
    layers: list[str] = field(default_factory=list)
    """Names of the layers with dropout."""

    def at(self, seed: int, step: int) -> None:
        """Draws the masks of this optimizer step from now on, also for layers that are computed again in the
        backward pass."""
        self.key = (seed, step)

    def off(self) -> None:
        """Switches dropout off."""
        self.key = self.identity = None


class KeyedDropout(nn.Module):
    """nn.Dropout whose mask is a function of (seed, step, layer, token, feature)."""

    def __init__(self, p: float, name: str, draws: Draws) -> None:
        """name: name of the layer in the model without wrappers."""
        super().__init__()
        self.p, self.name, self.draws = p, name, draws

    def forward(self, values: Tensor) -> Tensor:
        """values: Float[..., features] of all tokens in the model's input."""
        draws = self.draws
        if draws.key is None:
            return values
        assert draws.identity is not None, "dropout is drawn by token, but no identities of tokens are set"
        if values.numel() != values.shape[-1] * len(draws.identity):
            raise ConfigError(
                f"model.lora.dropout: {self.name} receives only some of the tokens",
                why="dropout is drawn by token, and which tokens a mixture's expert receives is not known",
                fix="set model.lora.dropout=0, or leave this layer out of model.lora.target_modules",
            )
        key = hashed(*draws.key, zlib.crc32(self.name.encode()))
        mask = kept(draws.identity, key, values.shape[-1], self.p).view(values.shape)
        return torch.where(mask, values / (1.0 - self.p), 0.0)

    def extra_repr(self) -> str:
        return f"p={self.p}, name={self.name}"


def keyed_dropout(model: nn.Module) -> Draws:
    """Replaces every dropout of a LoRA adapter by KeyedDropout. The returned Draws sets what they draw, and
    its `layers` names them."""
    draws = Draws()
    for name, layer in model.named_modules():
        adapters: Any = getattr(layer, "lora_dropout", None)
        for adapter, dropout in list(adapters.items()) if isinstance(adapters, nn.ModuleDict) else ():
            if isinstance(dropout, nn.Dropout):
                adapters[adapter] = KeyedDropout(dropout.p, name, draws)
                draws.layers.append(name)
    return draws


def quieten(model: nn.Module) -> None:
    """Makes `as_used` hold while activations are computed again. A layer must be in training mode to compute
    them again, so it is in training mode when it is called and in evaluation mode while it computes."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            modes: list[bool] = []
            layer.register_forward_pre_hook(partial(_enter, modes))
            layer.register_forward_hook(partial(_leave, modes), always_call=True)


DECIDES_IN_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)
"""Since transformers 5.24 a layer decides in its forward, after the hooks, whether it will be computed again.
Without gradients it never is."""


def _enter(modes: list[bool], layer: nn.Module, _: Any) -> None:
    modes.append(layer.training)
    if not DECIDES_IN_FORWARD or not torch.is_grad_enabled():
        layer.training = False
    elif layer.training:
        any_layer: Any = layer
        any_layer._gradient_checkpointing_func = partial(
            _quietly, layer, _plain(any_layer._gradient_checkpointing_func)
        )


def _plain(checkpoint: Any) -> Any:
    """The checkpoint function that transformers set, without our wrapper of an earlier call."""
    return (
        checkpoint.args[1] if isinstance(checkpoint, partial) and checkpoint.func is _quietly else checkpoint
    )


def _quietly(layer: nn.Module, checkpoint: Any, run: Any, *inputs: Any) -> Any:
    """Runs the layer through `checkpoint`, in evaluation mode each time that it computes."""

    def quiet(*arguments: Any) -> Any:
        before, layer.training = layer.training, False
        try:
            return run(*arguments)
        finally:
            layer.training = before

    return checkpoint(quiet, *inputs)


def _leave(modes: list[bool], layer: nn.Module, _: Any, __: Any) -> None:
    layer.training = modes.pop()


def as_used(model: nn.Module) -> None:
    """Makes every module compute as in inference: no dropout, no noise of routers. Layers are still computed
    again in the backward pass, if `quieten` was called once before."""
    model.eval()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer.training = True
