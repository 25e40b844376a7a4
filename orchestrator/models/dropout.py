"""What is random while a model learns: LoRA's dropout, drawn so that no cut can change it; and nothing else.

    (seed, step, layer) x a token's identity (example, branch, position) x feature --counter-based hash--> kept or dropped

A generator that is drawn from in turn gives a token another mask in another micro-batch, on another rank, in
another layout or order, and again when activations are computed once more. Here a mask is a function of what
it is for. A prompt that several branches share has one mask for all of them, also where a layout repeats it.

A model's own noise (dropout, routers that jitter or draw their experts) is off: every module computes as it
does when it is used.
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


def _at_once(device: torch.device) -> int:
    """Elements whose hashes are made at once: what a CPU's caches hold, and 128 MB of a GPU."""
    return 1 << (16 if device.type == "cpu" else 24)


def kept(identity: Tensor, key: int, features: int, p: float) -> Tensor:
    """Bool[N, features]: which features of each token stay, each with probability 1 - p. identity: Int64[N];
    key: 64 bits."""
    first, second = words(key)
    token = mixed(mixed((identity & WORD) ^ first) ^ ((identity >> 32) & WORD) ^ second)
    feature = mixed(torch.arange(features, device=identity.device) * 0x9E37_79B1 & WORD)
    limit, rows = round(p * 2**32), max(1, _at_once(identity.device) // features)
    return torch.cat([mixed((part[:, None] + feature) & WORD) >= limit for part in token.split(rows)])


@dataclass(slots=True)
class Draws:
    """For which step and for which tokens masks are drawn now. key: of (seed, step), None: nothing is
    dropped; identity: Int64[N] of the tokens that go through the model, row after row."""

    key: tuple[int, int] | None = None
    identity: Tensor | None = None
    layers: list[str] = field(default_factory=list)

    def at(self, seed: int, step: int) -> None:
        """From here on masks are those of this optimizer step, also for layers that are computed again in the
        backward pass."""
        self.key = (seed, step)

    def off(self) -> None:
        """From here on nothing is dropped."""
        self.key = self.identity = None


class KeyedDropout(nn.Module):
    """nn.Dropout whose mask is a function of (seed, step, layer, token, feature). name: of the layer in the
    model without wrappers."""

    def __init__(self, p: float, name: str, draws: Draws) -> None:
        super().__init__()
        self.p, self.name, self.draws = p, name, draws

    def forward(self, values: Tensor) -> Tensor:
        """values: Float[..., features] of all the tokens that the model was given."""
        draws = self.draws
        if draws.key is None:
            return values
        assert draws.identity is not None, "dropout is drawn by token, but nobody said which tokens these are"
        if values.numel() != values.shape[-1] * len(draws.identity):
            raise ConfigError(
                f"model.lora.dropout: {self.name} is given some of the tokens only",
                why="dropout is drawn for each token, and a mixture's expert does not say which ones it got",
                fix="set model.lora.dropout=0, or leave this layer out of model.lora.target_modules",
            )
        key = hashed(*draws.key, zlib.crc32(self.name.encode()))
        mask = kept(draws.identity, key, values.shape[-1], self.p).view(values.shape)
        return torch.where(mask, values / (1.0 - self.p), 0.0)

    def extra_repr(self) -> str:
        return f"p={self.p}, name={self.name}"


def keyed_dropout(model: nn.Module) -> Draws:
    """Puts KeyedDropout in the place of every dropout of a LoRA adapter and says what they draw by; `layers`
    names them."""
    draws = Draws()
    for name, layer in model.named_modules():
        adapters: Any = getattr(layer, "lora_dropout", None)
        for adapter, dropout in list(adapters.items()) if isinstance(adapters, nn.ModuleDict) else ():
            if isinstance(dropout, nn.Dropout):
                adapters[adapter] = KeyedDropout(dropout.p, name, draws)
                draws.layers.append(name)
    return draws


def quieten(model: nn.Module) -> None:
    """Makes `as_used` hold while activations are computed again: a layer has to be in training to do that, so
    it is where it is called and not while it computes."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            asked: list[bool] = []
            layer.register_forward_pre_hook(partial(_enter, asked))
            layer.register_forward_hook(partial(_leave, asked), always_call=True)


INSIDE = "__call__" not in vars(GradientCheckpointingLayer)
"""Since transformers 5.24 a layer decides in its forward, after the hooks, whether it is computed again, and
is not where there are no gradients."""


def _enter(asked: list[bool], layer: nn.Module, _: Any) -> None:
    asked.append(layer.training)
    if not INSIDE or not torch.is_grad_enabled():
        layer.training = False
    elif layer.training:
        any_layer: Any = layer
        any_layer._gradient_checkpointing_func = partial(
            _quietly, layer, _plain(any_layer._gradient_checkpointing_func)
        )


def _plain(checkpoint: Any) -> Any:
    """What was set by transformers, without our own wrapping of an earlier call."""
    return (
        checkpoint.args[1] if isinstance(checkpoint, partial) and checkpoint.func is _quietly else checkpoint
    )


def _quietly(layer: nn.Module, checkpoint: Any, run: Any, *inputs: Any) -> Any:
    """The layer through `checkpoint`, computing as it is used each time that it runs."""

    def quiet(*given: Any) -> Any:
        before, layer.training = layer.training, False
        try:
            return run(*given)
        finally:
            layer.training = before

    return checkpoint(quiet, *inputs)


def _leave(asked: list[bool], layer: nn.Module, _: Any, __: Any) -> None:
    layer.training = asked.pop()


def as_used(model: nn.Module) -> None:
    """Every module of a model that learns computes as it does when it is used: no dropout, no noise of
    routers. Layers that shall be computed again in the backward pass still are, if `quieten` was called once.
    """
    model.eval()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer.training = True
