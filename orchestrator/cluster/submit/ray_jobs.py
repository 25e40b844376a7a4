"""Ray's Jobs API: submissions of a run, numbered, so that submitting again is safe and goes on.

NAME, NAME.2, NAME.3 …   one Ray job per attempt of the run NAME; the newest tells where it stands
"""

import asyncio
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.cluster.quiet import without_small_talk
from orchestrator.core.errors import (
    ConfigError,
    DashboardUnreachable,
    Exit,
    Forbidden,
    MissingInput,
    OrchestratorError,
)

LOCAL = "http://127.0.0.1:8265"
FINAL = ("SUCCEEDED", "FAILED", "STOPPED")
STOP_GRACE = "RAY_JOB_STOP_WAIT_TIME_S"
SERVER_ERROR = re.compile(r"status code 5\d\d")
NO_AGENT = (
    "try again in some seconds; if it stays so, another Ray on that machine holds the port of the job agent: "
    "ray start --head --dashboard-agent-listen-port=PORT"
)
"""What mends Ray's \"No available agent to submit job\": the agent is not up yet, or never will be, its port
being taken."""
RUN, ATTEMPT = "orchestrator_run", "orchestrator_attempt"
"""Names in a job's metadata."""
RECONNECT_S = 120.0
"""How long a followed job may be out of sight before the follower gives up; the job itself goes on."""
ANSWER_S = 60.0
"""Deadline of one request to the dashboard, beside the time that an upload may take."""
SLOWEST = 100_000
"""Bytes per second of the slowest upload that is waited for."""
QUIET_S = 60.0
"""After so long without a word of a followed job its log is asked for anew: a connection whose other end is
gone says nothing either."""
POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class JobAttempt:
    """One Ray job of a run. status: Ray's word; started, ended: Unix seconds; exit_code: of the driver, once
    it ended; stop_grace_s: between SIGTERM and SIGKILL when it is stopped."""

    id: str
    run: str
    number: int
    entrypoint: str
    status: str
    message: str
    started: float | None
    ended: float | None
    exit_code: int | None
    stop_grace_s: float = 3.0

    @property
    def is_over(self) -> bool:
        return self.status in FINAL


@dataclass(frozen=True, slots=True)
class Submission:
    """What is asked for. environment: of the driver and workers, no secrets: the Jobs API shows it to
    everybody."""

    run: str
    entrypoint: str
    folder: Path
    environment: Mapping[str, str]


