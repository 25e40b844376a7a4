"""The training forward: rows in, log-probs of scored positions (or rewards, or values) out.

    input ids, positions, mask --backbone--> hidden states --scored positions--> head in chunks --> log-probs

Logits exist only for scored positions, and only one chunk at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from orchestrator.algorithms.losses.logprobs import HeadSpec, chunked_logprobs
from orchestrator.core.errors import ConfigError
from orchestrator.models.attention import Capabilities, attention_mask, capabilities
from orchestrator.models.block_attention import BLOCKS, block_masks, set_attention
from orchestrator.models.classes import Head
from orchestrator.models.dropout import Draws, keyed_dropout, quieten
from orchestrator.models.ragged_attention import INSIDE, RAGGED, spread, with_rows
from orchestrator.models.rows import MicroBatchTensors


def chunk_logits(device_type: str) -> int:
    """Number of logits in one chunk of the head. 2^24 (64 MB in fp32) stay near a CPU's caches. A GPU needs
    products of thousands of positions: 2^29 logits (2 GB) are 4,185 positions at a vocabulary of 128,256."""
    return 1 << (29 if device_type == "cuda" else 24)


Checkpointing = Literal["none", "selective", "full"]
"""How much of the activations is computed again in the backward pass, from nothing to everything."""


@dataclass(frozen=True, slots=True)
class HeadOutputs:
    """Outputs of a head for N scored tokens of n examples."""

    logps: Tensor | None = None
    """Float[N], log-probs of the scored tokens, from a language-model head."""
    wpo: Tensor | None = None
    """Float[N], WPO terms without gradient, if the head's spec wants them."""
    entropy: Tensor | None = None
    """Float[N], entropies, if the head's spec wants them."""
    rewards: Tensor | None = None
    """Float[n, branches], from a scalar head."""
    state_values: Tensor | None = None
    """Float[N], from a critic."""

    @property
    def values(self) -> Tensor:
        """The output that carries the gradient: log-probs, rewards or state values."""
        values = next((v for v in (self.logps, self.rewards, self.state_values) if v is not None), None)
        assert values is not None
        return values


def run_forward(
    model: Callable[[MicroBatchTensors], tuple[Tensor, ...]], rows: MicroBatchTensors
) -> HeadOutputs:
    """Runs a ScoringModel, alone or inside a DeepSpeed engine. The model returns plain tuples, since ZeRO-3's
    hooks see tensors only in those."""
    inner: Any = getattr(model, "module", model)  # DeepSpeed's engine has the model as `module`
    assert isinstance(inner, ScoringModel)
    outputs = model(rows)
    if inner.kind == "scalar":
        return HeadOutputs(rewards=outputs[0])
    if inner.kind == "value":
        return HeadOutputs(state_values=outputs[0])
    logps, wpo, entropy = outputs
    return HeadOutputs(
        logps, wpo if inner.head.spec.want_wpo else None, entropy if inner.head.spec.want_entropy else None
    )


