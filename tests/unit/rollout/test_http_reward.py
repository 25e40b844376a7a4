"""HTTP rewards against a real server on the loopback that misbehaves in every way we know."""

import json
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.errors import ConfigError, DashboardUnreachable
from orchestrator.recipe.schema import RewardFunction
from orchestrator.rollout.rewards.component import RewardFailure
from orchestrator.rollout.rewards.http import (
    MAX_BODY_BYTES,
    Breaker,
    HttpReward,
    Unavailable,
    _retry_after,
    check_reachable,
)
from tests.unit.rollout.reward_cases import batch, group

SECRET = "geheim-93ab"
Behave = Callable[["Handler", dict[str, Any], int], None]


class Handler(BaseHTTPRequestHandler):
    """Answers each request with the server's `behave`; requests are counted from 0."""

    server: "Server"
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(request)
            self.server.headers.append(dict(self.headers))
        self.server.behave(self, request, number)

    def answer(self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.requests, self.headers = threading.Lock(), [], []
        self.behave: Behave = right
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"

    def handle_error(self, *_: object) -> None: ...


def right(handler: Handler, request: dict[str, Any], _: int) -> None:
    """The length of each completion."""
    handler.answer(200, json.dumps({"rewards": [len(c) for c in request["completions"]]}).encode())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join(5)


def component(
    url: str, *, batch_size: int = 64, retry: bool = True, breaker: Breaker | None = None
) -> HttpReward:
    function = RewardFunction(name="remote", url=url, headers_from={"Authorization": "REMOTE_TOKEN"})
    return HttpReward(
        function, batch_size=batch_size, environment={"REMOTE_TOKEN": SECRET}, retry=retry, breaker=breaker
    )


def failures(outcomes: list[Any]) -> list[str]:
    assert all(isinstance(o, RewardFailure) for o in outcomes), outcomes  # no reward is invented
    reasons = [o.reason for o in outcomes]
    assert all("remote" in r and SECRET not in r for r in reasons)
    return reasons


def test_batches_are_sent_in_order_with_columns_and_headers(server: Server) -> None:
    groups = [
        group(0, ["a", "bb"], columns={"answer": "4"}),
        group(1, ["ccc"], text=[{"role": "user", "content": "hi"}]),
    ]
    assert component(server.url, batch_size=2).score(groups, 5) == [1.0, 2.0, 3.0]
    sent = sorted(server.requests, key=lambda r: r["completions"][0])
    assert sent == [
        {"prompts": ["question 0"] * 2, "completions": ["a", "bb"], "columns": {"answer": ["4", "4"]}},
        {
            "prompts": [[{"role": "user", "content": "hi"}]],
            "completions": ["ccc"],
            "columns": {"answer": [None]},
        },
    ]
    assert {h["Authorization"] for h in server.headers} == {SECRET}
    assert {h["Content-Type"] for h in server.headers} == {"application/json"}


def test_many_batches_keep_their_order(server: Server) -> None:
    texts = ["x" * n for n in range(50)]
    assert component(server.url, batch_size=3).score(batch(texts), 10) == [float(n) for n in range(50)]
    assert len(server.requests) == 17


@pytest.mark.parametrize("status", [500, 503, 408, 429])
def test_a_temporary_error_is_tried_again(server: Server, status: int) -> None:
    server.behave = lambda h, r, n: h.answer(status) if n < 2 else right(h, r, n)
    assert component(server.url).score(batch(["ab"]), 10) == [2.0]
    assert len(server.requests) == 3


def test_retry_after_is_honoured(server: Server) -> None:
    server.behave = lambda h, r, n: h.answer(429, Retry_After="1") if n == 0 else right(h, r, n)
    started = time.monotonic()
    assert component(server.url).score(batch(["ab"]), 10) == [2.0]
    assert 1.0 <= time.monotonic() - started < 4


def test_retry_after_beyond_the_deadline_is_not_waited_for(server: Server) -> None:
    server.behave = lambda h, r, n: h.answer(503, Retry_After="3600")
    started = time.monotonic()
    (reason,) = failures(component(server.url).score(batch(["ab"]), 2))
    assert "it answers 503 and asks to wait 3600 s" in reason and time.monotonic() - started < 1
    assert len(server.requests) == 1


def test_retry_after_may_be_a_date() -> None:
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert _retry_after("Fri, 31 Dec 2999 23:59:59 GMT") > 1e9  # pyright: ignore[reportOptionalOperand]
    assert [_retry_after(h) for h in ("7", "soon", "-3", None)] == [7.0, None, None, None]


def test_a_server_that_always_fails_is_given_up_at_the_deadline(server: Server) -> None:
    server.behave = lambda h, r, n: h.answer(500)
    started = time.monotonic()
    (reason,) = failures(component(server.url).score(batch(["ab"]), 1.0))
    assert "it answers 500" in reason and time.monotonic() - started < 1.5 and len(server.requests) > 1


def test_without_retries_one_request_is_sent(server: Server) -> None:
    server.behave = lambda h, r, n: h.answer(500)
    failures(component(server.url, retry=False).score(batch(["ab"]), 5.0))
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_final(server: Server, status: int) -> None:
    server.behave = lambda h, r, n: h.answer(status)
    (reason,) = failures(component(server.url).score(batch(["ab"]), 5.0))
    assert f"answers {status}" in reason and len(server.requests) == 1


def test_a_redirect_is_not_followed(server: Server) -> None:
    elsewhere = Server()
    threading.Thread(target=elsewhere.serve_forever, args=(0.01,), daemon=True).start()
    for status in (301, 302, 307, 308):
        server.behave = lambda h, r, n, status=status: h.answer(status, Location=elsewhere.url)
        (reason,) = failures(component(server.url).score(batch(["ab"]), 5.0))
        assert f"answers {status}, a redirect" in reason
    assert elsewhere.requests == [] and len(server.requests) == 4
    elsewhere.shutdown()
    elsewhere.server_close()


def hang(handler: Handler, *_: Any) -> None:
    handler.server.release.wait(20)
    handler.close_connection = True


def drip(handler: Handler, *_: Any) -> None:
    """One byte of the head at a time, so that no single read is late."""
    for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"a" * 400:
        handler.wfile.write(bytes([byte]))
        if handler.server.release.wait(0.05):
            break
    handler.close_connection = True


def drip_body(handler: Handler, *_: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    while not handler.server.release.wait(0.05):
        handler.wfile.write(b" ")


@pytest.mark.parametrize("behave", [hang, drip, drip_body])
def test_silence_and_slowness_end_at_the_deadline(server: Server, behave: Behave) -> None:
    server.behave = behave
    started = time.monotonic()
    (reason,) = failures(component(server.url).score(batch(["ab"]), 0.6))
    assert "did not answer in time" in reason or "cannot be used" in reason
    assert time.monotonic() - started < 1.2


def test_a_huge_body_is_not_read(server: Server) -> None:
    sent = 0

    def huge(handler: Handler, *_: Any) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(1 << 30))
        handler.end_headers()
        block = b" " * (1 << 16)
        while sent < 1 << 30:
            handler.wfile.write(block)
            sent += len(block)

    server.behave = huge
    (reason,) = failures(component(server.url).score(batch(["ab"]), 10))
    assert "more than 8 MB" in reason
    assert sent < 8 * MAX_BODY_BYTES  # what the sockets hold comes on top of what was read


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b'{"rewards": [1, 2', "application/json", "not JSON"),
        (b"[" * 200_000, "application/json", "not JSON"),
        (b"\xff\xfe", "application/json", "not JSON"),
        (b"", "application/json", "not JSON"),
        (b"[1.0]", "application/json", "no `rewards`"),
        (b'{"reward": [1.0]}', "application/json", "no `rewards`"),
        (b"<html>sign in</html>", "text/html", "text/html, not plain application/json"),
        (b'{"rewards": [1.0]}', "application/json", "1 rewards for 2"),
        (b'{"rewards": [1.0, 2.0, 3.0]}', "application/json", "3 rewards for 2"),
        (b'{"rewards": 1.0}', "application/json", "float"),
        (b'{"rewards": {"0": 1.0, "1": 2.0}}', "application/json", "dict"),
    ],
)
def test_a_wrong_answer_is_not_a_reward(server: Server, body: bytes, kind: str, words: str) -> None:
    server.behave = lambda h, r, n: h.answer(200, body, kind)
    for reason in failures(component(server.url).score(batch(["ab", "c"]), 5)):
        assert words in reason
    assert len(server.requests) == 1


