"""What went wrong in an actor, and whether another attempt can cure it.

    exception in an actor --telling: Trouble (text, places), traceback to its log--> RayTaskError --translate--> OrchestratorError

Another attempt cures a process that died or is late, a broken connection and a device that failed: WorkerLost
(75). What Python code raised would be raised again: WorkerFailed (70), or what its type says of the input:
66, 73, 78.
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
WRITING = ("save_state", "export")
"""Verbs whose OSErrors are the input's and the output's."""
STORAGE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN, errno.EHOSTDOWN, errno.ECONNRESET)
"""Of storage that is away for a while."""
BROKEN_LINK = re.compile(
    r"gloo|NCCL|connection (reset|closed|refused)|broken pipe|socket timeout|timed out "
    r"(waiting|after)|heartbeat|rendezvous",
    re.IGNORECASE,
)
DEVICE = re.compile(
    r"CUDA (driver )?error|cuDNN error|CUBLAS_STATUS|uncorrectable ECC|device-side assert|hipError",
    re.IGNORECASE,
)
ANSI = re.compile(r"\x1b\[[0-9;]*m")
SAID_AT_MOST = 400
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)')
_LAST = re.compile(
    r"^(?P<kind>[A-Za-z_][\w.]*(?:Error|Exception|Warning|Exit|Interrupt))(?::\s*(?P<said>.*))?$"
)


@dataclass(frozen=True, slots=True)
class Trouble:
    """An exception as text. kinds: its class and those that it derives from; places: "file:line in function",
    innermost last."""

    kinds: tuple[str, ...]
    said: str
    places: tuple[str, ...] = ()
    errno: int | None = None
    memory: bool = False

    @classmethod
    def of(cls, error: BaseException, text: str = "") -> "Trouble":
        """text: a traceback, where the exception has lost its own on the way."""
        frames = traceback.extract_tb(error.__traceback__)
        places = [(f.filename, str(f.lineno), f.name) for f in frames] or _FRAME.findall(text)
        kinds = tuple(k.__name__ for k in type(error).__mro__ if k is not object)
        said, number = ANSI.sub("", str(error)).strip(), getattr(error, "errno", None)
        return cls(kinds, said, tuple(_place(*p) for p in places), number, is_out_of_memory(error))

    @classmethod
    def read(cls, text: str) -> "Trouble | None":
        """From the text of a traceback; None where its last line names no exception."""
        lines = ANSI.sub("", text).strip().splitlines()
        found = next((m for line in reversed(lines) if (m := _LAST.match(line))), None)
        if found is None:
            return None
        return cls(
            (found["kind"].rpartition(".")[2],),
            found["said"] or "",
            tuple(_place(*p) for p in _FRAME.findall(text)),
        )

    def is_a(self, *names: str) -> bool:
        return any(name in self.kinds for name in names)

    @property
    def shown(self) -> str:
        """The exception on one line."""
        said = " ".join(self.said.split())
        return f"{self.kinds[0]}: {said[:SAID_AT_MOST]}" if said else self.kinds[0]

    @property
    def where(self) -> str:
        """The innermost place, and the innermost one of this program's if that is another."""
        ours = [
            p
            for p in self.places
            if p.startswith("orchestrator/") and not p.startswith("orchestrator/cluster/failures.py")
        ]
        shown = dict.fromkeys([*self.places[-1:], *ours[-1:]])
        return ", called at ".join(shown)


def _place(file: str, line: str, name: str) -> str:
    parts = Path(file).parts
    start = next(
        (len(parts) - i for i, p in enumerate(reversed(parts)) if p in ("site-packages", "dist-packages")),
        None,
    )
    if start is None and "orchestrator" in parts:
        start = len(parts) - 1 - parts[::-1].index("orchestrator")
    return f"{'/'.join(parts[start or 0 :])}:{line} in {name}".replace("//", "/")


class Raised(Exception):
    """Carries a Trouble from an actor to its driver: an exception of its own type may not survive the trip,
    and loses its places."""

    @property
    def trouble(self) -> Trouble:
        return self.args[0]

    def __str__(self) -> str:
        return self.trouble.shown


Kind = TypeVar("Kind", bound=type)


def telling(kind: Kind) -> Kind:
    """An actor's class whose public methods raise OrchestratorErrors as they are and everything else as
    Raised, the whole traceback printed to the actor's log."""
    for name in dir(kind):
        if not name.startswith("_") and callable(method := getattr(kind, name)):
            setattr(kind, name, _told(method))
    return kind


