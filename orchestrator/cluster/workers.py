"""Learner workers: one Ray actor per DeepSpeed rank, and the group that speaks to all of them at once."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from orchestrator.checkpoints import FileEntry
from orchestrator.cluster.actors import Share, grow_segments, keep_to_share, outlive_sigterm, own_device
from orchestrator.cluster.deadlines import Deadlines
from orchestrator.cluster.failures import learner_failure, telling
from orchestrator.cluster.network import speak_from
from orchestrator.cluster.placement import Placement, learner_demand
from orchestrator.config import Learners, Recipe, Rollouts
from orchestrator.errors import OrchestratorError, OutOfMemory, WorkerLost
from orchestrator.learner.learner import LearnerSpec
from orchestrator.records import LearnReport, PackedBatch, StepApplied, joined_metrics
from orchestrator.roles import PerMicroBatch, TokenLists

ROOT_S = 2.0
"""Seconds in which another rank may say what the first failure came from."""
START = "learners.start_timeout_s"
"""The key that gives more time to what comes before the first verb."""


@telling
class LearnerActor:
    """One rank. Holds a RankLearner (or, before it, the reference policy) and forwards verbs to it."""

    def __init__(self, rank: int, log: str | None, share: Share) -> None:
        if log is not None:
            redirect_output(Path(log))
        outlive_sigterm()
        if share.expandable:
            os.environ.update(grow_segments(os.environ))
        import torch

        torch.set_num_threads(share.threads)
        self.rank, self.share = rank, share
        self.node = ray.util.get_node_ip_address()
        speak_from(self.node)
        self.device = own_device()
        self.learner: Any = None
        self.group: Any = None
        self.store: Any = None
        self.channel: Any = None

    def host(self) -> str:
        """This node's address."""
        return self.node

    def address(self) -> tuple[str, int]:
        """This node's address and a free port, for the rendezvous at rank 0."""
        with socket.socket() as free:
            free.bind(("", 0))
            return self.node, free.getsockname()[1]

    def join(self, world: int, address: str, port: int, timeout_s: float) -> int:
        from orchestrator.learner.engine import ProcessGroup

        self.group = ProcessGroup(self.rank, world, address, port, timeout_s)
        self.group.join(self.device)
        keep_to_share(self.device, self.share.gpus)
        return os.getpid()

    def build_reference(self, recipe: Recipe) -> str:
        from orchestrator.learner.learner import RankReference

        self.learner = RankReference(recipe, self.device)
        return self.learner.fingerprint

    def build(self, spec: LearnerSpec) -> None:
        from orchestrator.learner.learner import RankLearner

        self.learner = None  # frees the reference or the previous learner first
        self.learner = RankLearner(spec, self.group, self.device)
        self.group.keep_deadline()

    def forward_backward(self, micro_batches: Sequence[Any], units: Any, step: int) -> LearnReport:
        return self.learner.forward_backward(micro_batches, units, step)

    def optim_step(self, step: int) -> StepApplied:
        return self.learner.optim_step(step)

    def discard(self) -> None:
        self.learner.discard()

    def token_logprobs(self, micro_batches: Sequence[Any], reference: bool, step: int | None) -> tuple[Any, ...]:
        return self.learner.token_logprobs(micro_batches, reference=reference, step=step)

    def token_values(self, micro_batches: Sequence[Any]) -> tuple[Any, ...]:
        return self.learner.token_values(micro_batches)

    def evaluate(self, micro_batches: Sequence[Any], units: Any) -> Any:
        return self.learner.evaluate(micro_batches, units)

    def generate(self, prompts: TokenLists, max_new_tokens: int) -> TokenLists:
        return self.learner.generate(prompts, max_new_tokens)

    def sync_reference(self, alpha: float) -> None:
        self.learner.sync_reference(alpha)

    def save_state(self, directory: str, moments: bool) -> list[FileEntry]:
        from orchestrator.learner.state import save_state

        return save_state(self.learner, Path(directory), moments)

    def load_state(self, directory: str, optimizer_step: int) -> None:
        from orchestrator.learner.state import load_state

        load_state(self.learner, Path(directory), optimizer_step)

    def put_buckets(self, bucket_bytes: int) -> tuple[list[Any], int]:
        """Rank 0: the weights in Ray's object store, a reference per bucket, and their bytes. A collective at ZeRO-3."""
        from orchestrator.learner.publish import flat_buckets
        from orchestrator.models.buckets import Bucket, checksum

        references, size = [], 0
        for plan, flat in flat_buckets(self.learner, bucket_bytes, keep=self.rank == 0):
            flat = flat.cpu()
            references.append(ray.put(Bucket(plan.entries, flat.numpy(), checksum(flat))))
            size += plan.size
        return references, size

    def listen(self, timeout_s: float) -> tuple[str, int]:
        """Rank 0: where the members of a new channel meet."""
        from torch._C._distributed_c10d import TCPStore

        self.store = TCPStore(self.node, 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
        return self.node, self.store.port

    def open_channel(self, meeting: Any) -> str | None:
        """Rank 0: waits for the other members; what went wrong, if anything did."""
        from orchestrator.models.buckets import Channel, ChannelBroken

        self.channel = None
        try:
            self.channel = Channel(meeting, 0, self.store)
        except ChannelBroken as error:
            return str(error)
        return None

    def broadcast_buckets(self, bucket_bytes: int) -> str | None:
        from orchestrator.learner.publish import broadcast

        return broadcast(self.learner, self.channel, bucket_bytes)

    def export(self, directory: str, card: str) -> str:
        from orchestrator.learner.export import export_learner

        return str(export_learner(self.learner, Path(directory), card))

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs function(rank_learner, *args): for checks that are not verbs (weights, digests, probes)."""
        return function(self.learner, *args)


def redirect_output(path: Path) -> None:
    """Sends this process's stdout and stderr to the run folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


class LearnerGroup:
    """roles.Learner over all ranks. Every call has a deadline and names the worker that is late or lost."""

    def __init__(
        self,
        learners: Learners,
        *,
        parameters: int = 0,
        logs: Path | None = None,
        name: str = "learner",
        colocated: Rollouts | None = None,
        placement: Placement | None = None,
    ) -> None:
        """parameters: of the model, for deadlines; colocated: rollout actors that share the bundles (see RolloutPool); placement: reserved by
        the caller together with the run's other groups, and released by it."""
        self.learners, self.logs, self.name = learners, logs, name
        self.world = learners.count
        self.deadlines = Deadlines(learners.start_timeout_s, learners.timeout_s, parameters)
        self.expandable = learners.gpus_per_worker > 0 and (colocated is None or colocated.transport != "cuda_ipc")
        self.reserved = placement is None
        self.placement = placement or Placement.reserve(learner_demand(learners, colocated), learners.start_timeout_s)
        self.actors: list[Any] = []
        self.hosts: list[str] = []
        self.spec: LearnerSpec | None = None
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self.actors = [self._new(rank) for rank in range(self.world)]
        address, port = self._collect([self.actors[0].address.remote()], "start", self.deadlines.start_s, START)[0]
        self.hosts = self._collect([a.host.remote() for a in self.actors], "start", self.deadlines.start_s, START)
        joins = [a.join.remote(self.world, address, port, self.deadlines.collective_s) for a in self.actors]
        self.pids: list[int] = self._collect(joins, "join the process group", self.deadlines.start_s, START)

    def _new(self, rank: int) -> Any:
        cpus, gpus = self.learners.cpus_per_worker, self.learners.gpus_per_worker
        share = Share(cpus, gpus, self.placement.threads(rank, cpus, gpus), self.expandable)
        log = str(self.logs / f"{self.name}-{rank}.log") if self.logs else None
        return self.placement.start(LearnerActor, rank, rank, log, share, name=f"{self.name}-{rank}", share=share)

    def build(self, spec: LearnerSpec) -> None:
        """Builds model and optimizer on every rank; again for another cut or after a reference pass."""
        self.spec = spec
        self._all("build", spec)

    def build_reference(self, recipe: Recipe) -> str:
        """Loads only the reference policy on every rank, to fill the cache through `token_logprobs`; its fingerprint."""
        return self._all("build_reference", recipe)[0]

    def forward_backward(self, batch: PackedBatch, step: int) -> LearnReport:
        units = ray.put(batch.units)
        reports = self._each("forward_backward", [(share, units, step) for share in batch.micro_batches])
        return merge_reports(reports)

    def optim_step(self, step: int) -> StepApplied:
        return self._all("optim_step", step)[0]

    def discard(self) -> None:
        self._all("discard")

    def token_logprobs(self, batch: PackedBatch, *, reference: bool = False, step: int | None = None) -> PerMicroBatch:
        return tuple(self._each("token_logprobs", [(share, reference, step) for share in batch.micro_batches]))

    def token_values(self, batch: PackedBatch) -> PerMicroBatch:
        return tuple(self._each("token_values", [(share,) for share in batch.micro_batches]))

    def evaluate(self, batch: PackedBatch) -> tuple[LearnReport, PerMicroBatch]:
        results = self._each("evaluate", [(share, batch.units) for share in batch.micro_batches])
        return merge_reports([r[0] for r in results]), tuple(r[1] for r in results)

    def generate(self, prompts: TokenLists, max_new_tokens: int) -> TokenLists:
        shares = [list(prompts[rank :: self.world]) or [prompts[0]] for rank in range(self.world)]
        answers = self._each("generate", [(share, max_new_tokens) for share in shares])
        return [answers[i % self.world][i // self.world] for i in range(len(prompts))]

    def sync_reference(self, alpha: float) -> None:
        self._all("sync_reference", alpha)

    def save_state(self, directory: Path, *, moments: bool = True) -> list[FileEntry]:
        return [entry for entries in self._all("save_state", str(directory), moments) for entry in entries]

    def load_state(self, directory: Path, optimizer_step: int) -> None:
        self._all("load_state", str(directory), optimizer_step)

    def put_buckets(self, bucket_bytes: int) -> tuple[list[Any], int]:
        """The policy's weights as references to buckets in Ray's object store, and their bytes."""
        return self._all("put_buckets", bucket_bytes)[0]

    def listen(self) -> tuple[str, int]:
        """Address and port where a new channel's members meet."""
        return self._collect([self.actors[0].listen.remote(self.deadlines.start_s)], "listen", self.deadlines.start_s, START)[0]

    def open_channel(self, meeting: Any) -> str | None:
        """Rank 0 becomes the sender of a channel (models/buckets.py); what went wrong, if it did."""
        return self._collect([self.actors[0].open_channel.remote(meeting)], "open the channel for weights", self.deadlines.verb_s)[0]

    def broadcast_buckets(self, bucket_bytes: int) -> str | None:
        """Sends the weights through the channel; what broke it, if anything did."""
        return self._all("broadcast_buckets", bucket_bytes)[0]

    def export(self, directory: Path, card: str) -> Path:
        return Path(self._all("export", str(directory), card)[0])

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(rank_learner, *args) on every rank, results by rank."""
        return self._all("call", function, *args)

    def close(self) -> None:
        """Ends the workers and gives their resources back."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
        if self.reserved:
            self.placement.release()

    def __enter__(self) -> "LearnerGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _all(self, verb: str, *args: Any) -> list[Any]:
        return self._each(verb, [args] * self.world)

    def _each(self, verb: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        refs = [getattr(actor, verb).remote(*args) for actor, args in zip(self.actors, arguments, strict=True)]
        return self._collect(refs, verb, self.deadlines.of(verb))

    def _collect(self, refs: list[Any], verb: str, timeout_s: float, key: str = "learners.timeout_s") -> list[Any]:
        """Results by rank; raises at the first failure, or WorkerLost naming who did not answer in time. key: of the recipe, that
        gives more time."""
        deadline = time.monotonic() + timeout_s
        waiting, memory_error = list(refs), None
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                late = [self._who(refs.index(ref)) for ref in waiting]
                raise WorkerLost(
                    f"{', '.join(late)} did not answer `{verb}` within {timeout_s:.0f} s",
                    why="the process hangs, is stopped, or waits for another rank",
                    fix=f"see logs/ in the run folder; raise {key} if it really takes longer",
                )
            try:
                ray.get(done[0])
            except RayError as error:
                failure = learner_failure(error, self._who(refs.index(done[0])), verb)
                if isinstance(failure, WorkerLost) and isinstance(error, RayTaskError):
                    failure = self._root(failure, refs, waiting, verb)
                if not isinstance(failure, OutOfMemory):
                    raise failure from error
                failure.in_place = failure.in_place and self._holds_back()
                if not failure.in_place:
                    raise failure from error
                memory_error = failure
        if memory_error is not None:
            raise memory_error
        return ray.get(refs)

    def _root(self, first: WorkerLost, refs: list[Any], waiting: list[Any], verb: str) -> OrchestratorError:
        """The failure to tell: a rank that lost its peers is often told before the peer that died or failed, which comes a moment later."""
        deadline = time.monotonic() + ROOT_S
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                break
            try:
                ray.get(done[0])
            except RayError as error:
                later = learner_failure(error, self._who(refs.index(done[0])), verb)
                if not isinstance(later, WorkerLost) or not isinstance(error, RayTaskError):
                    return later
        return first

    def _who(self, rank: int) -> str:
        """The worker by name, and its host where there are several."""
        return f"{self.name}-{rank}" + (f" on {self.hosts[rank]}" if len(set(self.hosts)) > 1 else "")

    def _holds_back(self) -> bool:
        """True where a rank that stops early leaves no other rank waiting in a collective, and its gradients can be dropped."""
        if self.spec is None:
            return True
        cut = self.spec.cut
        return cut.sync == "no_sync" or (cut.sync == "coalesced" and cut.zero_stage < 3)


def merge_reports(reports: Sequence[LearnReport]) -> LearnReport:
    """One report of all ranks: sums add up, the slowest rank gives the time and the largest the memory."""
    means, maxima = joined_metrics(reports)
    return LearnReport(
        loss=sum(r.loss for r in reports),
        means=means,
        micro_batches=max(r.micro_batches for r in reports),
        tokens=sum(r.tokens for r in reports),
        computed=sum(r.computed for r in reports),
        scored=sum(r.scored for r in reports),
        positions=sum(r.positions for r in reports),
        seconds=max(r.seconds for r in reports),
        peak_bytes=max(r.peak_bytes for r in reports),
        maxima=maxima,
        attended=sum(r.attended for r in reports),
    )
