"""Errors a user can act on: what, where, why and the fix, with the exit code of sysexits.h."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the program. 75 means: run the same command again and it goes on."""

    OK = 0
    DATA = 65
    NO_INPUT = 66
    UNAVAILABLE = 69
    SOFTWARE = 70
    CANNOT_CREATE = 73
    RESUMABLE = 75
    NO_PERMISSION = 77
    CONFIG = 78


class OrchestratorError(Exception):
    """A failure with a message for the user.

    what: one sentence naming what failed (and where: file:line, key or rank).
    why: the reason, if it is not in `what`.
    fix: what the user can do about it.
    """

    exit_code: Exit = Exit.SOFTWARE

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

    def __reduce__(self):  # keyword-only fields must survive the trip through Ray
        return _rebuild, (type(self), self.what, self.why, self.fix)


def _rebuild(kind: type[OrchestratorError], what: str, why: str, fix: str) -> OrchestratorError:
    return kind(what, why=why, fix=fix)


class ConfigError(OrchestratorError):
    """The recipe cannot be run as written."""

    exit_code = Exit.CONFIG


class DataError(OrchestratorError):
    """The data is not what the recipe needs."""

    exit_code = Exit.DATA


class MissingInput(OrchestratorError):
    """A file or folder that the recipe names is not there."""

    exit_code = Exit.NO_INPUT


class NotEnoughResources(OrchestratorError):
    """The cluster cannot hold the placement group, or a worker never came."""

    exit_code = Exit.UNAVAILABLE


class DashboardUnreachable(OrchestratorError):
    """A server that is needed does not answer: a cluster's head, its dashboard, a reward's endpoint."""

    exit_code = Exit.UNAVAILABLE


class Forbidden(OrchestratorError):
    """A cluster asks for a token that was not given, or should ask for one."""

    exit_code = Exit.NO_PERMISSION


class OutputError(OrchestratorError):
    """The output folder cannot be used: another run's, not writable, disk full."""

    exit_code = Exit.CANNOT_CREATE


class Diverged(OrchestratorError):
    """Training produced non-finite steps beyond what the recipe allows."""

    exit_code = Exit.SOFTWARE


class Interrupted(OrchestratorError):
    """The run stopped early and can be resumed by the same command."""

    exit_code = Exit.RESUMABLE


class WorkerLost(OrchestratorError):
    """A worker died, did not answer before its deadline, or lost its device or its peers: another attempt can
    cure it.

    repeats: names the failure where the same one again means that no attempt will; None where nothing is
    known of its cause.
    """

    exit_code = Exit.RESUMABLE
    repeats: str | None = None


class WorkerFailed(OrchestratorError):
    """A worker raised an exception that another attempt would raise again: a bug, or what the model or the
    data cannot bear."""

    exit_code = Exit.SOFTWARE


class OutOfMemory(OrchestratorError):
    """A micro-batch did not fit on a worker. The step can be cut finer: same effective batch, same result.

    in_place: True where no rank is stuck in a collective, so that the step can be replayed at once; else the
    workers have to be rebuilt from the last checkpoint.
    """

    exit_code = Exit.UNAVAILABLE
    in_place: bool = True


class CheckpointError(OrchestratorError):
    """A checkpoint does not verify."""

    exit_code = Exit.DATA


class RewardsFailed(OrchestratorError):
    """Too many groups of a rollout batch have no reward; going on would train on what is left by accident."""

    exit_code = Exit.SOFTWARE
