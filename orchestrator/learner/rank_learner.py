"""A learner on one rank: the methods of core.roles.Learner for this rank's share of a PackedBatch.

    micro-batch --ScoringModel--> token log-probs --objective--> loss sum / global count --Engine--> gradient

Losses are sums divided once by the count of the whole effective batch, so the result does not depend on the
rank, the number of micro-batches or the layout.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.algorithms.losses.interface import LossSum, TokenScores
from orchestrator.algorithms.losses.sources import by_source
from orchestrator.algorithms.losses.whole_batch import linear
from orchestrator.algorithms.schedule import learning_rate
from orchestrator.algorithms.table import AlgorithmSpec, build, critic
from orchestrator.core import faults
from orchestrator.core.batches import Branch, Cut, Floats, LossUnits, MicroBatch, SequenceGroup
from orchestrator.core.errors import OutOfMemory
from orchestrator.core.reports import LearnReport, Mean, StepApplied
from orchestrator.data.packing import pack
from orchestrator.learner.engine import Engine, ProcessGroup
from orchestrator.learner.memory import (
    current_bytes,
    finish,
    give_back,
    is_out_of_memory,
    peak_bytes,
    reset_peak,
)
from orchestrator.learner.reference import load_reference, logprobs_of, on_host
from orchestrator.models.attention import attention_windows
from orchestrator.models.dropout import as_used
from orchestrator.models.forward import HeadOutputs, ScoringModel, run_forward
from orchestrator.models.fused import fuse
from orchestrator.models.load import LoadedModel, load
from orchestrator.models.rows import MicroBatchTensors
from orchestrator.recipe.schema import Recipe

Role = Literal["policy", "critic"]


@dataclass(frozen=True, slots=True)
class LearnerSpec:
    """What a rank needs to build its learner."""

    recipe: Recipe
    """For a critic the recipe with its own model and optimizer (see `critic_recipe`)."""
    cut: Cut
    total_steps: int
    """Length of the learning-rate schedule."""
    role: Role = "policy"
    """A critic learns the values for PPO's policy."""


StepMetrics = tuple[float, dict[str, Mean], dict[str, float]]
"""(loss, means, maxima) of a step."""


