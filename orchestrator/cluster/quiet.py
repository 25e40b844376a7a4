"""Drops the routine messages of Ray that say nothing about a run. Its warnings and errors are still shown."""

import logging
import re

SMALL_TALK = (
    "Token authentication is enabled for this Ray cluster",
    "Started a local Ray instance",
    "Connecting to existing Ray cluster",
    "Connected to Ray cluster",
    "Usage stats collection is",
)
"""Beginnings of the messages that are dropped."""
LOGGERS = (
    "ray._private.authentication.authentication_token_setup",
    "ray._private.worker",
    "ray._common.usage.usage_lib",
)
"""Loggers that write these messages. Each is named, as a logger's filter does not see records of its
children."""
INFO_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\s+INFO \w+\.py:\d+ -- ")
"""A line of Ray in the log of a job that is neither a warning nor an error."""


class _SmallTalk(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(SMALL_TALK)


_FILTER = _SmallTalk()


def without_small_talk() -> None:
    """Drops the messages in this process from now on. A second call changes nothing."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)


def is_small_talk(line: str) -> bool:
    """Whether a line of a job's log comes from Ray and says nothing about the run."""
    return INFO_LINE.match(line) is not None or line.startswith(SMALL_TALK)
