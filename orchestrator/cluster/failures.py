"""What went wrong in an actor, and whether another attempt can cure it.

    actor: exception --reports_errors--> RemoteError(ErrorRecord), traceback to the actor's log
    driver: RayTaskError --translate--> OrchestratorError

Another attempt cures a process that died or is late, a broken connection and a device that failed: WorkerLost
(exit code 75). An exception of Python code would come again: WorkerFailed (70), or, if its type shows that
the input or the output is at fault, 66, 73 or 78.
"""

import errno
import functools
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayError, RayTaskError

from orchestrator.core.errors import (
    ConfigError,
    MissingInput,
    OrchestratorError,
    OutOfMemory,
    OutputError,
    WorkerFailed,
    WorkerLost,
)
from orchestrator.learner.memory import is_out_of_memory

LOADING = ("build", "build_reference", "load_state")
"""Verbs that read: an OSError in them means that an input is missing."""
WRITING = ("save_state", "export")
"""Verbs that write: an OSError in them means that the output cannot be written."""
STORAGE_AWAY = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENETDOWN,
    errno.EHOSTDOWN,
    errno.ECONNRESET,
)
"""Error numbers of storage that is away for a while."""
CONNECTION_ERRORS = ("DistError", "DistBackendError", "ConnectionError", "TimeoutError", "EOFError")
"""Types of the exceptions of a broken connection."""
BROKEN_LINK = re.compile(
    r"gloo|NCCL|connection (reset|closed|refused)|broken pipe|socket timeout|timed out "
    r"(waiting|after)|heartbeat|rendezvous",
    re.IGNORECASE,
)
"""Messages of native code about a broken connection."""
DEVICE = re.compile(
    r"CUDA (driver )?error|cuDNN error|CUBLAS_STATUS|uncorrectable ECC|device-side assert|hipError",
    re.IGNORECASE,
)
"""Messages of native code about a device that failed."""
ANSI = re.compile(r"\x1b\[[0-9;]*m")
MAX_MESSAGE = 400
"""Characters of an exception's message that are shown."""
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)')
_LAST = re.compile(
    r"^(?P<kind>[A-Za-z_][\w.]*(?:Error|Exception|Warning|Exit|Interrupt))(?::\s*(?P<message>.*))?$"
)


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """An exception as text, so that it arrives at the driver whatever its type."""

    kinds: tuple[str, ...]
    """Names of its class and of those that it derives from, its own first."""
    message: str
    places: tuple[str, ...] = ()
    """"file:line in function" of its traceback, innermost last."""
    errno: int | None = None
    memory: bool = False
    """Whether memory ran out."""

    @classmethod
    def of(cls, error: BaseException, text: str = "") -> "ErrorRecord":
        """text: a traceback, for an exception that has lost its own on the way."""
        frames = traceback.extract_tb(error.__traceback__)
        places = [(f.filename, str(f.lineno), f.name) for f in frames] or _FRAME.findall(text)
        kinds = tuple(k.__name__ for k in type(error).__mro__ if k is not object)
        message, number = ANSI.sub("", str(error)).strip(), getattr(error, "errno", None)
        return cls(kinds, message, tuple(_place(*p) for p in places), number, is_out_of_memory(error))

    @classmethod
    def parse(cls, text: str) -> "ErrorRecord | None":
        """Reads the text of a traceback; None if its last line names no exception."""
        lines = ANSI.sub("", text).strip().splitlines()
        match = next((m for line in reversed(lines) if (m := _LAST.match(line))), None)
        if match is None:
            return None
        kinds = (match["kind"].rpartition(".")[2],)
        return cls(kinds, match["message"] or "", tuple(_place(*p) for p in _FRAME.findall(text)))

    def is_a(self, *names: str) -> bool:
        return any(name in self.kinds for name in names)

    @property
    def shown(self) -> str:
        """The exception on one line."""
        message = " ".join(self.message.split())
        return f"{self.kinds[0]}: {message[:MAX_MESSAGE]}" if message else self.kinds[0]

    @property
    def where(self) -> str:
        """The innermost place, and the innermost one of this program if that is another."""
        ours = [
            p
            for p in self.places
            if p.startswith("orchestrator/") and not p.startswith("orchestrator/cluster/failures.py")
        ]
        shown = dict.fromkeys([*self.places[-1:], *ours[-1:]])
        return ", called at ".join(shown)


def _place(file: str, line: str, name: str) -> str:
    """Example: orchestrator/models/export.py:13 in export."""
    parts = Path(file).parts
    start = next(
        (len(parts) - i for i, p in enumerate(reversed(parts)) if p in ("site-packages", "dist-packages")),
        None,
    )
    if start is None and "orchestrator" in parts:
        start = len(parts) - 1 - parts[::-1].index("orchestrator")
    return f"{'/'.join(parts[start or 0 :])}:{line} in {name}".replace("//", "/")


