"""Errors with a message for the user (what happened, why, the fix) and an exit code of sysexits.h."""

from enum import IntEnum
from typing import Any, Literal


class Exit(IntEnum):
    """Exit codes of the program. After 75 the same command continues the run."""

    OK = 0
    DATA = 65
    NO_INPUT = 66
    UNAVAILABLE = 69
    SOFTWARE = 70
    CANNOT_CREATE = 73
    RESUMABLE = 75
    NO_PERMISSION = 77
    CONFIG = 78


Recovery = Literal["none", "restart", "finer_cut"]
"""restart: the workers start again from the last checkpoint. finer_cut: the step is cut into smaller
micro-batches, in place or after a restart. Neither changes an optimizer step."""


class OrchestratorError(Exception):
    """A failure with a message for the user: what happened, why, and the fix."""

    exit_code: Exit = Exit.SOFTWARE
    recovery: Recovery = "none"
    """What the program does about it without the user."""
    repeats: str | None = None
    """Name of a failure which, if it comes again, no restart can help against. None if the cause is not
    known."""
    what: str
    """What failed and where (file:line, key or rank). Example: "batch.effective is 0"."""
    why: str
    """The reason, if `what` does not give it. Example: "a step needs an example"."""
    fix: str
    """What the user can do. Example: "set it to 256"."""

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(what, why, fix)

    def __str__(self) -> str:
        parts = [self.what]
        if self.why:
            parts.append(f"  why: {self.why}")
        if self.fix:
            parts.append(f"  fix: {self.fix}")
        return "\n".join(parts)

    def __reduce__(self):  # Ray pickles errors, and pickle passes arguments by position
        return _rebuild, (type(self), vars(self))


def _rebuild(kind: type[OrchestratorError], state: dict[str, Any]) -> OrchestratorError:
    error = kind(state["what"], why=state["why"], fix=state["fix"])
    vars(error).update(state)
    return error


class ConfigError(OrchestratorError):
    """The recipe cannot be run as written."""

    exit_code = Exit.CONFIG


class DataError(OrchestratorError):
    """The data is not what the recipe needs."""

    exit_code = Exit.DATA


class MissingInput(OrchestratorError):
    """A file or folder that the recipe names does not exist."""

    exit_code = Exit.NO_INPUT


class NotEnoughResources(OrchestratorError):
    """The cluster cannot hold the placement group, or a worker never started."""

    exit_code = Exit.UNAVAILABLE


class DashboardUnreachable(OrchestratorError):
    """A server does not answer: a cluster's head, its dashboard, a reward's endpoint."""

    exit_code = Exit.UNAVAILABLE


class Forbidden(OrchestratorError):
    """A cluster requires a token that was not given, or does not require one and should."""

    exit_code = Exit.NO_PERMISSION


class OutputError(OrchestratorError):
    """The output folder cannot be used: it holds another run, is not writable, or its disk is full."""

    exit_code = Exit.CANNOT_CREATE


class Diverged(OrchestratorError):
    """More steps in a row were non-finite than a run may have."""

    exit_code = Exit.SOFTWARE


class Interrupted(OrchestratorError):
    """The run stopped early. The same command resumes it."""

    exit_code = Exit.RESUMABLE


class WorkerLost(OrchestratorError):
    """A worker died, missed its deadline, or lost its device or its peers. A restart can help."""

    exit_code = Exit.RESUMABLE
    recovery = "restart"


class WorkerFailed(OrchestratorError):
    """A worker raised an exception that it would raise again after a restart: a bug, or a model or data that
    cannot be computed with."""

    exit_code = Exit.SOFTWARE


class OutOfMemory(OrchestratorError):
    """A micro-batch did not fit on a worker. A finer cut has the same effective batch and the same result."""

    exit_code = Exit.UNAVAILABLE
    recovery = "finer_cut"
    in_place: bool = True
    """True if no rank waits in a collective: the step can be replayed immediately. Otherwise the workers have
    to be rebuilt from the last checkpoint."""


class InternalError(OrchestratorError):
    """A condition that this program guarantees does not hold: a bug in it, or a library that changed."""

    exit_code = Exit.SOFTWARE

    def __init__(self, what: str, *, why: str = "", fix: str = "this is a bug; please report it") -> None:
        super().__init__(what, why=why, fix=fix)


class CheckpointError(OrchestratorError):
    """The files of a checkpoint do not match its manifest."""

    exit_code = Exit.DATA


class RewardsFailed(OrchestratorError):
    """Too many groups of a rollout batch have no reward. The rest would be a biased sample to learn from."""

    exit_code = Exit.SOFTWARE
