"""A component behind an HTTP endpoint: batched JSON, bounded waits, and no request to another address.

    POST {"prompts": [...], "completions": [...], "columns": {...}}   ->   {"rewards": [...]}

A request is tried again after a lost connection, 408, 429 and 5xx until the call's deadline, after the time
of Retry-After if the answer has one. Other answers are final. Redirects are refused: they would carry data
and headers to a host that the recipe does not name.
"""

import asyncio
import hashlib
import json
import logging
import socket
import ssl
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from orchestrator.core.errors import ConfigError, DashboardUnreachable
from orchestrator.core.rollouts import RolloutGroup
from orchestrator.data.values import in_json
from orchestrator.recipe.schema import RewardFunction
from orchestrator.rollout.rewards.component import Outcome, RewardCall, RewardFailure, validate_rewards
from orchestrator.rollout.rewards.lookup import header_values

MAX_BODY_BYTES = 8 * 1024 * 1024
IN_FLIGHT = 8
CONNECT_TIMEOUT_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
FAILURES_TO_OPEN, COOL_DOWN_S = 3, 30.0
REACHABLE_WITHIN_S = 15.0
"""Time for an endpoint to accept a connection when a run begins."""
TRUST = "set SSL_CERT_FILE to the certificate of the authority that signed the server's, or fix the server"

# At INFO httpx writes whole addresses, whose query may hold a secret.
logging.getLogger("httpx").setLevel(logging.WARNING)


class Unavailable(RewardFailure):
    """The endpoint cannot be reached, or answers that it cannot work now."""


@dataclass(slots=True)
class Breaker:
    """Circuit breaker: sends nothing to an endpoint that is unavailable.

    It opens for `cool_down_s` after `failures_to_open` failures in a row. Then it lets one request through,
    which closes it or opens it again.
    """

    failures_to_open: int = FAILURES_TO_OPEN
    cool_down_s: float = COOL_DOWN_S
    failures: int = 0
    opened: float | None = None
    reason: str = ""

    def seconds_to_wait(self) -> float:
        """Seconds until a request may be sent; 0 if it may be sent now."""
        return 0.0 if self.opened is None else max(0.0, self.opened + self.cool_down_s - time.monotonic())

    def answered(self) -> None:
        self.failures, self.opened, self.reason = 0, None, ""

    def unavailable(self, reason: str) -> None:
        """Counts a failure. `reason` is shown for requests that are not sent."""
        self.failures += 1
        self.reason = reason
        if self.opened is not None or self.failures >= self.failures_to_open:
            self.opened = time.monotonic()


class HttpReward:
    """A component (component.Component) for one thread at a time."""

    def __init__(
        self,
        function: RewardFunction,
        *,
        batch_size: int,
        environment: Mapping[str, str],
        retry: bool = True,
        breaker: Breaker | None = None,
    ) -> None:
        """`environment` holds the values of headers_from, which are never logged.

        With retry=False each request is sent once.
        """
        assert function.url is not None
        self.name, self.url = function.name, httpx.URL(function.url)
        self.batch_size, self.retry = batch_size, retry
        self.headers = {
            **header_values(function, environment),
            "Accept": "application/json",
            "Accept-Encoding": "identity",
        }
        self.breaker = breaker or Breaker()

    def score(self, groups: Sequence[RolloutGroup], timeout_s: float) -> list[Outcome]:
        """One outcome per sample within timeout_s; a failed request is a failure of each of its samples."""
        wait = self.breaker.seconds_to_wait()
        if wait:
            raise Unavailable(
                f"reward {self.name}: {self._shown} was unavailable {self.breaker.failures} times in a row",
                why=f"{self.breaker.reason}; the next request is sent in {wait:.0f} s",
            )
        chunks = list(RewardCall.of(groups).chunks(self.batch_size))
        loop = asyncio.new_event_loop()  # asyncio.run would wait for a name server without limit
        try:
            return loop.run_until_complete(self._all(chunks, time.monotonic() + timeout_s))
        finally:
            loop.close()

    async def _all(self, chunks: Sequence[RewardCall], deadline: float) -> list[Outcome]:
        seconds = deadline - time.monotonic()
        timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT_TIMEOUT_S))
        slots = asyncio.Semaphore(IN_FLIGHT)
        async with httpx.AsyncClient(headers=self.headers, timeout=timeout, follow_redirects=False) as client:

            async def score_chunk(number: int) -> list[Outcome]:
                async with slots:
                    return await self._outcomes(client, chunks[number], number, deadline)

            # If the breaker is half open, one request decides.
            first = [await score_chunk(0)] if self.breaker.opened is not None else []
            rest = await asyncio.gather(*(score_chunk(i) for i in range(len(first), len(chunks))))
        return [outcome for outcomes in [*first, *rest] for outcome in outcomes]

    async def _outcomes(
        self, client: httpx.AsyncClient, call: RewardCall, number: int, deadline: float
    ) -> list[Outcome]:
        try:
            if self.breaker.seconds_to_wait():
                raise Unavailable(
                    f"reward {self.name}: {self._shown} is unavailable", why=self.breaker.reason
                )
            answer = await self._answer(client, _body(self.name, call), number, deadline)
            return validate_rewards(self.name, _rewards(self.name, answer), call.samples)
        except Unavailable as failure:
            if not self.breaker.seconds_to_wait():  # else nothing was sent, or another request just opened it
                self.breaker.unavailable(failure.why)
            return [failure] * len(call)
        except RewardFailure as failure:
            return [failure] * len(call)

    async def _answer(self, client: httpx.AsyncClient, body: bytes, number: int, deadline: float) -> bytes:
        """The body of the first successful answer before the deadline."""
        attempt, last = 0, "no answer came in time"
        while True:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    return await self._post(client, body)
            except TimeoutError:
                raise Unavailable(
                    f"reward {self.name}: {self._shown} did not answer in time", why=last
                ) from None
            except _Busy as busy:
                wanted = busy.retry_after
                last = busy.reason if wanted is None else f"{busy.reason} and asks to wait {wanted:.0f} s"
            pause = wanted if wanted is not None else self._pause(number, attempt)
            attempt += 1
            if not self.retry or time.monotonic() + pause >= deadline:
                raise Unavailable(
                    f"reward {self.name}: {self._shown} cannot be used", why=f"{last}, tried {attempt} times"
                )
            await asyncio.sleep(pause)

    async def _post(self, client: httpx.AsyncClient, body: bytes) -> bytes:
        """Sends one request; raises _Busy if another may succeed, else RewardFailure."""
        try:
            async with client.stream(
                "POST", self.url, content=body, headers={"Content-Type": "application/json"}
            ) as response:
                self._check(response)
                return await self._bounded(response)
        except httpx.TimeoutException as error:
            raise _Busy(f"{type(error).__name__}: no answer", None) from None
        except httpx.ConnectError as error:
            if _is_untrusted(error):
                raise RewardFailure(
                    f"reward {self.name}: {self._shown} is not trusted", why=str(error), fix=TRUST
                ) from None
            raise _Busy(f"no connection: {error}", None) from None
        except httpx.HTTPError as error:  # whose text may hold parts of the request
            raise _Busy(f"the connection broke: {type(error).__name__}", None) from None

    def _check(self, response: httpx.Response) -> None:
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise _Busy(f"it answers {status}", _retry_after(response.headers.get("Retry-After")))
        self.breaker.answered()
        if 300 <= status < 400:
            fix = "set the component's url to the final address"
            raise RewardFailure(
                f"reward {self.name}: {self._shown} answers {status}, a redirect, which is not followed",
                fix=fix,
            )
        if status != 200:
            raise RewardFailure(
                f"reward {self.name}: {self._shown} answers {status}",
                fix="check the url, the headers and the server's log",
            )
        kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
        if kind != "application/json" or response.headers.get("Content-Encoding", "identity") != "identity":
            raise RewardFailure(
                f"reward {self.name}: {self._shown} answers {kind[:60] or 'without a Content-Type'}, not "
                "plain application/json"
            )

    async def _bounded(self, response: httpx.Response) -> bytes:
        data = bytearray()
        async for part in response.aiter_raw():
            data += part
            if len(data) > MAX_BODY_BYTES:
                raise RewardFailure(
                    f"reward {self.name}: {self._shown} answers more than {MAX_BODY_BYTES >> 20} MB"
                )
        return bytes(data)

    def _pause(self, number: int, attempt: int) -> float:
        """Seconds before the next try: doubled each time, spread over the upper half by a hash."""
        digest = hashlib.blake2b(f"{self.name} {number} {attempt}".encode(), digest_size=8).digest()
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * (
            0.5 + 0.5 * int.from_bytes(digest, "big") / 2**64
        )

    @property
    def _shown(self) -> str:
        """The address without its query, which may hold a secret."""
        return f"{self.url.scheme}://{self.url.netloc.decode()}{self.url.path}"


