"""The reference policy on one rank: frozen, and used for its log-probs alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orchestrator.algorithms.losses.logprobs import HeadSpec
from orchestrator.algorithms.table import build
from orchestrator.core.batches import Floats, MicroBatch
from orchestrator.models.forward import HeadOutputs, ScoringModel, run_forward
from orchestrator.models.fused import fuse
from orchestrator.models.load import load, placed
from orchestrator.models.precision import precision_of
from orchestrator.models.rows import MicroBatchTensors
from orchestrator.recipe.schema import Recipe


def load_reference(recipe: Recipe, device: torch.device) -> tuple[ScoringModel, str]:
    """The frozen reference policy and its fingerprint. It is `model.reference`, or the start weights if that
    is not set, and never a resumed policy."""
    loaded = load(
        recipe.model, seed=recipe.run.seed, head="lm", reference=True, longest=recipe.data.max_length
    )
    algorithm = build(recipe.algorithm, recipe.rollouts)
    scoring = ScoringModel(
        loaded.model, head="lm", spec=HeadSpec(temperature=algorithm.head_spec.temperature)
    )
    scoring = placed(scoring, device, precision_of(recipe.learners.precision).model_dtype)
    if recipe.learners.fused:  # like the policy: otherwise the two differ by rounding before the first step
        fuse(scoring.hugging_face)
    scoring.requires_grad_(False)
    return scoring.eval(), loaded.fingerprint


class RankReference:
    """The reference policy alone on one rank. It fills the cache of reference log-probs before the learner is
    built."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.scoring, self.fingerprint = load_reference(recipe, device)

    @torch.no_grad()
    def token_logprobs(
        self, micro_batches: Sequence[MicroBatch], reference: bool = True, step: int | None = None
    ) -> tuple[Floats, ...]:
        """fp32 log-probs of the scored tokens of each micro-batch."""
        assert reference and step is None, "only the reference policy is loaded, and it has no dropout"
        precision = precision_of(self.recipe.learners.precision)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision.autocast):
            return on_host(
                [
                    logprobs_of(run_forward(self.scoring, MicroBatchTensors.of(mb, self.device)))
                    for mb in micro_batches
                ]
            )


def logprobs_of(result: HeadOutputs) -> Tensor:
    assert result.logps is not None, "token_logprobs needs a language-model head"
    return result.logps


def on_host(values: Sequence[Tensor]) -> tuple[Floats, ...]:
    """The values as fp32 arrays. The copies start once every forward has been queued on the device."""
    return tuple(value.float().cpu().numpy() for value in values)
