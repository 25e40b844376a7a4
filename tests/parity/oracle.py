"""TRL's own trainers as the outside check: their real loss code runs on given log-probs or logits, without
training.

Each oracle calls a trainer's method unbound, with a namespace that holds the fields the method reads.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from orchestrator.algorithms.losses.interface import TokenScores
from orchestrator.core.batches import LossUnits

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}
"""Keys that TRL's configurations need on any machine; no loss reads them."""
TRL_DIVERGENCE = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js": "js_divergence",
    "alpha": "alpha_divergence",
}


@dataclass(frozen=True, slots=True)
class Batch:
    """n examples of two branches in TRL's layout: rows [branch 0 of all | branch 1 of all], a token a column.

    policy, reference, log_sum_sq: Float[2n, T] with zeros where mask: Bool[2n, T] is False.
    """

    policy: Tensor
    reference: Tensor
    log_sum_sq: Tensor
    mask: Tensor

    @property
    def examples(self) -> int:
        return len(self.mask) // 2

    @property
    def units(self) -> LossUnits:
        chosen, rejected = self.mask.sum(1).view(2, -1).sum(1).tolist()
        return LossUnits(self.examples, (chosen, rejected))

    def scores(self, label: Tensor | None = None) -> TokenScores:
        """The same numbers as our flat tokens: example by example, chosen before rejected."""
        n = self.examples
        order = [row for example in range(n) for row in (example, n + example)]
        sequence = torch.cat([torch.full((int(self.mask[row].sum()),), k) for k, row in enumerate(order)])

        def flat(values: Tensor) -> Tensor:
            return torch.cat([values[row][self.mask[row]] for row in order])

        policy = flat(self.policy)
        wpo = (policy - flat(self.log_sum_sq)).detach()
        return TokenScores(policy, sequence, n, 2, ref_logps=flat(self.reference), wpo=wpo, label=label)


def random_batch(
    chosen: Sequence[int], rejected: Sequence[int], *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Batch:
    """Random token log-probs; `chosen` and `rejected` are lengths. Reference near policy, as in training."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([*chosen, *rejected])
    prompts = torch.randint(1, 5, lengths.shape, generator=draw)
    columns = torch.arange(int((lengths + prompts).max()))
    mask = (columns >= prompts[:, None]) & (columns < (prompts + lengths)[:, None])
    policy = -4.0 * torch.rand(mask.shape, generator=draw, dtype=torch.float64) - 0.01
    reference = (policy + 0.6 * torch.randn(mask.shape, generator=draw, dtype=torch.float64)).clamp(
        max=-0.001
    )
    # log sum p^2 lies between 2 log p of the token and 0.
    log_sum_sq = -1.5 * torch.rand(mask.shape, generator=draw, dtype=torch.float64)
    return Batch(*((v * mask).to(dtype) for v in (policy, reference, log_sum_sq)), mask)


def sequence_batch(policy: Sequence[float], reference: Sequence[float], lengths: Sequence[int]) -> Batch:
    """Given sequence log-probs spread evenly over their tokens; fp64."""
    size = torch.tensor(lengths)
    mask = torch.arange(int(size.max()) + 1)[None] < size[:, None]
    spread = [(torch.tensor(v, dtype=torch.float64) / size)[:, None] * mask for v in (policy, reference)]
    return Batch(*spread, torch.zeros_like(spread[0]), mask)


class _Accelerator:
    device = torch.device("cpu")

    @staticmethod
    def gather(values: Tensor) -> Tensor:
        return values

    gather_for_metrics = gather


def _fused(log_probs: Tensor, log_sum_sq: Tensor) -> FusedCausalLMOutput:
    zeros = torch.zeros_like(log_probs)
    return FusedCausalLMOutput(
        log_probs=log_probs,
        log_sum_sq_probs=log_sum_sq,
        entropy=zeros,
        is_top1=zeros.bool(),
        mean_logits=zeros,
    )


def _trainer(**fields: Any) -> SimpleNamespace:
    """The fields of `self` that every trainer's loss reads."""
    model = torch.nn.Module().train()
    model.is_gradient_checkpointing = False
    common = {
        "model": model,
        "accelerator": _Accelerator(),
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**{**common, **fields})


def _logged(trainer: SimpleNamespace) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


def _inputs(mask: Tensor) -> dict[str, Tensor]:
    """Ids and masks one longer than the log-probs: nothing predicts the first token."""
    completion = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], 1)
    return {
        "input_ids": torch.ones_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
    }


def dpo(
    batch: Batch, losses: dict[str, float], *, f_divergence: str = "reverse_kl", **changes: Any
) -> tuple[Tensor, dict[str, float]]:
    """DPOTrainer._compute_loss: the loss (with its graph) and the metrics it logged. f_divergence: by our
    name; changes: of DPOConfig()."""
    args = DPOConfig(
        **QUIET,
        loss_type=list(losses),
        loss_weights=list(losses.values()),
        f_divergence_type=TRL_DIVERGENCE[f_divergence],
        **changes,
    )

    def reference(**_: Any) -> FusedCausalLMOutput:
        return _fused(batch.reference, batch.log_sum_sq)

    def policy(**_: Any) -> FusedCausalLMOutput:
        return _fused(batch.policy, batch.log_sum_sq)

    trainer = _trainer(
        ref_model=reference,
        ld_alpha=args.ld_alpha,
        f_divergence_type=args.f_divergence_type,
        f_alpha_divergence_coef=args.f_alpha_divergence_coef,
        loss_types=args.loss_type,
        loss_weights=args.loss_weights,
        beta=args.beta,
        label_smoothing=args.label_smoothing,
        use_weighting=args.use_weighting,
        args=args,
    )
    loss = DPOTrainer._compute_loss(trainer, policy, _inputs(batch.mask), False)
    return loss, _logged(trainer)