class ScoredHead(nn.Module):
    """Output embedding applied to scored positions only, in chunks that are computed again in the backward.

    It holds the weight as its own parameter (shared with the model's lm_head), because DeepSpeed ZeRO-3
    gathers parameters module by module. It is called exactly once per forward.
    """

    def __init__(self, linear: nn.Linear, spec: HeadSpec) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.spec = spec
        self.vocabulary = linear.out_features
        self.computes_as: str | None = None
        """Type of the device that sets the size of chunks, if it is not the tensors' own: the memory model
        simulates a GPU's step on a CPU."""

    def forward(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chunk = max(64, chunk_logits(self.computes_as or hidden.device.type) // self.vocabulary)
        output = chunked_logprobs(hidden, self.weight, self.bias, targets, replace(self.spec, chunk=chunk))
        empty = output.logps.new_empty(0)
        return (
            output.logps,
            empty if output.wpo is None else output.wpo,
            empty if output.entropy is None else output.entropy,
        )


class ScoringModel(nn.Module):
    """A Hugging Face model with the training forward."""

    def __init__(self, model: nn.Module, *, head: Head, spec: HeadSpec | None = None) -> None:
        """spec: outputs of a language-model head; its chunk, cap and scale are replaced by the model's."""
        super().__init__()
        self.model = model
        hugging_face = self.hugging_face
        self.capabilities: Capabilities = capabilities(hugging_face.config.get_text_config())
        self.plain_attention = hugging_face.config._attn_implementation
        self.kind: Head = head
        self.dropout: Draws = keyed_dropout(model)
        quieten(model)
        self._pad: int | None = getattr(hugging_face.config.get_text_config(), "pad_token_id", None)
        if head != "lm" and not isinstance(getattr(hugging_face, "score", None), nn.Module):
            raise ConfigError(
                f"{type(hugging_face).__name__} does not read its output from one token",
                why="a reward model and a critic put a linear layer named `score` on the hidden state of a "
                "token",
                fix="start from a decoder, e.g. llama or qwen2",
            )
        if head == "lm":
            linear = hugging_face.get_output_embeddings()
            if not isinstance(linear, nn.Linear):
                raise ConfigError(
                    f"the output layer of {type(hugging_face).__name__} is {type(linear).__name__}, not a "
                    "plain linear layer",
                    why="log-probs are computed from its weight, chunk by chunk",
                    fix="leave lm_head out of model.lora.target_modules",
                )
            other_parts = [
                m
                for m in hugging_face.children()
                if m is not linear and m is not self.backbone and any(True for _ in m.parameters())
            ]
            self._nested_head = bool(other_parts)  # e.g. BERT's transform before the output layer
            soft_cap, scale = logit_transform(hugging_face.config.get_text_config())
            self.head = ScoredHead(linear, replace(spec or HeadSpec(), soft_cap=soft_cap, scale=scale))

    @property
    def hugging_face(self) -> PreTrainedModel:
        """The model without LoRA's wrapper. Its adapted layers stay in place."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "peft_config") else model

    @property
    def backbone(self) -> nn.Module:
        named = getattr(self.hugging_face, self.hugging_face.base_model_prefix, None)
        # Llama 4's prefix names a part that it does not have
        return named if named is not None else self.hugging_face.model

    def forward(self, rows: MicroBatchTensors) -> tuple[Tensor, ...]:
        """(log-probs, WPO terms, entropies), (rewards Float[n, branches],) or (state values Float[N],). See
        `run_forward`."""
        hidden = self.hidden_states(rows)
        if self.kind == "lm":
            return self.head(hidden[rows.score_at], rows.targets)
        if self.kind == "value":
            return (self._score(hidden[rows.score_at]).float()[:, 0],)
        return (self._score(hidden[_read_at(rows, self._pad)]).float().view(-1, rows.branches),)

    def _score(self, hidden: Tensor) -> Tensor:
        """Output of the scalar head, Float[N, 1], for hidden states Float[N, H]."""
        classifier: Any = self.hugging_face
        return classifier.score(hidden)

    def hidden_states(self, rows: MicroBatchTensors) -> Tensor:
        """Final hidden states Float[R*T, H]."""
        ragged = rows.ragged if self.capabilities.blocks and self.plain_attention == INSIDE else None
        self.dropout.identity = (
            rows.identity.flatten() if ragged is None else rows.identity.flatten()[ragged.at]
        )
        dtype = (
            torch.get_autocast_dtype(rows.input_ids.device.type)
            if torch.is_autocast_enabled()
            else self._dtype()
        )
        # stays set until rows of another kind come: with checkpointing, layers run again in the backward
        set_attention(
            self.hugging_face, BLOCKS if rows.one_row else self.plain_attention if ragged is None else RAGGED
        )
        mask: Any
        if rows.one_row:
            mask = block_masks(rows.segment, rows.branch, rows.position_ids, self.capabilities)
        else:
            mask = attention_mask(
                rows.segment, rows.branch, rows.position_ids, rows.layout, self.capabilities, dtype
            )
        inputs = {"input_ids": rows.input_ids, "attention_mask": mask, "use_cache": False}
        if ragged is not None:
            tokens = {
                name: getattr(rows, name).flatten()[ragged.at][None] for name in ("input_ids", "position_ids")
            }
            hidden = self.backbone(
                **tokens, attention_mask=with_rows(mask, ragged), use_cache=False
            ).last_hidden_state
            return spread(hidden[0], ragged.at, rows.input_ids.numel())
        if rows.layout != "padded":  # padded rows start at the model's own first position, which may not be 0
            inputs["position_ids"] = rows.position_ids
        if self.kind == "lm" and self._nested_head:
            return _before_head(self.hugging_face, inputs).flatten(0, 1)
        return self.backbone(**inputs).last_hidden_state.flatten(0, 1)

    def checkpoint(self, mode: Checkpointing) -> None:
        """Sets what each layer computes again in the backward: "none", "selective" (all but matrix products
        and attention) or "full" (everything, about a third more time). The gradients are the same."""
        if mode == "none":
            self.hugging_face.gradient_checkpointing_disable()
            return
        options: dict[str, Any] = {"use_reentrant": False}
        if mode == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept)
        self.hugging_face.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        # transformers enables it for the reentrant kind; frozen embeddings (LoRA) would get gradients
        self.hugging_face.disable_input_require_grads()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Switches the adapter of a LoRA model off, which gives its reference policy."""
        if not hasattr(self.model, "peft_config"):
            raise ValueError("only a LoRA model holds its own reference")
        with self.model.disable_adapter():  # pyright: ignore[reportCallIssue]
            yield

    def hf_names(self) -> dict[str, str]:
        """Names in the Hugging Face (or adapter) folder by our parameter names."""
        return {name: name.removeprefix("model.") for name, _ in self.named_parameters()}

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, eos: int, synced: bool
    ) -> list[list[int]]:
        """Greedy continuations without the eos token. Prompts are padded on the left and masked by position.

        synced: True if all ranks generate together, as ZeRO-3 needs.
        """
        device = next(self.parameters()).device
        width = max(len(p) for p in prompts)
        ids = torch.full((len(prompts), width), eos, dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt), device=device)
            mask[row, width - len(prompt) :] = 1
        set_attention(self.hugging_face, self.plain_attention)
        output = self.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
            synced_gpus=synced,
        )
        return [_until(row[width:].tolist(), eos) for row in output]

    def _dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())


