"""Signals that ask a run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal), from the first
second to the last.

    signal --start-up, evaluation, export--> KeyboardInterrupt at once      signal --steps, checkpoints--> asked: the loop ends after its step

Either way the run ends with `Interrupted`, so with exit code 75. Senders repeat themselves: `timeout` signals
its child and then the whole group, a shell hangs up its jobs after the kernel did. Only a signal that comes a
while after the first is a second one, which ends the run at once.
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
"""Within which a further signal repeats the first."""
GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)
"""Nobody reads the pipe any longer, or the terminal was closed."""


class Stop:
    """Whether a run was asked to stop, and what a signal does in the meantime."""

    def __init__(self) -> None:
        self.by: signal.Signals | None = None
        self.doing = "starting"
        self._first, self._again, self._waits = 0.0, False, False

    def __call__(self) -> bool:
        return self.by is not None

    @property
    def once(self) -> bool:
        """Asked, and nobody insists: there is time to save."""
        return self.by is not None and not self._again

    @contextmanager
    def waits(self, doing: str) -> Iterator[None]:
        """Inside, the first signal only asks; whoever is inside looks, and ends when it suits."""
        with self._region(doing, waits=True):
            yield

    @contextmanager
    def at_once(self, doing: str) -> Iterator[None]:
        """Inside, a signal raises KeyboardInterrupt, and so does one that came before: what is done there can
        be done again."""
        with self._region(doing, waits=False):
            if self():
                raise KeyboardInterrupt
            yield

    @contextmanager
    def _region(self, doing: str, *, waits: bool) -> Iterator[None]:
        before = self.doing, self._waits
        self.doing, self._waits = doing, waits
        yield
        self.doing, self._waits = before  # not after an error: it names what was done when it came

    def hear(self, number: int, frame: object = None) -> None:
        """A handler of signals."""
        now = time.monotonic()
        if self.by is None:
            self.by, self._first = signal.Signals(number), now
            if self._waits:
                _say(
                    f"{self.by.name}: the run stops after this step, with a checkpoint; a second signal "
                    "ends it at once\n"
                )
                return
        elif now - self._first < ECHO_S:
            return
        else:
            self._again = True
        raise KeyboardInterrupt

    def interrupted(self) -> Interrupted:
        """What the user reads where nothing was left to save."""
        name = "Ctrl-C" if self.by in (None, signal.SIGINT) else self.by.name
        if self._again:
            what, why = (
                f"ended at once by a second {name} while {self.doing}",
                "what came after the last checkpoint is lost",
            )
        else:
            what, why = (
                f"stopped by {name} while {self.doing}",
                "no step is lost: those that were done are in the last checkpoint",
            )
        return Interrupted(what, why=why, fix="run the same command again to go on")


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Handles the signals in the main thread; elsewhere nothing asks to stop. One that is ignored stays so:
    nohup ignores SIGHUP, a script's background job SIGINT. Raises Interrupted in the place of
    KeyboardInterrupt."""
    stop = Stop()
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if (before := signal.getsignal(number)) is not signal.SIG_IGN:
                    signal.signal(number, stop.hear)
                    stack.callback(signal.signal, number, before if before is not None else signal.SIG_DFL)
        try:
            yield stop
        except KeyboardInterrupt:
            raise stop.interrupted() from None


@contextmanager
def held_back() -> Iterator[None]:
    """Blocks the signals, for good in all processes that are started inside: systemd, `timeout`, Slurm and
    containers signal every process of a run, a closed terminal its group, and Ray's have to live until the
    driver has written its checkpoint. They end with the driver."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def enduring_output() -> Iterator[None]:
    """A terminal that was closed, or a `| tee` that Ctrl-C ended first, takes the output with it and not the
    run: logs/driver.log has it all."""
    out, err = _Enduring(sys.stdout), _Enduring(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()  # else Python finds at its end that nobody reads, and ends with 120
            err.flush()


class _Enduring:
    """A text stream whose end of the line may go."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._tried(lambda: self._stream.write(text), len(text))

    def flush(self) -> None:
        self._tried(self._stream.flush, None)

    def _tried(self, action: Any, otherwise: Any) -> Any:
        try:
            return action()
        except OSError as error:
            if error.errno not in GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what the stream still holds, and what comes, goes there
            os.close(nowhere)
            return otherwise


def _say(text: str) -> None:
    """From inside a handler, where the streams may be in use."""
    with suppress(OSError):
        os.write(2, text.encode())