def kto(
    batch: Batch, label: Tensor, *, beta: float, desirable: float, undesirable: float
) -> tuple[Tensor, dict[str, float]]:
    """KTOTrainer._compute_loss with branch 0 as the completions and branch 1 as the KL completions; all else
    is KTOConfig()'s."""
    n, args = (
        batch.examples,
        KTOConfig(**QUIET, beta=beta, desirable_weight=desirable, undesirable_weight=undesirable),
    )

    def model(values: Tensor) -> Any:
        # TRL first runs the KL rows under no_grad, then the completions; their ids tell which rows are meant
        def forward(*, input_ids: Tensor, **_: Any) -> FusedCausalLMOutput:
            rows = slice(n, 2 * n) if int(input_ids[0, 0]) == 2 else slice(0, n)
            return _fused(values[rows], batch.log_sum_sq[rows])

        return forward

    trainer = _trainer(
        ref_model=model(batch.reference),
        calculate_KL=True,
        loss_type=args.loss_type,
        beta=args.beta,
        desirable_weight=args.desirable_weight,
        undesirable_weight=args.undesirable_weight,
        args=args,
    )
    trainer._compute_kl_logps = functools.partial(KTOTrainer._compute_kl_logps, trainer)
    completions = _inputs(batch.mask[:n])
    mismatched = {f"KL_{name}": values for name, values in _inputs(batch.mask[n:]).items()}
    mismatched["KL_input_ids"] = 2 * mismatched["KL_input_ids"]
    loss = KTOTrainer._compute_loss(
        trainer, model(batch.policy), {**completions, **mismatched, "label": label.bool()}, False
    )
    return loss, _logged(trainer)


@dataclass(frozen=True, slots=True)
class LogitsBatch:
    """n pairs with logits, for trainers that start from logits. Rows: [chosen of all | rejected of all].

    logits: Float[2n, T, V]; ids: Int[2n, T]; completion, attention: Bool[2n, T].
    """

    logits: Tensor
    ids: Tensor
    completion: Tensor
    attention: Tensor

    def batch(self) -> Batch:
        """Its token log-probs; reference-free, so the reference is 0."""
        logps = torch.log_softmax(self.logits[:, :-1], -1).gather(2, self.ids[:, 1:, None])[..., 0]
        mask = self.completion[:, 1:]
        return Batch(logps * mask, torch.zeros_like(logps), torch.zeros_like(logps), mask)

    def inputs(self) -> dict[str, Tensor]:
        n = len(self.ids) // 2
        labels = self.ids.masked_fill(~self.completion, -100)
        columns = {"input_ids": self.ids, "attention_mask": self.attention.long(), "labels": labels}
        parts = (("chosen", slice(0, n)), ("rejected", slice(n, 2 * n)))
        return {
            f"{branch}_{name}": values[rows] for name, values in columns.items() for branch, rows in parts
        }


def random_logits(
    chosen: Sequence[int],
    rejected: Sequence[int],
    *,
    prompt: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LogitsBatch:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([*chosen, *rejected])[:, None]
    width, vocabulary = prompt + int(lengths.max()), 11
    ids = torch.randint(vocabulary, (len(lengths), width), generator=draw)
    logits = torch.randn(len(lengths), width, vocabulary, generator=draw, dtype=dtype)
    columns = torch.arange(width)[None]
    attention = columns < prompt + lengths
    return LogitsBatch(logits, ids, attention & (columns >= prompt), attention)


def cpo(
    batch: LogitsBatch,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    simpo_gamma: float,
    cpo_alpha: float,
) -> tuple[Tensor, dict[str, float]]:
    """CPOTrainer.get_batch_loss_metrics on `batch.logits`: its forward, log-probs, cpo_loss and NLL term."""
    fields = {
        "loss_type": loss_type,
        "alpha": 0.0,
        "simpo_gamma": simpo_gamma,
        "cpo_alpha": cpo_alpha,
        "label_smoothing": label_smoothing,
    }
    return _from_logits(CPOTrainer, "cpo_loss", batch, beta=beta, pad_token_id=0, **fields)


def orpo(batch: LogitsBatch, *, beta: float) -> tuple[Tensor, dict[str, float]]:
    """ORPOTrainer.get_batch_loss_metrics. Its NLL term counts the prompt's tokens too."""
    return _from_logits(ORPOTrainer, "odds_ratio_loss", batch, beta=beta, padding_value=0)


def _from_logits(
    trainer_class: Any, loss: str, batch: LogitsBatch, **fields: Any
) -> tuple[Tensor, dict[str, float]]:
    trainer = _trainer(is_encoder_decoder=False, **fields)
    for name in ("concatenated_forward", loss):
        setattr(trainer, name, functools.partial(getattr(trainer_class, name), trainer))
    trainer.concatenated_inputs = trainer_class.concatenated_inputs
    trainer.get_batch_logps = trainer_class.get_batch_logps

    def model(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=batch.logits)

    return trainer_class.get_batch_loss_metrics(trainer, model, batch.inputs())


def reward(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, centring: float | None
) -> tuple[Tensor, dict[str, float]]:
    """RewardTrainer.compute_loss on given rewards Float[n]."""
    trainer = _trainer(args=RewardConfig(**QUIET, center_rewards_coefficient=centring))

    def model(**_: Any) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=torch.cat([chosen, rejected])[:, None])

    inputs = {"attention_mask": torch.ones(2 * len(chosen), 3)}
    if margin is not None:
        inputs["margin"] = margin
    return RewardTrainer.compute_loss(trainer, model, inputs), _logged(trainer)
