"""The HTTP server: uvicorn, with a drain on SIGTERM during which connections are still answered."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

import structlog
import uvicorn
from fastapi import FastAPI

from gateway import errors
from gateway.client import ControlPlaneClient
from gateway.config import GatewaySettings
from gateway.middleware import Lifecycle
from gateway.response_body import BodyWritingProtocol

_log = structlog.get_logger(__name__)

# What responses that were just cut off may take to be written.
CUT_OFF_GRACE_S = 2


class ListenError(Exception):
    """The address cannot be listened on; the message says what to do."""


def bind_socket(settings: GatewaySettings) -> socket.socket:
    """The listening socket, bound before anything else is started. Raises `ListenError`."""
    if settings.uds is not None:
        return _bind_unix(settings.uds)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        # Bound is not enough: two sockets with SO_REUSEADDR may both be bound until one listens.
        listener.listen()
    except OSError as error:
        listener.close()
        raise ListenError(_listen_problem(settings, error)) from error
    return listener


def _listen_problem(settings: GatewaySettings, error: OSError) -> str:
    where = f"{settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return f"port {settings.port} on {settings.host} is in use; stop what uses it or choose another --port"
    if error.errno == errno.EACCES:
        return f"may not listen on {where}: ports below 1024 need privileges; choose another --port"
    return f"cannot listen on {where}: {error.strerror or error}; check --host"


def _bind_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale_socket(path):
            path.unlink()
        listener.bind(str(path))
        listener.listen()
    except OSError as error:
        listener.close()
        problem = "is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise ListenError(f"cannot listen on unix socket {path}: {problem}; choose another --uds") from error
    return listener


def check_certificate(settings: GatewaySettings) -> None:
    """Raise `ListenError` where the TLS files cannot be used, before anything is started."""
    if settings.tls_cert is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        problem = error.strerror or str(error)
        raise ListenError(f"--tls-cert {settings.tls_cert} with --tls-key {settings.tls_key}: {problem}") from error


def _is_stale_socket(path: Path) -> bool:
    """A socket file that a process left behind: nobody answers there any more."""
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False


class DrainingServer(uvicorn.Server):
    """SIGTERM or SIGINT: refuse new requests, let running ones end within the drain timeout, then stop.

    Uvicorn alone would close its listening sockets at once; here probes and new requests get their 503 meanwhile. A
    second signal ends the drain.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._lifecycle: Lifecycle = app.state.lifecycle
        self._client: ControlPlaneClient = app.state.client
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
        num_running = self._lifecycle.num_in_flight
        _log.info("draining", num_requests=num_running, timeout_s=self._drain_timeout_s)
        try:
            await asyncio.wait_for(self._lifecycle.wait_idle(), self._drain_timeout_s)
        except (TimeoutError, asyncio.CancelledError):
            _log.warning("requests cut off", num_requests=self._lifecycle.num_in_flight)
            self._client.fail_all(errors.cut_off())
        self.should_exit = True


async def serve(app: FastAPI, settings: GatewaySettings, listener: socket.socket) -> None:
    """Serve until a signal."""
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=BodyWritingProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        # Nothing here asks for the client's address, so nobody need be trusted about it.
        proxy_headers=False,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        timeout_graceful_shutdown=CUT_OFF_GRACE_S,
    )
    await DrainingServer(config, app, settings.drain_timeout_s).serve(sockets=[listener])