class Jobs:
    """The jobs of a cluster. address: of its dashboard, e.g. http://127.0.0.1:8265."""

    def __init__(self, address: str) -> None:
        token = find_token()
        _require_token(address, token)
        self.address = address
        self._client = self._asked(lambda: _client(address, token))

    def attempts(self, run: str | None = None) -> list[JobAttempt]:
        """Those of one run, or of all runs, oldest first."""
        found = [
            _attempt(details)
            for details in self._asked(self._client.list_jobs)
            if RUN in (details.metadata or {})
        ]
        return sorted((a for a in found if run in (None, a.run)), key=lambda a: (a.started or 0.0, a.number))

    def find(self, name: str) -> JobAttempt:
        """The attempt of that id, else the newest of the run of that name; MissingInput where there is
        neither."""
        attempts = self.attempts()
        found = [a for a in attempts if a.id == name and a.run != name] or [
            a for a in attempts if a.run == name
        ]
        if found:
            return max(found, key=lambda a: a.number)
        known = sorted({a.run for a in attempts})
        fix = (
            f"the runs known there are {', '.join(known)}"
            if known
            else "submit it: orchestrator submit RECIPE"
        )
        raise MissingInput(f"no run {name} at {self.address}", fix=fix)

    def submit(self, submission: Submission, number: int | None) -> str:
        """Starts attempt `number`; its id. Two that race for the same number: the second is told that it
        exists. None: a command that belongs to no run, and is not listed."""
        name = submission.run if number in (None, 1) else f"{submission.run}.{number}"
        environment = {"working_dir": str(submission.folder), "env_vars": dict(submission.environment)}

        def send() -> str:
            return self._client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=name,
                runtime_env=environment,
                metadata={} if number is None else {RUN: submission.run, ATTEMPT: str(number)},
            )

        return self._asked(send)

    def read(self, id: str) -> JobAttempt:
        return _attempt(self._asked(lambda: self._client.get_job_info(id)))

    def logs(self, id: str) -> str:
        """All that the driver has said."""
        return self._asked(lambda: self._client.get_job_logs(id))

    def follow(self, id: str, write: Callable[[str], None]) -> JobAttempt:
        """Hands on what the driver says, as it says it, until the job is over; survives a dashboard that is
        away for a while."""
        import aiohttp

        seen, lost_at = 0, None

        async def tail() -> None:
            nonlocal seen
            skip, texts = seen, self._client.tail_job_logs(id)
            while True:
                try:
                    text = await asyncio.wait_for(anext(texts), QUIET_S)
                except (StopAsyncIteration, TimeoutError):
                    return
                fresh = text[min(skip, len(text)) :]
                skip -= len(text) - len(fresh)
                seen += len(fresh)
                if fresh:
                    write(fresh)

        while True:
            try:
                asyncio.run(tail())
                attempt, lost_at = self.read(id), None
                if attempt.is_over:
                    return attempt
            except (DashboardUnreachable, RuntimeError, OSError, aiohttp.ClientError) as error:
                lost_at = time.monotonic() if lost_at is None else lost_at
                if time.monotonic() - lost_at > RECONNECT_S:
                    raise DashboardUnreachable(
                        f"lost sight of job {id} at {self.address}",
                        why=f"not reachable for {RECONNECT_S:.0f} s: {error}",
                        fix=f"the job may well go on; look again with: orchestrator logs {id} --address "
                        f"{self.address}",
                    ) from error
            time.sleep(POLL_S)

    def stop(self, id: str) -> JobAttempt:
        """Asks the driver to stop (SIGTERM: checkpoint, then exit 75) and waits until it is over: Ray kills
        it after its grace."""
        wait_s = self.read(id).stop_grace_s + RECONNECT_S
        self._asked(lambda: self._client.stop_job(id))
        deadline = time.monotonic() + wait_s
        while not (attempt := self.read(id)).is_over:
            if time.monotonic() > deadline:
                raise OrchestratorError(
                    f"job {id} has not ended after {wait_s:.0f} s",
                    fix="see `ray job stop` and the dashboard's log",
                )
            time.sleep(POLL_S)
        return attempt

    def _asked(self, request: Callable[[], Any]) -> Any:
        """The answer to a request, or an error that says what to do."""
        from ray.exceptions import AuthenticationError

        try:
            return request()
        except AuthenticationError as error:
            refused = (
                "401: no token was given" if find_token() is None else "403: the token is another cluster's"
            )
            raise Forbidden(
                f"{self.address} refuses to talk to us ({refused})",
                why="the cluster has token authentication on",
                fix="set RAY_AUTH_TOKEN, or copy the head's ~/.ray/auth_token to the same place here (chmod "
                "600)",
            ) from error
        except (ConnectionError, OSError) as error:  # requests' errors are OSErrors
            raise DashboardUnreachable(
                f"no Ray dashboard answers at {self.address}",
                why=_first_line(error)[:200],
                fix="start one (`ray start --head`), give --address, or forward the port: ssh -L "
                "8265:127.0.0.1:8265 HEAD",
            ) from error
        except RuntimeError as error:
            if SERVER_ERROR.search(str(error)):
                fix = NO_AGENT if "No available agent" in str(error) else "try again"
                raise DashboardUnreachable(
                    f"the dashboard at {self.address} is in trouble", why=_first_line(error)[:200], fix=fix
                ) from error
            raise OrchestratorError(
                f"{self.address} refused", why=_first_line(error)[:400], fix="see the dashboard's log"
            ) from error


def exit_code(attempt: JobAttempt) -> int:
    """What a command that followed the job ends with: the driver's own code; a stopped job can be resumed."""
    if attempt.status == "SUCCEEDED":
        return Exit.OK
    if attempt.status == "STOPPED":
        return Exit.RESUMABLE
    code = attempt.exit_code or Exit.SOFTWARE
    return code if code > 0 else 128 - code  # ended by a signal: as a shell says it


def find_token() -> str | None:
    """The token of the cluster: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token, as Ray
    looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return file.read_text().strip() or None if file.is_file() else None


def _require_token(address: str, token: str | None) -> None:
    """A Jobs API is a remote shell: across a network it must ask for a token."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"--address {address!r} is no dashboard address", fix=f"write e.g. --address {LOCAL}"
        )
    if token is None and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise Forbidden(
            f"no token for {address}",
            why="whoever reaches a Ray cluster without a token can run code on it, and would see this job",
            fix="start Ray with RAY_AUTH_MODE=token and copy the head's ~/.ray/auth_token here, or forward "
            "the port to 127.0.0.1",
        )


def _client(address: str, token: str | None) -> Any:
    import logging

    from ray.job_submission import JobSubmissionClient

    for chatty in (
        "ray._private.runtime_env.packaging",
        "ray.dashboard.modules.dashboard_sdk",
        "ray.dashboard.modules.job.sdk",
    ):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    without_small_talk()

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            """Ray's own waits for ever."""
            timeout = ANSWER_S + len(options.get("data") or b"") / SLOWEST
            return super()._do_request(method, endpoint, **{"timeout": timeout, **options})

    return Client(address, headers={"Authorization": f"Bearer {token}"} if token else None)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _attempt(details: Any) -> JobAttempt:
    metadata = details.metadata or {}
    return JobAttempt(
        id=details.submission_id,
        run=metadata.get(RUN, ""),
        number=int(metadata.get(ATTEMPT, 1)),
        entrypoint=details.entrypoint,
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
        stop_grace_s=float(((details.runtime_env or {}).get("env_vars") or {}).get(STOP_GRACE, 3.0)),
    )