def _read_at(rows: MicroBatchTensors, pad: int | None) -> Tensor:
    """Flat positions at which AutoModelForSequenceClassification reads each sequence, Int[N]: the last token
    that is not the pad token. This is not the sequence's end if it ends with the pad token, e.g. with an eos
    token that also serves as padding."""
    if pad is None:
        return rows.last_at
    ids, segment, branch = rows.input_ids.flatten(), rows.segment.flatten(), rows.branch.flatten()
    at = torch.arange(len(ids), device=ids.device)
    last = rows.last_at[:, None]
    own = (
        (segment == segment[last]) & ((branch == 0) | (branch == branch[last])) & (at <= last) & (ids != pad)
    )
    read_at = torch.where(own, at, -1).amax(1)
    return torch.where(read_at < 0, rows.last_at, read_at)


def _before_head(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Input of the output layer, Float[R, T, H], for a model whose head has more layers (BERT's transform).
    The output layer itself is skipped in this forward, since only scored positions need it."""
    linear: Any = model.get_output_embeddings()
    captured: list[Tensor] = []

    def capture(hidden: Tensor) -> Tensor:
        captured.append(hidden)
        return hidden[..., :1]

    linear.forward = capture
    try:
        model(**inputs)
    finally:
        del linear.forward
    return captured[0]


_COSTLY = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""Operations that are expensive to compute and small to keep: products with weights, and attention that keeps
no scores. bmm is not among them: it serves attention that keeps scores."""


def _kept(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _COSTLY else CheckpointPolicy.PREFER_RECOMPUTE


def _until(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


def logit_transform(config: Any) -> tuple[float | None, float]:
    """(soft cap, factor) that the architecture applies to its logits.

    Gemma 2 and 3, RecurrentGemma and xLSTM cap: c * tanh(logits / c). Cohere multiplies by logit_scale,
    Falcon-H1 by lm_head_multiplier, HyperCLOVA X by logits_scaling. Granite divides by logits_scaling,
    Inkling by its width's multiplier.
    """
    caps = (
        getattr(config, name, None)
        for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    )
    soft_cap = next((cap for cap in caps if cap is not None), None)
    scale = 1.0 / (getattr(config, "logits_mup_width_multiplier", None) or 1.0)
    for name in ("logit_scale", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        scale *= factor if factor is not None else 1.0
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        scale = scale * scaling if config.model_type == "hyperclovax" else scale / scaling
    return soft_cap, scale


@torch.no_grad()
def head_gap(scoring: ScoringModel, rows: MicroBatchTensors) -> Tensor:
    """Differences Float[N] of our log-probs (or rewards) from those of the model's own forward on the same
    padded rows, for the start-up check."""
    assert rows.layout == "padded"
    set_attention(scoring.hugging_face, scoring.plain_attention)
    if scoring.kind == "scalar":
        ids = (
            rows.input_ids
            if scoring._pad is None
            else rows.input_ids.masked_fill(rows.segment < 0, scoring._pad)
        )
        mask = (rows.segment >= 0).long()
        rewards = scoring.hugging_face(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return run_forward(scoring, rows).values.flatten() - rewards.float()[rows.last_at // ids.shape[1], 0]
    own = scoring.hugging_face(input_ids=rows.input_ids, use_cache=False).logits
    own = own.flatten(0, 1)[rows.score_at].float() / scoring.head.spec.temperature
    plain = torch.log_softmax(own, -1).gather(1, rows.targets[:, None])[:, 0]
    return run_forward(scoring, rows).values - plain