class Sums:
    """Loss and metric sums of one step, kept on the device and read from it once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float | Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, loss: LossSum, weight: float) -> None:
        if not weight:
            return  # a filler micro-batch, computed for the collectives only
        self._add("loss", loss.total.detach(), 1.0)
        for name, (total, count) in loss.means.items():
            self._add(name, total.detach(), count)
        for name, value in loss.maxima.items():
            value = value.detach().to(torch.float64)
            self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def _add(self, name: str, total: Tensor, count: float | Tensor) -> None:
        total = total.to(torch.float64)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0.0) + (
            count.to(torch.float64) if isinstance(count, Tensor) else count
        )

    def read(self) -> StepMetrics:
        """The metrics, by one transfer from the device: the only wait for it in a step."""
        if not self._sums:
            return 0.0, {}, {}
        on_device = [count for count in self._counts.values() if isinstance(count, Tensor)]
        values = iter(torch.stack([*self._sums.values(), *on_device, *self._maxima.values()]).tolist())
        totals = {name: next(values) for name in self._sums}
        counts = {
            name: next(values) if isinstance(count, Tensor) else count for name, count in self._counts.items()
        }
        maxima = {name: next(values) for name in self._maxima}
        means = {name: Mean(total, counts[name]) for name, total in totals.items()}
        return means.pop("loss").total, means, maxima


class RankLearner:
    """One rank's model and optimizer. Build it after ProcessGroup.join()."""

    def __init__(
        self, spec: LearnerSpec, group: ProcessGroup, device: torch.device, loaded: LoadedModel | None = None
    ) -> None:
        """loaded: a model that exists already (benchmarks create theirs on the device). Default: the
        recipe's."""
        self.spec, self.process_group, self.device = spec, group, device
        recipe = spec.recipe
        self.algorithm: AlgorithmSpec = (
            build(recipe.algorithm, recipe.rollouts) if spec.role == "policy" else critic(recipe.algorithm)
        )
        self.by_source = any(
            isinstance(data, list) and len(data) > 1 for data in (recipe.data.train, recipe.data.eval)
        )
        self.bytes_before_model = current_bytes(device)
        self.loaded: LoadedModel = loaded or load(
            recipe.model, seed=recipe.run.seed, head=self.algorithm.head, longest=recipe.data.max_length
        )
        self.scoring = ScoringModel(
            self.loaded.model, head=self.algorithm.head, spec=self.algorithm.head_spec
        )
        self.scoring.checkpoint(recipe.learners.checkpointing)
        if recipe.learners.fused:
            fuse(self.scoring.hugging_face)
        self.scoring.to(device)
        self.windows = attention_windows(self.scoring.hugging_face.config.get_text_config())
        self.engine = Engine(
            self.scoring,
            learners=recipe.learners,
            optimizer=recipe.optimizer,
            stage=spec.cut.zero_stage,
            sync=spec.cut.sync,
            world=group.world,
        )
        self.reference: ScoringModel | None = None
        if self.algorithm.keeps_reference(recipe):
            self.reference, _ = load_reference(recipe, device)
        reset_peak(device)

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], units: LossUnits, step: int
    ) -> LearnReport:
        """Adds the gradient of this rank's share of the step's loss. `loss` in the report is that share."""
        started = time.perf_counter()
        as_used(self.scoring)
        sums = Sums()
        with self.engine.accumulation():
            for index, micro_batch in enumerate(micro_batches):
                with self._located(micro_batch, index):
                    fault = self._inject("micro_batch", step)
                    self.scoring.dropout.at(self.spec.recipe.run.seed, step)
                    loss = self._loss(micro_batch, units)
                    share = loss.total * (float("nan") if fault == "nan" else micro_batch.weight)
                    self.engine.backward(share, last=index == len(micro_batches) - 1)
                    sums.add(loss, float("nan") if fault == "nan" else micro_batch.weight)
        metrics = sums.read()
        finish(self.device)  # the sums are ready before the last backward is
        seconds = time.perf_counter() - started
        peak = peak_bytes(self.device) - self.bytes_before_model
        reset_peak(self.device)  # the next report's peak includes this step's optimizer
        return self._report(metrics, micro_batches, seconds, peak)

    def optim_step(self, step: int) -> StepApplied:
        """Applies the accumulated gradient with the learning rate of 0-based optimizer step `step`."""
        self._inject("optim_step", step)
        applied = self.engine.step(learning_rate(self.spec.recipe.optimizer, step, self.spec.total_steps))
        finish(self.device)  # otherwise the update would count as time of the next step
        return applied

    def discard(self) -> None:
        """Drops the accumulated gradient, and frees what an out-of-memory error left. A collective."""
        give_back(self.device)
        self.engine.discard(self.idle_loss)

    @torch.no_grad()
    def token_logprobs(
        self, micro_batches: Sequence[MicroBatch], reference: bool = False, step: int | None = None
    ) -> tuple[Floats, ...]:
        """fp32 log-probs of the scored tokens of each micro-batch, under the policy or the reference.

        step: optimizer step whose LoRA dropout is applied, the same as in forward_backward. None: no dropout.
        """
        self._still()
        if step is not None:
            self.scoring.dropout.at(self.spec.recipe.run.seed, step)
        model, scope = self._scorer(reference)
        with scope:
            return on_host(
                [
                    logprobs_of(run_forward(model, MicroBatchTensors.of(mb, self.device)))
                    for mb in micro_batches
                ]
            )

    @torch.no_grad()
    def token_values(self, micro_batches: Sequence[MicroBatch]) -> tuple[Floats, ...]:
        """A critic's fp32 values at the positions that predict the scored tokens of each micro-batch."""
        self._still()
        return on_host([self._forward(MicroBatchTensors.of(mb, self.device)).values for mb in micro_batches])

    @torch.no_grad()
    def evaluate(
        self, micro_batches: Sequence[MicroBatch], units: LossUnits
    ) -> tuple[LearnReport, tuple[Floats, ...]]:
        """The objective on held-out micro-batches without gradients, and the sums of each example, Float[n,
        branches]."""
        started = time.perf_counter()
        self._still()
        sums = Sums()
        per_example = []
        for micro_batch in micro_batches:
            rows = MicroBatchTensors.of(micro_batch, self.device)
            scores = self._token_scores(micro_batch, rows)
            sums.add(self._objective(scores, units, micro_batch, rows), micro_batch.weight)
            per_example.append(scores.rewards if scores.rewards is not None else scores.sums())
        metrics, values = sums.read(), on_host(per_example)
        return self._report(metrics, micro_batches, time.perf_counter() - started, 0), values

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of this rank's prompts. At ZeRO-3 every rank must call it with at least one
        prompt."""
        self._still()
        eos = self.loaded.tokenizer.eos_token_id
        return self.scoring.generate(prompts, max_new_tokens, eos=eos, synced=self.spec.cut.zero_stage == 3)

    @torch.no_grad()
    def sync_reference(self, alpha: float) -> None:
        """TR-DPO (arXiv 2404.09656), eq. 5: reference <- alpha * policy + (1 - alpha) * reference."""
        assert self.reference is not None, "sync_reference needs algorithm.reference_sync_every"
        for policy, reference in zip(self.scoring.parameters(), self.reference.parameters(), strict=True):
            with self.engine.full_parameters([policy]):
                reference.lerp_(policy.to(reference.dtype), alpha)

    def idle_loss(self) -> Tensor:
        """A zero that depends on every parameter, from the smallest possible forward. Equal on all ranks."""
        token = np.zeros(1, dtype=np.int64)
        branch = Branch(token, np.ones(1, dtype=np.bool_))
        group = SequenceGroup(0, token, (branch,) * self.algorithm.branches)
        rows = pack([group], self.spec.cut.layout, one_row=self.spec.cut.one_row)
        return self._forward(MicroBatchTensors.of(rows, self.device)).values.sum() * 0.0

    def _loss(self, micro_batch: MicroBatch, units: LossUnits) -> LossSum:
        rows = MicroBatchTensors.of(micro_batch, self.device)
        scores = self._token_scores(micro_batch, rows)
        if self.algorithm.couples_batch:
            assert rows.coefficients is not None, (
                "a loss that couples the batch needs the coefficients of pass 1"
            )
            return LossSum(linear(scores.logps, rows.coefficients), {})
        return self._objective(scores, units, micro_batch, rows)

    def _objective(
        self, scores: TokenScores, units: LossUnits, micro_batch: MicroBatch, rows: MicroBatchTensors
    ) -> LossSum:
        """The loss and its metrics, also for each source if the data has several."""
        loss = self.algorithm.objective(scores, units)
        if not self.by_source or rows.source is None or micro_batch.source is None:
            return loss
        present = sorted({int(number) for number in micro_batch.source})
        return replace(loss, means=loss.means | by_source(loss.per_example, rows.source, present))

    def _forward(self, rows: MicroBatchTensors) -> HeadOutputs:
        return run_forward(self.engine, rows)

    def _token_scores(self, micro_batch: MicroBatch, rows: MicroBatchTensors) -> TokenScores:
        result = self._forward(rows)
        return TokenScores(
            logps=torch.zeros(0, device=self.device) if result.logps is None else result.logps,
            ref_logps=rows.ref_logprobs,
            sequence=rows.sequence,
            examples=len(micro_batch),
            branches=micro_batch.branches,
            label=rows.label,
            margin=rows.margin,
            wpo=result.wpo,
            rewards=result.rewards,
            entropy=result.entropy,
            values=result.state_values,
            experience=rows.experience,
            precision=self.spec.recipe.learners.precision,
        )

    def _report(
        self, metrics: StepMetrics, micro_batches: Sequence[MicroBatch], seconds: float, peak: int
    ) -> LearnReport:
        loss, means, maxima = metrics
        real = [m for m in micro_batches if m.weight]
        return LearnReport(
            loss=loss,
            means=means,
            micro_batches=len(micro_batches),
            tokens=sum(m.unshared_tokens for m in real),
            computed=sum(m.tokens for m in real),
            scored_tokens=sum(len(m.targets) for m in real),
            positions=sum(m.positions for m in micro_batches),
            seconds=seconds,
            peak_bytes=peak,
            maxima=maxima,
            attended=sum(m.attended(window) for m in real for window in self.windows),
        )

    def _scorer(
        self, reference: bool
    ) -> tuple[Callable[..., tuple[Tensor, ...]], AbstractContextManager[None]]:
        if not reference:
            return self.engine, nullcontext()
        if self.reference is not None:
            return self.reference, nullcontext()
        return self.engine, self.scoring.reference()

    def _still(self) -> None:
        """Switches dropout off until the next forward_backward."""
        self.scoring.eval()
        self.scoring.dropout.off()

    def _inject(self, site: str, step: int) -> str | None:
        fault = faults.inject(site, step=step, rank=self.process_group.rank)
        if fault == "oom":
            raise torch.OutOfMemoryError("injected")
        return fault

    def _located(self, micro_batch: MicroBatch, index: int) -> "_OutOfMemoryLocator":
        return _OutOfMemoryLocator(self.process_group.rank, index, micro_batch.positions)


class _OutOfMemoryLocator:
    """Turns an allocator's error into OutOfMemory with the rank and micro-batch of the error."""

    def __init__(self, rank: int, index: int, positions: int) -> None:
        self.rank, self.index, self.positions = rank, index, positions

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None and is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # the frames hold the micro-batch's activations
            raise OutOfMemory(
                f"worker {self.rank} ran out of memory in micro-batch {self.index} ({self.positions} "
                "positions)",
                why=str(error).splitlines()[0],
                fix="set a smaller batch.micro_batch, or learners.activation_checkpointing=full",
            ) from None


def iterate_trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all trainable parameters, in the same order on every rank."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
