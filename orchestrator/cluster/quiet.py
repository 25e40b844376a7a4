"""Ray's small talk, which says nothing of a run: dropped by what it says, so that its warnings and errors are
still heard."""

import logging
import re

SMALL_TALK = (
    "Token authentication is enabled for this Ray cluster",
    "Started a local Ray instance",
    "Connecting to existing Ray cluster",
    "Connected to Ray cluster",
    "Usage stats collection is",
)
"""Beginnings of messages."""
SPEAKERS = (
    "ray._private.authentication.authentication_token_setup",
    "ray._private.worker",
    "ray._common.usage.usage_lib",
)
"""Loggers that say them: a filter of a logger does not see what its children say."""
INFORMS = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\s+INFO \w+\.py:\d+ -- ")
"""A line of Ray's in the log of a job that is neither a warning nor an error."""


class _SmallTalk(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(SMALL_TALK)


_FILTER = _SmallTalk()


def without_small_talk() -> None:
    """From here on, in this process; again does nothing more."""
    for name in SPEAKERS:
        logging.getLogger(name).addFilter(_FILTER)


def is_small_talk(line: str) -> bool:
    """Whether a line of a job's log is Ray's and says nothing of the run."""
    return INFORMS.match(line) is not None or line.startswith(SMALL_TALK)
