"""The offline loop: SFT, reward models and the preference family.

batches --cut--> PackedBatch --reference log-probs--> forward_backward --> optim_step
        --> report --> evaluate, save
"""

from dataclasses import dataclass

from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.batches import Cut, SequenceGroup
from orchestrator.core.reports import Progress, StepReport
from orchestrator.core.roles import Checkpoints, Learner, Reporter
from orchestrator.core.stopping import Stop
from orchestrator.data.order import Batches
from orchestrator.observe.metrics import Throughput, flatten
from orchestrator.trainers.cadence import AfterSteps
from orchestrator.trainers.evaluation import Evaluator
from orchestrator.trainers.optimizer_step import Attach, Clock, Guards, OptimizerStepper


@dataclass(frozen=True, slots=True)
class OfflinePlan:
    """What the loop needs to know, intervals in optimizer steps. `Cadence` describes the schedule."""

    algorithm: AlgorithmSpec
    total_steps: int
    evaluate_every: int | None
    evaluate_at_start: bool
    save_every: int | None
    reference_sync_every: int | None
    """TR-DPO: steps between updates of the reference; None: it stays."""
    reference_sync_alpha: float
    """TR-DPO: weight of the policy in an update."""
    guards: Guards
    save_after_s: float | None = None
    evaluated: bool = False
    sources: tuple[str, ...] = ()
    """Names of the sources of data.train."""


class OfflineTrainer:
    """Runs the offline loop."""

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
        stop: Stop,
    ) -> None:
        self.plan, self.policy, self.batches, self.evaluator = plan, policy, batches, evaluator
        self.report, self.checkpoints = report, checkpoints
        self.throughput, self.stop = throughput, stop
        self.after = AfterSteps(plan, self._evaluate, checkpoints, stop)
        self._from_reference = evaluator.ranking.starts_at_reference
        self.steps = OptimizerStepper(plan.algorithm, policy, cut, attach_reference, report, plan.guards)

    @property
    def cut(self) -> Cut:
        """The current cut."""
        return self.steps.cut

    def run(self) -> Progress:
        """Trains to the plan's last step and returns the progress."""
        plan = self.plan
        progress = self.checkpoints.restore()
        with self.stop.deferred("training"):
            return self._steps(plan, progress)

    def _steps(self, plan: OfflinePlan, progress: Progress) -> Progress:
        self.after.begin(progress)
        while progress.step < plan.total_steps:
            clock = Clock()
            with clock.phase("data"):
                groups = self.batches.at(progress.examples)
            outcome = self.steps.step(groups, progress.step, clock)
            if outcome.applied is None:
                progress = progress.after_skip(outcome.batch)
                continue
            progress = progress.after(outcome.batch)
            self._after_step(progress, clock)
            first = progress.step == 1 and self._from_reference
            metrics = flatten(
                progress,
                outcome.learned,
                outcome.applied,
                clock.phases,
                self.throughput,
                plan.sources,
                at_reference=first,
            )
            self.report.step(StepReport(progress.step, metrics))
            self.after.step(progress)
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
