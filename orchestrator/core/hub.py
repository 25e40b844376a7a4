"""Is the Hugging Face hub there? Asked once and answered in seconds: its libraries try again for half a
minute, several times a command."""

import os
import socket
from functools import lru_cache
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from orchestrator.core.errors import MissingInput

PROBE_S = 3.0
"""Seconds that the hub, or the proxy before it, has to take a connection."""
GO_ON = (
    "where there is a network: `hf download {what}` into this cache (HF_HOME), or a local folder; "
    "to plan without it: plan … --lengths MEAN,MAX (tokens), and --shape config.json for a model that the "
    "table lacks"
)


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@lru_cache
def reachable() -> bool:
    """True where something takes a connection at the hub's address within PROBE_S; False as well where
    HF_HUB_OFFLINE forbids to ask."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    asked = urlsplit(endpoint())
    proxies = {} if proxy_bypass(asked.hostname or "") else getproxies()
    proxy = proxies.get(asked.scheme) or proxies.get("all")
    way = urlsplit(proxy if proxy is None or "://" in proxy else f"http://{proxy}") if proxy else asked
    try:
        socket.create_connection(
            (way.hostname or "", way.port or (443 if way.scheme == "https" else 80)), timeout=PROBE_S
        ).close()
    except OSError:
        return False
    return True


def absent(what: str, of: str) -> MissingInput:
    """The error where the hub is not there and `what` (ORG/NAME) not in the cache. of: e.g. "model"."""
    why = (
        f"{endpoint()} does not answer within {PROBE_S:g} s, or HF_HUB_OFFLINE is set, and the cache does "
        "not hold it"
    )
    return MissingInput(
        f"{of} {what} cannot be fetched",
        why=why,
        fix=GO_ON.format(what=what if of == "model" else f"{what} --repo-type dataset"),
    )