def test_a_compressed_answer_is_refused_unread(server: Server) -> None:
    server.behave = lambda h, r, n: h.answer(200, b"\x1f\x8b" + b"0" * 100, Content_Encoding="gzip")
    failures(component(server.url).score(batch(["ab"]), 5))
    assert server.headers[0]["Accept-Encoding"] == "identity"


def test_a_bad_entry_is_a_failure_of_its_sample_alone(server: Server) -> None:
    server.behave = lambda h, r, n: h.answer(200, b'{"rewards": [1.5, NaN, null, "2", 1e999, true]}')
    first, *wrong, last = component(server.url).score(batch(["a"] * 6), 5)
    assert first == 1.5 and last == 1.0
    for reason, words in zip(failures(wrong), ["nan", "None", "str '2'", "inf"], strict=True):
        assert words in reason and "q.jsonl:1, sample" in reason


def test_a_connection_that_breaks_off_is_tried_again(server: Server) -> None:
    def torn(handler: Handler, request: dict[str, Any], number: int) -> None:
        if number:
            return right(handler, request, number)
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b'{"rewards": [2.')
        handler.close_connection = True

    server.behave = torn
    assert component(server.url).score(batch(["ab"]), 5) == [2.0]


def test_a_failed_batch_does_not_lose_the_others(server: Server) -> None:
    server.behave = lambda h, r, n: h.answer(422) if "bad" in r["completions"] else right(h, r, n)
    first, *second, third = component(server.url, batch_size=1).score(batch(["a", "bad", "ccc"]), 5)
    assert (first, third) == (1.0, 3.0) and len(failures(second)) == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_refused_connection_is_named(server: Server) -> None:
    started = time.monotonic()
    url = f"http://127.0.0.1:{free_port()}/x?key={SECRET}"
    (reason,) = failures(component(url).score(batch(["ab"]), 0.8))
    assert "no connection" in reason and "http://127.0.0.1:" in reason and time.monotonic() - started < 1.5


