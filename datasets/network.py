"""Whether there is a network, asked once and quickly: libraries try again for half a minute before they say that there is none."""

import functools
import os
import socket
from urllib.parse import urlsplit

CONNECT_SECONDS = 2.0

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@functools.cache
def reachable(address: str) -> bool:
    """Whether the host of a URL can be connected to; taken for granted where a proxy stands between."""
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    parts = urlsplit(address)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)), CONNECT_SECONDS):
            return True
    except OSError:
        return False


def hub_is_reachable() -> bool:
    """Whether the Hugging Face hub (or $HF_ENDPOINT in its place) can be asked; what its cache holds is had without."""
    return reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
