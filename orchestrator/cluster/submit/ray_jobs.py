"""Ray's Jobs API: the attempts of a run are numbered jobs, so that the same submission can safely be repeated
and resumes the run.

    NAME, NAME.2, NAME.3 …   one Ray job per attempt of the run NAME; the newest has the run's status
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
"""Address of a dashboard on this machine."""
FINAL = ("SUCCEEDED", "FAILED", "STOPPED")
"""Statuses of a job that is over."""
STOP_GRACE = "RAY_JOB_STOP_WAIT_TIME_S"
"""Variable of a job: seconds between SIGTERM and SIGKILL when it is stopped."""
SERVER_ERROR = re.compile(r"status code 5\d\d")
NO_AGENT = (
    "try again in some seconds; if it repeats, another Ray on that machine holds the port of the job agent: "
    "ray start --head --dashboard-agent-listen-port=PORT"
)
"""Fix of Ray's \"No available agent to submit job\": the agent has not started yet, or never will because its
port is taken."""
RUN, ATTEMPT = "orchestrator_run", "orchestrator_attempt"
"""Keys of a job's metadata."""
RECONNECT_S = 120.0
"""Time that a followed job's dashboard may be away before the follower gives up; the job itself continues."""
ANSWER_S = 60.0
"""Deadline of one request to the dashboard, without the time that an upload may take."""
MIN_UPLOAD_RATE = 100_000
"""Bytes per second of the slowest upload that is waited for."""
QUIET_S = 60.0
"""Time without output of a followed job after which its log is requested again: a connection whose other end
is gone is silent too."""
POLL_S = 1.0
"""Time between two requests for a job's status."""


@dataclass(frozen=True, slots=True)
class JobAttempt:
    """One Ray job of a run."""

    id: str
    """Ray's id of the job, such as NAME.2."""
    run: str
    """Name of the run."""
    number: int
    """1 for the first attempt."""
    entrypoint: str
    """Command of the driver."""
    status: str
    """Ray's status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    """Ray's message about the status."""
    started: float | None
    """Unix seconds."""
    ended: float | None
    """Unix seconds."""
    exit_code: int | None
    """Exit code of the driver, once it ended."""
    stop_grace_s: float = 3.0
    """Seconds between SIGTERM and SIGKILL when it is stopped."""

    @property
    def is_over(self) -> bool:
        return self.status in FINAL


@dataclass(frozen=True, slots=True)
class Submission:
    """A job to be submitted."""

    run: str
    entrypoint: str
    """Command of the driver."""
    folder: Path
    """Folder that is uploaded."""
    environment: Mapping[str, str]
    """Variables of driver and workers. They must not contain secrets: the Jobs API shows them to every
    user."""


class Jobs:
    """The jobs of a cluster.

    address: of its dashboard, e.g. http://127.0.0.1:8265.
    """

    def __init__(self, address: str) -> None:
        token = find_token()
        _require_token(address, token)
        self.address = address
        self._client = self._request(lambda: _client(address, token))

    def attempts(self, run: str | None = None) -> list[JobAttempt]:
        """Attempts of one run, or of all runs, oldest first."""
        jobs = self._request(self._client.list_jobs)
        attempts = [_attempt(details) for details in jobs if RUN in (details.metadata or {})]
        wanted = (a for a in attempts if run in (None, a.run))
        return sorted(wanted, key=lambda a: (a.started or 0.0, a.number))

    def find(self, name: str) -> JobAttempt:
        """The attempt with that id, else the newest of the run with that name; MissingInput if there is
        neither."""
        attempts = self.attempts()
        by_id = [a for a in attempts if a.id == name and a.run != name]
        matches = by_id or [a for a in attempts if a.run == name]
        if matches:
            return max(matches, key=lambda a: a.number)
        runs = sorted({a.run for a in attempts})
        fix = f"the runs there are {', '.join(runs)}" if runs else "submit it: orchestrator submit RECIPE"
        raise MissingInput(f"no run {name} at {self.address}", fix=fix)

    def submit(self, submission: Submission, number: int | None) -> str:
        """Starts attempt `number`; its id. Of two submissions with the same number Ray refuses the second.

        number: None for a command that belongs to no run; it is not listed.
        """
        name = submission.run if number in (None, 1) else f"{submission.run}.{number}"
        environment = {"working_dir": str(submission.folder), "env_vars": dict(submission.environment)}

        def send() -> str:
            return self._client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=name,
                runtime_env=environment,
                metadata={} if number is None else {RUN: submission.run, ATTEMPT: str(number)},
            )

        return self._request(send)

    def read(self, id: str) -> JobAttempt:
        return _attempt(self._request(lambda: self._client.get_job_info(id)))

    def logs(self, id: str) -> str:
        """The whole output of the driver."""
        return self._request(lambda: self._client.get_job_logs(id))

    def follow(self, id: str, write: Callable[[str], None]) -> JobAttempt:
        """Passes the driver's output to `write` as it comes, until the job is over. Survives a dashboard that
        is away for a while."""
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
                        fix="the job may still be running; look again with: "
                        f"orchestrator logs {id} --address {self.address}",
                    ) from error
            time.sleep(POLL_S)

    def stop(self, id: str) -> JobAttempt:
        """Stops the driver (SIGTERM: checkpoint, then exit 75) and waits until it has ended. Ray kills it
        after its `stop_grace_s`."""
        wait_s = self.read(id).stop_grace_s + RECONNECT_S
        self._request(lambda: self._client.stop_job(id))
        deadline = time.monotonic() + wait_s
        while not (attempt := self.read(id)).is_over:
            if time.monotonic() > deadline:
                raise OrchestratorError(
                    f"job {id} has not ended after {wait_s:.0f} s",
                    fix="see `ray job stop` and the dashboard's log",
                )
            time.sleep(POLL_S)
        return attempt

    def _request(self, send: Callable[[], Any]) -> Any:
        """The answer to a request; an error with its fix if it fails."""
        from ray.exceptions import AuthenticationError

        try:
            return send()
        except AuthenticationError as error:
            refused = (
                "401: no token was given" if find_token() is None else "403: the token is another cluster's"
            )
            raise Forbidden(
                f"{self.address} refuses this request ({refused})",
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
                what = f"the dashboard at {self.address} answers with a server error"
                raise DashboardUnreachable(what, why=_first_line(error)[:200], fix=fix) from error
            what = f"{self.address} refused the request"
            why = _first_line(error)[:400]
            raise OrchestratorError(what, why=why, fix="see the dashboard's log") from error


def exit_code(attempt: JobAttempt) -> int:
    """Exit code of a command that followed the job: the driver's own; 75 for a stopped job, which can be
    resumed."""
    if attempt.status == "SUCCEEDED":
        return Exit.OK
    if attempt.status == "STOPPED":
        return Exit.RESUMABLE
    code = attempt.exit_code or Exit.SOFTWARE
    return code if code > 0 else 128 - code  # ended by a signal: the code that a shell gives


def find_token() -> str | None:
    """The token of the cluster, from where Ray reads it: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or
    ~/.ray/auth_token."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return file.read_text().strip() or None if file.is_file() else None


def _require_token(address: str, token: str | None) -> None:
    """Forbidden without a token across a network: a Jobs API is a remote shell."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        what = f"--address {address!r} is not the address of a dashboard"
        raise ConfigError(what, fix=f"write e.g. --address {LOCAL}")
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
            """Adds a timeout: Ray's own requests wait for ever."""
            timeout = ANSWER_S + len(options.get("data") or b"") / MIN_UPLOAD_RATE
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
