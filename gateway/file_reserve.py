"""The last file descriptors are not for anybody's connection.

Where none was left the event loop would close new connections without a word, and whoever asks whether the process
lives would learn that it does not. So of the last ones some are for short visits, of which `/health`, `/ready` and
`/metrics` get an answer and everything else a 503, and some for no connection at all: the gateway has files to open.
"""

from __future__ import annotations

import asyncio
from typing import Any

from stepwire.process.file_limit import file_limit, tell_out_of_files

from gateway.response_body import BodyWritingProtocol

# Descriptors that connections leave free, or a quarter of all if that is less. Half of them are for short visits.
NUM_RESERVED = 64
# How long a visit may say nothing.
_SILENT_VISIT_S = 5.0

_IS_VISIT = "stepwire.is_visit"


class ReservingProtocol(BodyWritingProtocol):
    """Tells by a new connection's descriptor, the lowest one that was free, how many are left."""

    _is_visit = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limit, connection = file_limit(), transport.get_extra_info("socket")
        if limit is None or connection is None:
            return
        num_reserved, num_left = min(NUM_RESERVED, limit // 4), limit - 1 - connection.fileno()
        if num_left > num_reserved:
            return
        tell_out_of_files()
        self._is_visit = True
        if num_left <= num_reserved // 2:
            transport.abort()
        else:
            self.loop.call_later(_SILENT_VISIT_S, self._end_if_silent)

    def _end_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.abort()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self._is_visit and self.cycle is not None and self.cycle.scope is self.scope:
            self.cycle.keep_alive = False
            self.scope["extensions"][_IS_VISIT] = {}


def is_visit(scope: Any) -> bool:
    """Whether an ASGI scope's connection is one of those that only probes may have."""
    return _IS_VISIT in scope.get("extensions", ())
