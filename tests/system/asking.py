"""One HTTP client for what tests ask in passing, again and again, until it is so."""

from __future__ import annotations

from collections.abc import Mapping

import httpx

# On a machine that may be busy; the limit only ends a test that has failed.
LIMIT_S = 90.0
# Made once: that takes ten times as long as asking. Every question has a connection of its own, so that of several
# processes on one port any may answer, and none waits for a client that has nothing more to say.
_client = httpx.Client(timeout=LIMIT_S, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)


def ask(url: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
    """GET a page of this machine."""
    return _client.get(url, headers=headers)
