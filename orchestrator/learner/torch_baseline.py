"""The baseline of `verify`: one process, one batch, plain torch. It shares no batching, engine or head with
the learner.

Rows are padded, logits are the model's own at every position, and torch's AdamW updates fp32 weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.algorithms.losses.interface import ExperienceTensors, TokenScores
from orchestrator.algorithms.schedule import learning_rate
from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.batches import Floats, LossUnits, MicroBatch, SequenceGroup
from orchestrator.data.packing import by_branch, pack
from orchestrator.learner.optimizer import zero_missing
from orchestrator.models.decay import parameter_groups
from orchestrator.models.dropout import keyed_dropout
from orchestrator.models.load import load
from orchestrator.models.rows import experience_columns
from orchestrator.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class PlainStep:
    """Loss and gradient norm (before clipping) of one optimizer step."""

    loss: float
    grad_norm: float


class PlainTrainer:
    """Trains on whole effective batches. The reference policy is the start model, run on each batch."""

    def __init__(self, recipe: Recipe, algorithm: AlgorithmSpec, total_steps: int) -> None:
        self.recipe, self.algorithm, self.total_steps = recipe, algorithm, total_steps
        self.model: Any = self._load()
        self.dropout = keyed_dropout(self.model)
        self.reference = self._load().requires_grad_(False) if algorithm.needs_reference else None
        cfg = recipe.optimizer
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        groups = parameter_groups(self.model, cfg.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=cfg.betas, eps=cfg.eps)

    def _load(self) -> torch.nn.Module:
        recipe = self.recipe
        return load(
            recipe.model, seed=recipe.run.seed, head=self.algorithm.head, longest=recipe.data.max_length
        ).model.eval()

    def step(self, groups: Sequence[SequenceGroup], units: LossUnits, step: int) -> PlainStep:
        """One optimizer step on all examples at once."""
        rows = pack(groups, "padded")
        ref = None
        if self.reference is not None:
            with torch.no_grad():
                ref = self._logps(self.reference, rows)
        self.dropout.at(self.recipe.run.seed, step)
        self.dropout.identity = torch.from_numpy(rows.identity).flatten()
        scores = self._scores(rows, ref)
        self.dropout.off()
        loss = self.algorithm.objective(scores, units).total
        self.optimizer.zero_grad()
        loss.backward()
        zero_missing(self.trainable.values())
        limit = self.recipe.optimizer.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(
            self.trainable.values(), limit if limit is not None else float("inf")
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.optimizer, step, self.total_steps)
        self.optimizer.step()
        return PlainStep(float(loss.detach()), float(norm))

    @torch.no_grad()
    def token_logprobs(self, groups: Sequence[SequenceGroup]) -> list[tuple[Floats, ...]]:
        """Log-probs of the scored tokens under the current weights: [group][branch]."""
        rows = pack(groups, "padded")
        return by_branch(rows, self._logps(self.model, rows).numpy())

    def weights(self) -> dict[str, Floats]:
        """Trained fp32 weights by Hugging Face name."""
        return {name: p.detach().numpy() for name, p in self.trainable.items()}

    def _scores(self, rows: MicroBatch, ref: Tensor | None) -> TokenScores:
        rewards = values = entropy = None
        logps = torch.zeros(0)
        if self.algorithm.head == "scalar":
            rewards = self._rewards(rows)
        elif self.algorithm.head == "value":
            values = self._token_outputs(rows)[torch.from_numpy(rows.score_at)]
        else:
            logps, entropy = self._distribution(self.model, rows)
        return TokenScores(
            logps=logps,
            sequence=torch.from_numpy(rows.sequence),
            examples=len(rows),
            branches=rows.branches,
            ref_logps=ref,
            label=None if rows.label is None else torch.from_numpy(rows.label),
            margin=None if rows.margin is None else torch.from_numpy(rows.margin),
            wpo=None,
            rewards=rewards,
            entropy=entropy,
            values=values,
            experience=_experience(rows),
        )

    def _logps(self, model: torch.nn.Module, rows: MicroBatch) -> Tensor:
        return self._distribution(model, rows)[0]

    def _distribution(self, model: torch.nn.Module, rows: MicroBatch) -> tuple[Tensor, Tensor]:
        """(log-probs, entropies) Float[N] of the scored tokens."""
        logits = model(
            input_ids=torch.from_numpy(rows.input_ids), attention_mask=_mask(rows), use_cache=False
        ).logits
        logits = (
            logits.flatten(0, 1)[torch.from_numpy(rows.score_at)].float()
            / self.algorithm.head_spec.temperature
        )
        logps = torch.log_softmax(logits, -1)
        return logps.gather(1, torch.from_numpy(rows.targets)[:, None])[:, 0], -(logps.exp() * logps).sum(1)

    def _rewards(self, rows: MicroBatch) -> Tensor:
        """Rewards Float[n, branches], read like AutoModelForSequenceClassification at the last token that is
        not padding."""
        pad: int = self.model.config.get_text_config().pad_token_id
        ids = np.where(rows.segment >= 0, rows.input_ids, pad)
        logits = self.model(
            input_ids=torch.from_numpy(ids), attention_mask=_mask(rows), use_cache=False
        ).logits
        return logits.float()[torch.from_numpy(rows.last_at // ids.shape[1]), 0].view(-1, rows.branches)

    def _token_outputs(self, rows: MicroBatch) -> Tensor:
        """Output of the classification model at each position, Float[R*T]."""
        backbone = getattr(self.model, self.model.base_model_prefix)
        hidden = backbone(
            input_ids=torch.from_numpy(rows.input_ids), attention_mask=_mask(rows), use_cache=False
        ).last_hidden_state
        return self.model.score(hidden).float().flatten()


def _experience(rows: MicroBatch) -> ExperienceTensors | None:
    if rows.experience is None:
        return None
    columns: list[Any] = [
        None if c is None else torch.from_numpy(c) for c in experience_columns(rows.experience)
    ]
    return ExperienceTensors(*columns)


def _mask(rows: MicroBatch) -> Tensor:
    return torch.from_numpy((rows.segment >= 0).astype("int64"))
