"""Signals that stop a run: SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal).

    during start-up, evaluation, export   signal -> KeyboardInterrupt immediately
    during steps and checkpoints          signal -> the flag is set -> the loop ends after its step

In both cases the run ends with `Interrupted`, exit code 75. Senders send a signal more than once: `timeout`
signals its child and then the whole group, a shell sends SIGHUP to its jobs after the kernel did. So only a
signal that comes ECHO_S after the first counts as a second one, which ends the run immediately.
"""

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

from orchestrator.core.errors import Interrupted

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ECHO_S = 1.0
"""Seconds within which a further signal repeats the first."""
GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)
"""Errors of a stream whose pipe has no reader any more, or whose terminal was closed."""


class Stop:
    """The stop flag of a run, and what a signal does at the moment. Calling it returns whether it is set."""

    def __init__(self) -> None:
        self.by: signal.Signals | None = None
        """The first signal; None before it."""
        self.doing = "starting"
        """What the run does at the moment, for messages. Example: "exporting the model"."""
        self._first_at, self._repeated, self._deferred = 0.0, False, False

    def __call__(self) -> bool:
        return self.by is not None

    @property
    def asked_once(self) -> bool:
        """True after a first signal and before a second: there is time to save."""
        return self.by is not None and not self._repeated

    @contextmanager
    def deferred(self, doing: str) -> Iterator[None]:
        """Inside, the first signal only sets the flag. The code inside reads it and ends in its own time."""
        with self._region(doing, deferred=True):
            yield

    @contextmanager
    def immediate(self, doing: str) -> Iterator[None]:
        """Inside, a signal raises KeyboardInterrupt, and so does one that came before. For work that can be
        repeated."""
        with self._region(doing, deferred=False):
            if self():
                raise KeyboardInterrupt
            yield

    @contextmanager
    def _region(self, doing: str, *, deferred: bool) -> Iterator[None]:
        before = self.doing, self._deferred
        self.doing, self._deferred = doing, deferred
        yield
        self.doing, self._deferred = before  # not after an error, whose message names what was being done

    def handle(self, number: int, frame: object = None) -> None:
        """Signal handler."""
        now = time.monotonic()
        if self.by is None:
            self.by, self._first_at = signal.Signals(number), now
            if self._deferred:
                _print_from_handler(
                    f"{self.by.name}: the run stops after this step, with a checkpoint; a second signal "
                    "ends it immediately\n"
                )
                return
        elif now - self._first_at < ECHO_S:
            return
        else:
            self._repeated = True
        raise KeyboardInterrupt

    def interrupted(self) -> Interrupted:
        """Error for a stop at which nothing had to be saved."""
        name = "Ctrl-C" if self.by in (None, signal.SIGINT) else self.by.name
        if self._repeated:
            what = f"ended immediately by a second {name} while {self.doing}"
            why = "the steps after the last checkpoint are lost"
        else:
            what = f"stopped by {name} while {self.doing}"
            why = "no step is lost: all finished steps are in the last checkpoint"
        return Interrupted(what, why=why, fix="run the same command again to continue")


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Handles the signals, if called in the main thread. Raises Interrupted instead of KeyboardInterrupt.

    An ignored signal stays ignored: nohup ignores SIGHUP, and a background job of a script ignores SIGINT.
    """
    stop = Stop()
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if (before := signal.getsignal(number)) is not signal.SIG_IGN:
                    signal.signal(number, stop.handle)
                    stack.callback(signal.signal, number, before if before is not None else signal.SIG_DFL)
        try:
            yield stop
        except KeyboardInterrupt:
            raise stop.interrupted() from None


@contextmanager
def held_back() -> Iterator[None]:
    """Blocks the signals inside, and permanently in all processes that are started inside.

    systemd, `timeout`, Slurm and containers signal every process of a run, a closed terminal signals its
    group. Ray's processes have to live until the driver has written its checkpoint. They end with the driver.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def enduring_output() -> Iterator[None]:
    """Keeps a run alive whose terminal was closed, or whose `| tee` ended first at Ctrl-C. Its output to the
    terminal is lost; logs/driver.log has all of it."""
    out, err = _Enduring(sys.stdout), _Enduring(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()  # otherwise Python fails to flush at its end, and exits with 120
            err.flush()


class _Enduring:
    """A text stream that discards its output once its reader is gone."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._attempt(lambda: self._stream.write(text), len(text))

    def flush(self) -> None:
        self._attempt(self._stream.flush, None)

    def _attempt(self, action: Any, otherwise: Any) -> Any:
        """Result of `action`, or `otherwise` if the reader is gone."""
        try:
            return action()
        except OSError as error:
            if error.errno not in GONE:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # takes the stream's buffer and all later output
            os.close(null)
            return otherwise


def _print_from_handler(text: str) -> None:
    """Writes to stderr from a signal handler, in which Python's streams may be in use."""
    with suppress(OSError):
        os.write(2, text.encode())
