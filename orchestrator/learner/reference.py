"""The reference policy on one rank: frozen, read for its log-probs alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orchestrator.algorithms.losses.logprobs import HeadSpec
from orchestrator.algorithms.table import build
from orchestrator.core.batches import Floats, MicroBatch
from orchestrator.models.forward import HeadOutputs, ScoringModel, run_forward
from orchestrator.models.fused import fuse
from orchestrator.models.load import load, placed
from orchestrator.models.rows import MicroBatchTensors
from orchestrator.recipe.schema import Recipe


def load_reference(recipe: Recipe, device: torch.device) -> tuple[ScoringModel, str]:
    """The frozen reference policy and its fingerprint: `model.reference`, else the start weights, never a
    resumed policy."""
    loaded = load(
        recipe.model, seed=recipe.run.seed, head="lm", reference=True, longest=recipe.data.max_length
    )
    algorithm = build(recipe.algorithm, recipe.rollouts)
    scoring = ScoringModel(
        loaded.model, head="lm", spec=HeadSpec(temperature=algorithm.head_spec.temperature)
    )
    scoring = placed(scoring, device, MODEL_DTYPES[recipe.learners.precision])
    if recipe.learners.fused:  # as the policy is: else the two differ by rounding before the first step
        fuse(scoring.hugging_face)
    scoring.requires_grad_(False)
    return scoring.eval(), loaded.fingerprint


class RankReference:
    """The reference policy alone on one rank, to fill the cache of reference log-probs before the learner is
    built."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.scoring, self.fingerprint = load_reference(recipe, device)

    @torch.no_grad()
    def token_logprobs(
        self, micro_batches: Sequence[MicroBatch], reference: bool = True, step: int | None = None
    ) -> tuple[Floats, ...]:
        """fp32 log-probs of the scored tokens of each micro-batch."""
        assert reference and step is None, "only the reference policy is loaded, and nothing of it is dropped"
        autocast = self.recipe.learners.precision == "bf16_autocast"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            return on_host(
                [
                    logprobs_of(run_forward(self.scoring, MicroBatchTensors.of(mb, self.device)))
                    for mb in micro_batches
                ]
            )


MODEL_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "bf16_autocast": torch.float32,
}


def logprobs_of(result: HeadOutputs) -> Tensor:
    assert result.logps is not None, "token_logprobs needs a language-model head"
    return result.logps


def on_host(values: Sequence[Tensor]) -> tuple[Floats, ...]:
    """Float arrays of what the device computed, fp32, read only once all of it has been asked for."""
    return tuple(value.float().cpu().numpy() for value in values)
