"""A rollout actor: a process that generates, and takes weights by every transport."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from orchestrator.cluster.actors import device_name, outlive_sigterm, own_device, redirect_output
from orchestrator.cluster.failures import reports_errors
from orchestrator.cluster.network import use_interface_of
from orchestrator.core import faults
from orchestrator.core.errors import ConfigError, WorkerLost
from orchestrator.core.rollouts import Prompt, RolloutGroup, Sampling
from orchestrator.models.weight_buckets import (
    Bucket,
    BucketPlan,
    Channel,
    CorruptWeights,
    Rendezvous,
    check,
    join,
)
from orchestrator.recipe.schema import Recipe

Work = Sequence[tuple[int, Prompt]]
"""(draw, prompt) of every group."""


@reports_errors
class RolloutActor:
    """A process that generates. Weights come as references into the object store, through a channel, or
    bucket by bucket."""

    def __init__(self, index: int, log: str | None, threads: int) -> None:
        if log is not None:
            redirect_output(Path(log))
        outlive_sigterm()
        torch.set_num_threads(threads)
        use_interface_of(ray.util.get_node_ip_address())
        self.index = index
        self.device = own_device()
        self.worker: Any = None
        self.channel: Channel | None = None
        self.plans: Sequence[BucketPlan] = ()

    def build(self, recipe: Recipe) -> int:
        from orchestrator.rollout.worker import RolloutWorker

        self.worker = RolloutWorker(recipe, self.device)
        return os.getpid()

    def roll_out(
        self, work: Work, sampling: Sampling, version: int, references: list[Any]
    ) -> tuple[RolloutGroup, ...]:
        """Groups for `work`, sampled with weights `version`. If it holds another version, it loads that one
        from `references` first."""
        if self.worker.engine.version != version:
            if not references:
                raise WorkerLost(
                    f"rollout-{self.index} was asked to roll out weights {version}, it holds "
                    f"{self.worker.engine.version}",
                    fix="the run resumes from its last checkpoint; if it repeats, this is a bug",
                )
            self.load(version, references)
        faults.inject("roll_out", step=version, rank=self.index)
        return self.worker.roll_out(work, sampling, version)

    def load(self, version: int, references: list[Any]) -> None:
        """Loads a version from the object store."""
        self.worker.engine.load(version, (self._fetched(r, version) for r in references))

    def dump(self, version: int, plans: Sequence[BucketPlan]) -> list[Any] | None:
        """Puts a version into the object store, for an actor that has none; a reference per bucket. None if
        this actor does not hold it, or its engine cannot read it back."""
        receiver = getattr(self.worker.engine, "receiver", None)
        if receiver is None or self.worker.engine.version != version:
            return None
        return [ray.put(bucket) for bucket in receiver.dump(plans)]

    def join_channel(self, rendezvous: Rendezvous, plans: Sequence[BucketPlan]) -> None:
        """Becomes member index + 1 of the channel, which receives buckets as in `plans`."""
        self.channel, self.plans = join(rendezvous, self.index + 1), plans

    def leave_channel(self) -> None:
        self.channel = None

    def receive(self, version: int) -> None:
        """Receives a version through the channel. CorruptWeights if a bucket is damaged; then no version is
        held.

        All buckets are received even then, as the other members take part in every broadcast.
        """
        assert self.channel is not None, "join_channel first"
        engine, damaged = self.worker.engine, None
        engine.commit(None)
        buffer = torch.empty(max(p.size for p in self.plans), dtype=torch.uint8, device=self.channel.device)
        for index, plan in enumerate(self.plans):
            flat = buffer[: plan.size]
            expected = self.channel.receive(flat)
            try:
                check(self._on_arrival(flat, version), expected, version, index)
            except CorruptWeights as error:
                damaged = damaged or error
            if damaged is None:
                engine.take(plan.entries, flat)
        engine.commit(version if damaged is None else None)
        if damaged is not None:
            raise damaged

    def take(
        self, version: int, index: int, plan: BucketPlan, shared: tuple[Any, Any], expected: int, device: str
    ) -> None:
        """Reads one bucket from the memory of its sender, on the GPU that both use. `commit` makes the
        buckets the version held.

        shared: (function, arguments) that open it in this process; device: the sender's `device_name`.
        """
        if device != device_name(self.device):
            raise ConfigError(
                f"rollout-{self.index} does not share its learner's device",
                why=f"{device_name(self.device)} against {device}",
                fix="set learners.gpus_per_worker and rollouts.gpus_per_worker to 0.5, or "
                "rollouts.transport=object_store",
            )
        if index == 0:
            self.worker.engine.commit(None)
        opened, arguments = shared
        flat = self._on_arrival(opened(*arguments), version)
        check(flat, expected, version, index)
        self.worker.engine.take(plan.entries, flat)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the sender uses its buffer again as soon as this returns

    def commit(self, version: int) -> None:
        """Makes `version` the version held, after all its buckets were taken."""
        self.worker.engine.commit(version)

    def call(self, function: Any, *args: Any) -> Any:
        """Calls function(rollout_worker, *args), for checks."""
        return function(self.worker, *args)

    def _fetched(self, reference: Any, version: int) -> Bucket:
        """The bucket of a reference, damaged if a test planned that."""
        bucket: Bucket = ray.get(reference)
        if faults.inject("weights", step=version, rank=self.index) == "corrupt":
            data = bucket.data.copy()
            data[len(data) // 2] ^= 1
            return Bucket(bucket.entries, data, bucket.checksum)
        return bucket

    def _on_arrival(self, flat: Any, version: int) -> Any:
        """The bucket, damaged if a test planned that."""
        if faults.inject("weights", step=version, rank=self.index) == "corrupt":
            flat[len(flat) // 2] ^= 1
        return flat
