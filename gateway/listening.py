"""The addresses that a gateway listens on: bound before anything else is started, so that a mistake is told at once."""

from __future__ import annotations

import errno
import socket
import ssl
import stat
from pathlib import Path

from stepwire.process.tls import server_context

from gateway.config import GatewaySettings


class ListenError(Exception):
    """The address cannot be listened on; the message says what to do."""


def bind_socket(settings: GatewaySettings) -> socket.socket:
    """The listening socket, bound before anything else is started. Raises `ListenError`."""
    if settings.uds is not None:
        return _bind_unix(settings.uds)
    listener = _tcp_socket(settings, shares_port=settings.is_one_of_several)
    try:
        listener.bind((settings.host, settings.port))
        # Bound is not enough: two sockets with SO_REUSEADDR may both be bound until one listens.
        listener.listen()
    except OSError as error:
        listener.close()
        raise ListenError(_listen_problem(settings, error)) from error
    return listener


def reserve_port(settings: GatewaySettings) -> socket.socket:
    """A socket that holds the port for the processes that will listen on it, and for nobody else; it takes no
    connections. Raises `ListenError` where somebody listens there."""
    with bind_socket(settings) as probe:
        port = probe.getsockname()[1]
    try:
        return _bound(settings, port, reuse_address=False)
    except OSError:
        # Connections of an earlier server that are not quite over. The port is then safe once one of ours listens.
        try:
            return _bound(settings, port, reuse_address=True)
        except OSError as error:
            raise ListenError(_listen_problem(settings, error)) from error


def _bound(settings: GatewaySettings, port: int, *, reuse_address: bool) -> socket.socket:
    holder = _tcp_socket(settings, shares_port=True, reuse_address=reuse_address)
    try:
        holder.bind((settings.host, port))
    except OSError:
        holder.close()
        raise
    return holder


def _tcp_socket(settings: GatewaySettings, *, shares_port: bool, reuse_address: bool = True) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    created = socket.socket(family, socket.SOCK_STREAM)
    created.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse_address))
    if shares_port:
        # The kernel deals new connections out among all that listen.
        created.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return created


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


def tls_context(settings: GatewaySettings) -> ssl.SSLContext | None:
    """Answers each client with the certificate that the files hold then. Raises `TlsFileError`."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    renewed = server_context("--tls", settings.tls_cert, settings.tls_key)

    def choose(connection: ssl.SSLSocket | ssl.SSLObject, server_name: str | None, context: ssl.SSLContext) -> None:
        connection.context = renewed.take()

    context = renewed.take()
    # Called for each handshake, whether the client names a server or not.
    context.sni_callback = choose
    return context


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
