"""Routine messages of Ray are dropped; its warnings and errors are shown."""

import logging

import pytest

from orchestrator.cluster.quiet import LOGGERS, is_small_talk, without_small_talk

TOKEN = "Token authentication is enabled for this Ray cluster. Set RAY_AUTH_MODE=disabled to opt out."


def test_only_routine_messages_of_rays_loggers_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    without_small_talk()
    without_small_talk()
    for name in LOGGERS:
        caplog.set_level(logging.WARNING, logger=name)  # a Ray of an earlier test may have raised it
        logging.getLogger(name).warning(TOKEN)
        logging.getLogger(name).warning(
            "Token authentication is disabled for this Ray cluster. Anyone can run code."
        )
        logging.getLogger(name).error("the object store is full")
    shown = [record.getMessage()[:32] for record in caplog.records]
    assert shown == ["Token authentication is disabled", "the object store is full"] * len(LOGGERS)


def test_the_logger_that_ray_uses_is_among_them() -> None:
    """If Ray renames it, the first line of every command would be Ray's again."""
    from ray._private.authentication import authentication_token_setup

    assert authentication_token_setup.logger.name in LOGGERS


@pytest.mark.parametrize(
    ("line", "dropped"),
    [
        ("2026-11-28 00:41:16,786\tINFO job_manager.py:581 -- Runtime env is setting up.", True),
        (TOKEN, True),
        ("2026-11-28 00:41:16,786\tWARNING job_manager.py:581 -- the disk is nearly full", False),
        ("2026-11-28 00:41:16,786\tERROR worker.py:1 -- a worker died", False),
        ("step 3/100  loss 0.6931  eta 3m12s", False),
        ("Traceback (most recent call last):", False),
    ],
)
def test_lines_of_a_jobs_log(line: str, dropped: bool) -> None:
    assert is_small_talk(line) == dropped
