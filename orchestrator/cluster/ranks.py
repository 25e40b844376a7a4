"""The verbs of a learner: on one rank, and on all ranks together. Neither knows where a rank lives.

    Ranks.forward_backward(batch) --micro-batches of each rank--> Rank.do --> RankLearner

learner_group.py: each rank in an actor; in_process.py: one rank in this process.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.core.batches import PackedBatch
from orchestrator.core.files import FileEntry
from orchestrator.core.reports import LearnReport, StepApplied, merge_reports
from orchestrator.core.roles import PerMicroBatch, TokenLists
from orchestrator.learner.rank_learner import LearnerSpec
from orchestrator.recipe.schema import Recipe


class Rank:
    """One rank: holds the reference policy (RankReference), then a RankLearner."""

    def __init__(self, rank: int, device: Any) -> None:
        self.rank, self.device = rank, device
        self.learner: Any = None
        self.group: Any = None

    def join(self, world: int, address: str, port: int, timeout_s: float) -> int:
        from orchestrator.learner.engine import ProcessGroup

        self.group = ProcessGroup(self.rank, world, address, port, timeout_s)
        self.group.join(self.device)
        return os.getpid()

    def build_reference(self, recipe: Recipe) -> str:
        from orchestrator.learner.reference import RankReference

        self.learner = RankReference(recipe, self.device)
        return self.learner.fingerprint

    def build(self, spec: LearnerSpec) -> None:
        from orchestrator.learner.rank_learner import RankLearner

        self.learner = None  # frees the reference or the previous learner first
        self.learner = RankLearner(spec, self.group, self.device)
        self.group.keep_deadline()

    def do(self, verb: str, *args: Any) -> Any:
        """Calls a verb by its name: a method of this class, else one of the learner that it holds."""
        return getattr(self if hasattr(self, verb) else self.learner, verb)(*args)

    def save_state(self, directory: str, moments: bool) -> list[FileEntry]:
        from orchestrator.learner.state import save_state

        return save_state(self.learner, Path(directory), moments)

    def load_state(self, directory: str, optimizer_step: int) -> None:
        from orchestrator.learner.state import load_state

        load_state(self.learner, Path(directory), optimizer_step)

    def export(self, directory: str, card: str) -> str:
        from orchestrator.learner.export import export_learner

        return str(export_learner(self.learner, Path(directory), card))

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls function(rank_learner, *args), for checks that are not verbs (weights, digests, probes)."""
        return function(self.learner, *args)


class Ranks(ABC):
    """roles.Learner over all ranks. Every verb is one `_each`, which calls all ranks."""

    world: int
    spec: LearnerSpec | None = None

    def build(self, spec: LearnerSpec) -> None:
        """Builds model and optimizer on every rank. Called again for another cut, and after a reference
        pass."""
        self.spec = spec
        self._all("build", spec)

    def build_reference(self, recipe: Recipe) -> str:
        """Loads only the reference policy on every rank, to fill the cache through `token_logprobs`; returns
        its fingerprint."""
        return self._all("build_reference", recipe)[0]

    def forward_backward(self, batch: PackedBatch, step: int) -> LearnReport:
        units = self._share(batch.units)
        reports = self._each("forward_backward", [(share, units, step) for share in batch.micro_batches])
        return merge_reports(reports, of="ranks")

    def optim_step(self, step: int) -> StepApplied:
        return self._all("optim_step", step)[0]

    def discard(self) -> None:
        self._all("discard")

    def token_logprobs(
        self, batch: PackedBatch, *, reference: bool = False, step: int | None = None
    ) -> PerMicroBatch:
        return tuple(
            self._each("token_logprobs", [(share, reference, step) for share in batch.micro_batches])
        )

    def token_values(self, batch: PackedBatch) -> PerMicroBatch:
        return tuple(self._each("token_values", [(share,) for share in batch.micro_batches]))

    def evaluate(self, batch: PackedBatch) -> tuple[LearnReport, PerMicroBatch]:
        results = self._each("evaluate", [(share, batch.units) for share in batch.micro_batches])
        return merge_reports([r[0] for r in results], of="ranks"), tuple(r[1] for r in results)

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

    def export(self, directory: Path, card: str) -> Path:
        return Path(self._all("export", str(directory), card)[0])

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls function(rank_learner, *args) on every rank; results by rank."""
        return self._all("call", function, *args)

    def _share(self, value: Any) -> Any:
        """Prepares a value that is passed to every rank."""
        return value

    def _all(self, verb: str, *args: Any) -> list[Any]:
        return self._each(verb, [args] * self.world)

    @abstractmethod
    def _each(self, verb: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Calls a verb on every rank, with the arguments of each; results by rank.

        An OutOfMemory has `in_place` set if the step can be replayed in these workers.
        """

    def _can_replay(self) -> bool:
        """Whether a rank that stops early leaves no other rank waiting in a collective, and its gradients can
        be dropped."""
        if self.spec is None:
            return True
        cut = self.spec.cut
        return cut.sync == "no_sync" or (cut.sync == "coalesced" and cut.zero_stage < 3)
