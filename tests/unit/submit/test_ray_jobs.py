"""Ray's Jobs API with a dashboard that stops answering: no wait is for ever, and no output is lost or shown
twice."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from aiohttp import web

from orchestrator.cluster.submit import ray_jobs as jobs
from orchestrator.cluster.submit.ray_jobs import JobAttempt, Jobs, exit_code
from orchestrator.core.errors import DashboardUnreachable


class Dashboard:
    """Answers as Ray's does about one job. If `silent`, it accepts connections and does not answer. The first
    follower of the log gets its first line and then nothing more, the next one the whole log."""

    def __init__(self) -> None:
        self.silent = False
        self.followers = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self.silent:
            await asyncio.sleep(60)
        if request.path == "/api/version":
            return web.json_response(
                {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
            )
        if not request.path.endswith("/tail"):
            status = "SUCCEEDED" if self.followers > 1 else "RUNNING"
            return web.json_response(
                {"type": "SUBMISSION", "submission_id": "a", "status": status, "entrypoint": "e"}
            )
        self.followers += 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str("one\n")
        if self.followers == 1:
            await asyncio.sleep(60)
        await socket.send_str("two\n")
        await socket.close()
        return socket


@contextmanager
def serving(dashboard: Dashboard) -> Iterator[str]:
    """Runs the dashboard; its address."""
    loop = asyncio.new_event_loop()

    async def start() -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", dashboard.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, runner.addresses[0][1]

    async def stop() -> None:
        await runner.cleanup()
        remaining = asyncio.all_tasks() - {asyncio.current_task()}
        for task in remaining:
            task.cancel()
        await asyncio.gather(*remaining, return_exceptions=True)

    runner, port = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@pytest.fixture(autouse=True)
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("ANSWER_S", 0.5), ("QUIET_S", 0.5), ("POLL_S", 0.05), ("RECONNECT_S", 0.5)):
        monkeypatch.setattr(jobs, name, seconds)


def test_a_log_that_stops_is_requested_again_and_shown_once() -> None:
    shown: list[str] = []
    dashboard = Dashboard()
    with serving(dashboard) as address:
        assert Jobs(address).follow("a", shown.append).status == "SUCCEEDED"
    assert "".join(shown) == "one\ntwo\n" and dashboard.followers == 2


def test_a_dashboard_that_hangs_is_given_up() -> None:
    dashboard = Dashboard()
    with serving(dashboard) as address:
        client = Jobs(address)
        dashboard.silent = True
        with pytest.raises(DashboardUnreachable, match="no Ray dashboard answers"):
            client.read("a")
        with pytest.raises(DashboardUnreachable, match="lost sight of job a"):
            client.follow("a", print)


ENDS = [
    ("SUCCEEDED", 0, 0),
    ("STOPPED", None, 75),
    ("FAILED", 78, 78),
    ("FAILED", None, 70),
    ("FAILED", -9, 137),
]


@pytest.mark.parametrize(("status", "driver", "code"), ENDS)
def test_a_follower_ends_as_the_driver_did(status: str, driver: int | None, code: int) -> None:
    assert exit_code(JobAttempt("a", "a", 1, "e", status, "", None, None, driver)) == code