def test_the_breaker_opens_fails_fast_and_recovers(server: Server) -> None:
    server.behave = lambda h, r, n: h.answer(500)
    remote = component(
        server.url, batch_size=1, retry=False, breaker=Breaker(failures_to_open=3, cool_down_s=0.6)
    )
    for _ in range(3):
        failures(remote.score(batch(["ab"]), 5))
    started = time.monotonic()
    with pytest.raises(Unavailable, match="3 times in a row"):
        remote.score(batch(["ab"]), 5)
    assert time.monotonic() - started < 0.2 and len(server.requests) == 3

    time.sleep(0.7)  # half open: one request for all, and it fails
    failures(remote.score(batch(["a", "b", "c", "d"]), 5))
    assert len(server.requests) == 4
    with pytest.raises(Unavailable):
        remote.score(batch(["ab"]), 5)

    time.sleep(0.7)
    server.behave = right
    assert remote.score(batch(["a", "bb"]), 5) == [1.0, 2.0]
    server.behave = lambda h, r, n: h.answer(500)
    failures(remote.score(batch(["ab"]), 5))  # closed again: one failure does not open it
    server.behave = right
    assert remote.score(batch(["ab"]), 5) == [2.0]


def test_refusals_do_not_open_the_breaker(server: Server) -> None:
    server.behave = lambda h, r, n: h.answer(404)
    remote = component(server.url, breaker=Breaker(failures_to_open=2))
    for _ in range(4):
        failures(remote.score(batch(["ab"]), 5))
    assert len(server.requests) == 4


def test_nothing_secret_is_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.behave = lambda h, r, n: h.answer(500) if n == 0 else right(h, r, n)
    with caplog.at_level(logging.INFO):
        assert component(f"{server.url}?key={SECRET}").score(batch(["ab"]), 5) == [2.0]
    assert SECRET not in caplog.text


# ---- before a run


@pytest.fixture
def untrusted(server: Server, tmp_path: Path) -> str:
    """The server's address with a self-signed certificate."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    options = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(["openssl", "req", "-x509", *options, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return server.url.replace("http", "https")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_an_untrusted_certificate_is_a_final_error(
    untrusted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    started = time.monotonic()
    (reason,) = set(failures(component(untrusted).score(batch(["a", "b"]), 30)))
    assert "CERTIFICATE_VERIFY_FAILED" in reason and time.monotonic() - started < 10
    with pytest.raises(ConfigError, match="is not trusted") as caught:
        check_reachable(RewardFunction(name="remote", url=untrusted))
    assert "CERTIFICATE_VERIFY_FAILED" in caught.value.why and "SSL_CERT_FILE" in caught.value.fix
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    check_reachable(RewardFunction(name="remote", url=untrusted))
    assert component(untrusted).score(batch(["a", "bb"]), 30) == [1.0, 2.0]


def test_an_open_breaker_gives_the_reason() -> None:
    breaker = Breaker(failures_to_open=1)
    failures(
        component(f"http://127.0.0.1:{closed_port()}/score", retry=False, breaker=breaker).score(
            batch(["a"]), 5
        )
    )
    with pytest.raises(Unavailable) as caught:
        component("http://127.0.0.1:1/score", breaker=breaker).score(batch(["a"]), 5)
    assert "no connection: " in caught.value.why


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def test_an_unreachable_endpoint_is_an_error_within_seconds(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_reachable(RewardFunction(name="remote", url=server.url))
    assert not server.requests, "nothing was sent"
    for url in (f"http://127.0.0.1:{closed_port()}/score", "https://no-such-host.invalid/score"):
        with pytest.raises(DashboardUnreachable, match="reward remote: nothing answers at http") as caught:
            check_reachable(RewardFunction(name="remote", url=url), timeout_s=0.5)
        assert caught.value.why and caught.value.exit_code == 69
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    check_reachable(RewardFunction(name="remote", url="https://no-such-host.invalid/score"))
