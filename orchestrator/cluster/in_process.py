"""One rank in this process, without Ray: for breakpoints, profilers and notebooks. The numbers are those of one worker.

    Ranks._each --a call--> Rank --> RankLearner
"""

import socket
from collections.abc import Sequence
from typing import Any

import torch

from orchestrator.cluster.deadlines import Deadlines
from orchestrator.cluster.ranks import Rank, Ranks
from orchestrator.config import Learners
from orchestrator.errors import OutOfMemory


class LocalRank(Ranks):
    """The only rank. What it raises is raised where it happened: nothing is translated, nothing is tried again."""

    def __init__(self, learners: Learners) -> None:
        self.world = 1
        self._rank = Rank(0, torch.device("cuda" if learners.gpus else "cpu"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        deadlines = Deadlines(learners.start_timeout_s, learners.timeout_s, 0)
        self._rank.join(1, "127.0.0.1", port, deadlines.collective_s)

    def _each(self, verb: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        try:
            return [getattr(self._rank, verb)(*own) for own in arguments]
        except OutOfMemory as error:
            error.in_place = error.in_place and self._holds_back()
            raise

    def __enter__(self) -> "LocalRank":
        return self

    def __exit__(self, *_: object) -> None:
        """The process group stays: the next run in this process takes it over."""
        self._rank.learner = None