def _told(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def tells(*args: Any, **options: Any) -> Any:
        try:
            return method(*args, **options)
        except (OrchestratorError, RayError):
            raise
        except Exception as error:
            traceback.print_exc()
            raise Raised(Trouble.of(error)) from None

    return tells


def translate(error: Exception, who: str, verb: str) -> OrchestratorError:
    """What a user can read from what Ray raised. who: the worker by name."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, OrchestratorError):
            return cause
        if isinstance(cause, RayError):  # what it asked Ray for was lost with another process
            return _lost(cause, who, verb)
        return _judged(
            cause.trouble if isinstance(cause, Raised) else Trouble.of(cause, str(error)), who, verb
        )
    started_badly = (
        Trouble.read(str(error)) if isinstance(error, RayActorError) and error.actor_init_failed else None
    )
    return _lost(error, who, verb) if started_badly is None else _judged(started_badly, who, "start")


def _lost(error: Exception, who: str, verb: str) -> WorkerLost:
    return WorkerLost(
        f"{who} died during `{verb}`",
        why=ANSI.sub("", str(error)).strip().partition("\n")[0],
        fix="the run goes on from its last checkpoint; if it repeats, look for out-of-memory kills on that "
        "node",
    )


def _judged(trouble: Trouble, who: str, verb: str) -> OrchestratorError:
    """Whether another attempt can cure it, and if not, whose it is."""
    what, why = (
        f"{who} failed in `{verb}`: {trouble.shown}",
        f"raised at {trouble.where}" if trouble.where else "",
    )
    if trouble.is_a(
        "DistError", "DistBackendError", "ConnectionError", "TimeoutError", "EOFError"
    ) or _matches(BROKEN_LINK, trouble):
        return WorkerLost(what, why=why, fix="a peer or the network is gone; see logs/ in the run folder")
    if trouble.memory or _matches(DEVICE, trouble) or (trouble.errno in STORAGE and trouble.is_a("OSError")):
        lost = WorkerLost(
            what, why=why, fix="see logs/ in the run folder; if it repeats at the same place the run ends"
        )
        lost.repeats = f"{verb} {trouble.kinds[0]} {trouble.where}"
        return lost
    if trouble.is_a("ImportError", "ModuleNotFoundError"):
        return ConfigError(
            what, why=why, fix="install what is missing on every node, or leave out what needs it"
        )
    if verb in LOADING and trouble.is_a("OSError", "SafetensorError"):
        return MissingInput(
            what,
            why=why,
            fix="the files of the model (model.path, or a reference or checkpoint) cannot be read: fetch "
            "them again",
        )
    if verb in WRITING and trouble.is_a("OSError", "SafetensorError"):
        fix = (
            "free disk space or fix the permissions, then run the same command: it goes on from the last "
            "checkpoint"
        )
        return OutputError(what, why=why, fix=fix)
    fix = (
        "another attempt would fail the same way; the whole traceback is in the worker's log in logs/ of "
        "the run. If neither model nor data "
    )
    return WorkerFailed(what, why=why, fix=fix + "explains it, this is a bug: report it with that log")


def _matches(pattern: re.Pattern[str], trouble: Trouble) -> bool:
    """Only of errors that native code raises: a Python error that quotes such a word is none of them."""
    return trouble.is_a("RuntimeError") and pattern.search(trouble.said) is not None


def learner_failure(error: Exception, who: str, verb: str) -> OrchestratorError:
    """`translate` of a learner's failure, for which memory that ran out in any verb leads to a finer cut: of
    workers that are built again, since nobody knows what the verb left behind."""
    if not isinstance(error, RayTaskError) or isinstance(error.cause, OrchestratorError):
        return translate(error, who, verb)
    trouble = error.cause.trouble if isinstance(error.cause, Raised) else Trouble.of(error.cause)
    if not trouble.memory:
        return translate(error, who, verb)
    failure = OutOfMemory(
        f"{who} ran out of memory in `{verb}`",
        why=(trouble.said or trouble.kinds[0]).splitlines()[0],
        fix="set a smaller batch.micro_batch, a higher learners.zero_stage, or "
        "learners.offload.optimizer=cpu",
    )
    failure.in_place = False
    return failure
