"""Reachability of the Hugging Face hub, tested once per process within seconds.

The hub's libraries retry for half a minute, several times per command.
"""

import os
import socket
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from orchestrator.core.errors import MissingInput

PROBE_S = 3.0
"""Seconds within which the hub, or the proxy before it, has to accept a connection."""
FIX = (
    "on a machine with a network run `hf download {what}` into this cache (HF_HOME), or name a local folder; "
    "to plan without it use plan … --lengths MEAN,MAX (tokens), and --shape config.json for a model that is "
    "not in the table"
)


def is_model_name(path: str) -> bool:
    """True for ORG/NAME, the name of a model on the hub: everything else is a place on a disk."""
    local = path.startswith((".", "/", "~")) or ":" in path or path.count("/") != 1
    return not local and not Path(path).exists()


def is_data_set_name(path: str) -> bool:
    """True for ORG/NAME and for NAME alone, the name of a data set on the hub."""
    bare = "/" not in path and ":" not in path and "." not in path
    return is_model_name(path) or (bare and not Path(path).exists())


def endpoint() -> str:
    """Address of the hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@lru_cache
def reachable() -> bool:
    """True if the hub's address accepts a connection within PROBE_S. False if HF_HUB_OFFLINE forbids the
    test."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    hub = urlsplit(endpoint())
    proxies = {} if proxy_bypass(hub.hostname or "") else getproxies()
    proxy = proxies.get(hub.scheme) or proxies.get("all")
    target = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else hub
    try:
        port = target.port or (443 if target.scheme == "https" else 80)
        socket.create_connection((target.hostname or "", port), timeout=PROBE_S).close()
    except OSError:
        return False
    return True


def absent(what: str, of: str) -> MissingInput:
    """Error for `what` (ORG/NAME) that is not in the cache while the hub is not reachable. of: "model" or
    "data set"."""
    why = (
        f"{endpoint()} does not answer within {PROBE_S:g} s, or HF_HUB_OFFLINE is set, and the "
        "cache does not hold it"
    )
    return MissingInput(
        f"{of} {what} cannot be fetched",
        why=why,
        fix=FIX.format(what=what if of == "model" else f"{what} --repo-type dataset"),
    )
