"""The offline loop: SFT, reward models and the preference family.

    batches --cut--> PackedBatch --reference log-probs--> forward_backward --> optim_step --> report, evaluate, save
"""

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.algorithms import Algorithm
from orchestrator.controllers.evaluation import Evaluator
from orchestrator.controllers.step import Attach, Clock, Guards, Stepper, evaluate_and_save
from orchestrator.data.order import Batches
from orchestrator.observe.metrics import Throughput, flatten
from orchestrator.records import Cut, Progress, SequenceGroup, StepReport
from orchestrator.roles import Checkpoints, Learner, Reporter


@dataclass(frozen=True, slots=True)
class OfflinePlan:
    """What the loop has to know. sources: names of the training data's."""

    algorithm: Algorithm
    total_steps: int
    evaluate_every: int | None
    evaluate_at_start: bool
    save_every: int | None
    reference_sync_every: int | None
    reference_sync_alpha: float
    guards: Guards
    sources: tuple[str, ...] = ()


class OfflineTrainer:
    """Runs the loop."""

    def __init__(
        self,
        plan: OfflinePlan,
        cut: Cut,
        policy: Learner,
        attach_reference: Attach,
        batches: Batches[SequenceGroup],
        evaluator: Evaluator,
        report: Reporter,
        checkpoints: Checkpoints,
        throughput: Throughput,
        should_stop: Callable[[], bool],
    ) -> None:
        self.plan, self.policy, self.batches, self.evaluator = plan, policy, batches, evaluator
        self.report, self.checkpoints = report, checkpoints
        self.throughput, self.should_stop = throughput, should_stop
        self._from_reference = evaluator.ranking.starts_at_reference
        self.steps = Stepper(plan.algorithm, policy, cut, attach_reference, report, plan.guards)

    @property
    def cut(self) -> Cut:
        """How steps are cut now."""
        return self.steps.cut

    def run(self) -> Progress:
        """Trains to the plan's last step and returns where it ended."""
        plan = self.plan
        progress = self.checkpoints.restore()
        if progress.step == 0 and progress.examples == 0 and plan.evaluate_at_start:
            self._evaluate(0)
        while progress.step < plan.total_steps:
            clock = Clock()
            with clock.phase("data"):
                groups = self.batches.at(progress.examples)
            taken = self.steps.take(groups, progress.step, clock)
            if taken.applied is None:
                progress = progress.after_skip(taken.batch)
                continue
            progress = progress.after(taken.batch)
            self._after_step(progress, clock)
            first = progress.step == 1 and self._from_reference
            metrics = flatten(progress, taken.learned, taken.applied, clock.phases, self.throughput, plan.sources, at_reference=first)
            self.report.step(StepReport(progress.step, metrics))
            evaluate_and_save(plan, progress, self._evaluate, self.checkpoints, self.should_stop)
        return progress

    def _after_step(self, progress: Progress, clock: Clock) -> None:
        every = self.plan.reference_sync_every
        if every is not None and progress.step % every == 0:
            with clock.phase("reference"):
                self.policy.sync_reference(self.plan.reference_sync_alpha)

    def _evaluate(self, step: int) -> None:
        report = self.evaluator.evaluate(self.cut, step)
        if report.metrics:  # none without data.eval
            self.report.evaluation(report)
