"""The control plane's metrics page. It answers where no file descriptor is left, which is when somebody looks."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from stepwire.process.file_limit import is_out_of_files

# How long a connection to the page may say nothing.
_SILENT_SCRAPER_S = 5.0
# Between two attempts to accept a connection for which there is no descriptor: the server asks again at once.
_RETRY_S = 0.1


def serve_metrics_page(host: str, port: int, registry: CollectorRegistry) -> None:
    """On threads of its own, for as long as the process lives. Raises `OSError`."""
    server, _ = start_http_server(port, host, registry)
    # A connection has a thread, and one that asks for nothing would keep it.
    server.RequestHandlerClass.timeout = _SILENT_SCRAPER_S  # type: ignore[attr-defined]  # a class, not any callable
    server.get_request = _SpareFile(server.socket).accept  # type: ignore[method-assign]


class _SpareFile:
    """A descriptor that is kept for one connection more than there could be."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._spare: int | None = None
        self._take()

    def accept(self) -> tuple[socket.socket, Any]:
        """Of the server's thread alone."""
        self._take()
        try:
            return self._listener.accept()
        except OSError as error:
            if not is_out_of_files(error):
                raise
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        try:
            return self._listener.accept()
        except OSError:
            time.sleep(_RETRY_S)
            raise

    def _take(self) -> None:
        if self._spare is None:
            try:
                self._spare = os.dup(self._listener.fileno())
            except OSError as error:
                if not is_out_of_files(error):
                    raise
