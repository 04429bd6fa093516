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

# Descriptors that connections leave free, and those of them that short visits may have.
NUM_RESERVED = 64
_NUM_FOR_VISITS = 32
# How long a visit may say nothing.
_SILENT_VISIT_S = 5.0

_IS_VISIT = "stepwire.is_visit"


class ReservingProtocol(BodyWritingProtocol):
    """Tells by a new connection's descriptor, the lowest one that was free, how many are left."""

    _is_visit = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        num_left = _num_left(transport)
        if num_left is None or num_left > NUM_RESERVED:
            return
        tell_out_of_files()
        self._is_visit = True
        if num_left <= NUM_RESERVED - _NUM_FOR_VISITS:
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


def _num_left(transport: asyncio.Transport) -> int | None:
    """None: any number."""
    limit, connection = file_limit(), transport.get_extra_info("socket")
    return None if limit is None or connection is None else limit - 1 - int(connection.fileno())
