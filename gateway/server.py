"""The HTTP server: uvicorn, with a drain on SIGTERM during which connections are still answered."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import structlog
import uvicorn
from fastapi import FastAPI

from gateway import errors
from gateway.client import ControlPlaneClient
from gateway.config import GatewaySettings
from gateway.file_reserve import ReservingProtocol
from gateway.listening import tls_context
from gateway.middleware import Lifecycle
from gateway.responses.serving import ResponsesServing

_log = structlog.get_logger(__name__)

# What responses that were just cut off may take to be written.
CUT_OFF_GRACE_S = 2


class DrainingServer(uvicorn.Server):
    """SIGTERM or SIGINT: refuse new requests, let running ones end within the drain timeout, then stop.

    Uvicorn alone would close its listening sockets at once; here probes and new requests get their 503 meanwhile. A
    second signal ends the drain.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._lifecycle: Lifecycle = app.state.lifecycle
        self._client: ControlPlaneClient = app.state.client
        self._responses: ResponsesServing = app.state.responses
        self._drain_timeout_s = drain_timeout_s
        self._drain: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._drain is None:
            self._lifecycle.draining = True
            self._drain = asyncio.get_running_loop().create_task(self._drain_then_stop())
        else:
            self._drain.cancel()

    async def _drain_then_stop(self) -> None:
        _log.info("draining", num_requests=self._num_running(), timeout_s=self._drain_timeout_s)
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                await self._lifecycle.wait_idle()
                # Nobody need be connected for these.
                await self._responses.wait_idle()
        except (TimeoutError, asyncio.CancelledError):
            _log.warning("requests cut off", num_requests=self._num_running())
            self._client.fail_all(errors.cut_off())
        self.should_exit = True

    def _num_running(self) -> int:
        """Requests that are answered, and responses that are generated in the background; followed ones are both."""
        return self._lifecycle.num_in_flight + self._responses.num_in_background


async def serve(app: FastAPI, settings: GatewaySettings, listener: socket.socket) -> None:
    """Serve until a signal. Raises `TlsFileError`."""
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=ReservingProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        # Nothing here asks for the client's address, so nobody need be trusted about it.
        proxy_headers=False,
        timeout_graceful_shutdown=CUT_OFF_GRACE_S,
    )
    config.load()
    # Uvicorn's own would keep the certificate that it was made with.
    config.ssl = tls_context(settings)
    await DrainingServer(config, app, settings.drain_timeout_s).serve(sockets=[listener])