class RemoteError(Exception):
    """Carries an ErrorRecord from an actor to its driver: an exception of its own type may not survive the
    trip, and loses its places."""

    @property
    def record(self) -> ErrorRecord:
        return self.args[0]

    def __str__(self) -> str:
        return self.record.shown


Kind = TypeVar("Kind", bound=type)


def reports_errors(kind: Kind) -> Kind:
    """Class decorator of an actor. Its public methods raise an OrchestratorError as it is, and everything
    else as a RemoteError; the whole traceback is printed to the actor's log."""
    for name in dir(kind):
        if not name.startswith("_") and callable(method := getattr(kind, name)):
            setattr(kind, name, _reporting(method))
    return kind


def _reporting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return method(*args, **options)
        except (OrchestratorError, RayError):
            raise
        except RemoteError:  # of another method of the actor, which this one called
            raise
        except Exception as error:
            traceback.print_exc()
            raise RemoteError(ErrorRecord.of(error)) from None

    return run


def translate(error: Exception, worker: str, verb: str) -> OrchestratorError:
    """The error for the user, from what Ray raised when `worker` was asked to do `verb`."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, OrchestratorError):
            return cause
        if isinstance(cause, RayError):  # an object that it asked Ray for was lost with another process
            return _lost(cause, worker, verb)
        record = cause.record if isinstance(cause, RemoteError) else ErrorRecord.of(cause, str(error))
        return _classified(record, worker, verb)
    failed_start = isinstance(error, RayActorError) and error.actor_init_failed
    record = ErrorRecord.parse(str(error)) if failed_start else None
    return _lost(error, worker, verb) if record is None else _classified(record, worker, "start")


def _lost(error: Exception, worker: str, verb: str) -> WorkerLost:
    return WorkerLost(
        f"{worker} died during `{verb}`",
        why=ANSI.sub("", str(error)).strip().partition("\n")[0],
        fix="the run resumes from its last checkpoint; if it repeats, look for out-of-memory kills on that "
        "node",
    )


def _classified(record: ErrorRecord, worker: str, verb: str) -> OrchestratorError:
    """The error by what can cure it: another attempt, the user's environment, the input, the output, or
    nothing."""
    what = f"{worker} failed in `{verb}`: {record.shown}"
    why = f"raised at {record.where}" if record.where else ""
    if record.is_a(*CONNECTION_ERRORS) or _matches(BROKEN_LINK, record):
        return WorkerLost(what, why=why, fix="a peer or the network is gone; see logs/ in the run folder")
    if record.memory or _matches(DEVICE, record) or (record.errno in STORAGE_AWAY and record.is_a("OSError")):
        fix = "see logs/ in the run folder; if it repeats at the same place the run ends"
        lost = WorkerLost(what, why=why, fix=fix)
        lost.repeats = f"{verb} {record.kinds[0]} {record.where}"
        return lost
    if record.is_a("ImportError", "ModuleNotFoundError"):
        fix = "install the missing package on every node, or remove what needs it from the recipe"
        return ConfigError(what, why=why, fix=fix)
    if verb in LOADING and record.is_a("OSError", "SafetensorError"):
        fix = (
            "the files of the model (model.path, or a reference or checkpoint) cannot be read: fetch them "
            "again"
        )
        return MissingInput(what, why=why, fix=fix)
    if verb in WRITING and record.is_a("OSError", "SafetensorError"):
        fix = (
            "free disk space or fix the permissions, then run the same command: it resumes from the last "
            "checkpoint"
        )
        return OutputError(what, why=why, fix=fix)
    fix = (
        "another attempt would fail the same way; the whole traceback is in the worker's log in logs/ of "
        "the run. If neither model nor data explains it, this is a bug: report it with that log"
    )
    return WorkerFailed(what, why=why, fix=fix)


def _matches(pattern: re.Pattern[str], record: ErrorRecord) -> bool:
    """Whether native code raised it with such a message. A Python error that quotes such a word does not
    count: native errors arrive as RuntimeError."""
    return record.is_a("RuntimeError") and pattern.search(record.message) is not None


def learner_failure(error: Exception, worker: str, verb: str) -> OrchestratorError:
    """`translate` for a learner, except that memory that ran out in any verb becomes OutOfMemory, which leads
    to a finer cut. The workers are built again for it, since it is unknown what the verb left behind."""
    if not isinstance(error, RayTaskError) or isinstance(error.cause, OrchestratorError):
        return translate(error, worker, verb)
    record = error.cause.record if isinstance(error.cause, RemoteError) else ErrorRecord.of(error.cause)
    if not record.memory:
        return translate(error, worker, verb)
    failure = OutOfMemory(
        f"{worker} ran out of memory in `{verb}`",
        why=(record.message or record.kinds[0]).splitlines()[0],
        fix="set a smaller batch.micro_batch, a higher learners.zero_stage, or "
        "learners.offload.optimizer=cpu",
    )
    failure.in_place = False
    return failure