def check_reachable(function: RewardFunction, timeout_s: float = REACHABLE_WITHIN_S) -> None:
    """Connects to the endpoint once before a run, and sends nothing.

    ConfigError if its certificate is not trusted, DashboardUnreachable if it accepts no connection within
    `timeout_s`. Behind a proxy nothing is tried, since only a request would show whether it is there.
    """
    url = httpx.URL(str(function.url))
    shown, deadline = f"{url.scheme}://{url.netloc.decode()}", time.monotonic() + timeout_s
    if urllib.request.getproxies().get(url.scheme) and not urllib.request.proxy_bypass(url.host):
        return
    while True:
        try:
            with socket.create_connection(
                (url.host, url.port or (443 if url.scheme == "https" else 80)), timeout=CONNECT_TIMEOUT_S
            ) as connection:
                if url.scheme == "https":
                    httpx.create_ssl_context().wrap_socket(connection, server_hostname=url.host).close()
            return
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(
                f"reward {function.name}: {shown} is not trusted", why=str(error), fix=TRUST
            ) from error
        except OSError as error:
            if time.monotonic() + 1.0 > deadline:
                fix = "start the server, or fix the component's url"
                raise DashboardUnreachable(
                    f"reward {function.name}: nothing answers at {shown}",
                    why=error.strerror or str(error),
                    fix=fix,
                ) from error
            time.sleep(1.0)


def _is_untrusted(error: BaseException | None) -> bool:
    """Whether an untrusted certificate is the cause, so that no other try can succeed."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Busy(Exception):
    """A try failed, another may succeed. `retry_after` is how many seconds the server asks to wait."""

    def __init__(self, reason: str, retry_after: float | None) -> None:
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


def _body(name: str, call: RewardCall) -> bytes:
    try:
        request = {"prompts": call.prompts, "completions": call.completions, "columns": in_json(call.columns)}
        return json.dumps(request, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RewardFailure(
            f"reward {name}: the data cannot be sent as JSON",
            why=str(error),
            fix="keep text, numbers and lists in it",
        ) from error


def _rewards(name: str, answer: bytes) -> object:
    try:
        content = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise RewardFailure(
            f"reward {name}: the endpoint's answer is not JSON", why=str(error)[:120]
        ) from error
    if not isinstance(content, dict) or "rewards" not in content:
        raise RewardFailure(
            f"reward {name}: the endpoint's answer has no `rewards`", fix='it must be {"rewards": [...]}'
        )
    return content["rewards"]


def _retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date; None if it holds neither."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return min(float(header), 1e9)
    try:
        at = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, ((at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())
