"""The public gRPC server: InferenceService, health and reflection on a TCP port and, if wanted, a unix socket."""

from __future__ import annotations

import errno
import hmac
import socket
import stat
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]  # the stubs lack it
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from stepwire.process.connections import KEEPALIVE_OPTIONS, MESSAGE_OPTIONS
from stepwire.process.tls import server_credentials
from stepwire.v1 import inference_pb2, inference_pb2_grpc

from control_plane.config import ControlPlaneSettings
from control_plane.core.request import EngineClient
from control_plane.frontend.errors import RequestRefused
from control_plane.frontend.metrics import FrontendMetrics
from control_plane.frontend.request_intake import RequestIntake
from control_plane.frontend.served_model import ServedModel
from control_plane.frontend.servicer import InferenceServicer, refuse

# The stubs make this class generic; at run time it is not.
if TYPE_CHECKING:
    _ServerInterceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _ServerInterceptor = grpc.aio.ServerInterceptor

INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
_HEALTH_METHODS = f"/{health.SERVICE_NAME}/"

SERVER_OPTIONS = (
    *MESSAGE_OPTIONS,
    # A client that vanished without a word is noticed, and its requests end.
    *KEEPALIVE_OPTIONS,
    # With it two servers would share a port, and neither would say so.
    ("grpc.so_reuseport", 0),
    # A write ends when its bytes are on the wire, not when they are the next 64 KB to be sent: until then what comes is
    # collected in the mailboxes, and the reader gets it in one message instead of in many late ones.
    ("grpc.http2.write_buffer_size", 1),
)
# Longest path of a unix socket on Linux.
_MAX_SOCKET_PATH_BYTES = 107


class ListenError(Exception):
    """The server cannot listen where it was told to; one line that says what to do."""


class FrontendServer:
    """Owned by the process's main function: start, report whether work can be done, stop."""

    def __init__(
        self, server: grpc.aio.Server, health_servicer: health_aio.HealthServicer, port: int, metrics: FrontendMetrics
    ) -> None:
        self._server = server
        self._health = health_servicer
        self.metrics = metrics
        # The TCP port in use: the one asked for, or the one found where 0 was asked for.
        self.port = port

    async def start(self) -> None:
        """Listen; health says NOT_SERVING until `set_serving(True)`."""
        await self.set_serving(False)
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        """What health answers, overall and for InferenceService. Without effect once draining has begun."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in (health.OVERALL_HEALTH, INFERENCE_SERVICE):
            await self._health.set(service, status)

    async def begin_drain(self) -> None:
        """Health says NOT_SERVING from here on; calls still come in, and the core refuses their requests."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Stop listening; calls still open are cancelled after `grace_s`."""
        await self._server.stop(grace_s)


async def create_server(
    settings: ControlPlaneSettings, engine: EngineClient, model: ServedModel, registry: CollectorRegistry
) -> FrontendServer:
    """Assemble the server and bind its addresses.

    Raises:
        ListenError: an address is in use or cannot be used.
        TlsFileError: certificate or key cannot be used.
    """
    metrics = FrontendMetrics(registry)
    intake = RequestIntake(engine, model, metrics, max_n=settings.max_n, max_preparing=settings.max_queued_requests)
    interceptors = [ApiKeyInterceptor(settings.api_key)] if settings.api_key else []
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=interceptors)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(  # type: ignore[no-untyped-call]
        InferenceServicer(intake), server
    )
    health_servicer = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((INFERENCE_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = _listen_on_port(server, settings)
    if settings.listen is not None:
        listen_on_socket(server, settings.listen, "--listen")
    return FrontendServer(server, health_servicer, port, metrics)


class ApiKeyInterceptor(_ServerInterceptor):
    """Once a key is set, every call needs one: those that are added later too. Health stays open, for load balancers.

    Runs once a call, not once a message.
    """

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._keys = [key.get_secret_value().encode() for key in keys]

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        if handler_call_details.method.startswith(_HEALTH_METHODS) or self._is_authorized(handler_call_details):
            return await continuation(handler_call_details)
        return _DENY

    def _is_authorized(self, call: grpc.HandlerCallDetails) -> bool:
        for name, value in call.invocation_metadata or ():
            if name == "authorization":
                scheme, _, key = (value if isinstance(value, str) else value.decode("latin-1")).partition(" ")
                return scheme.lower() == "bearer" and self._is_key(key.strip().encode())
        return False

    def _is_key(self, given: bytes) -> bool:
        # Every key is compared, so that the time tells nothing of which one was near.
        return any([hmac.compare_digest(given, key) for key in self._keys])


async def _deny(requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await refuse(
        context,
        RequestRefused(
            "UNAUTHENTICATED", "invalid_api_key", "Give a valid API key: metadata `authorization: Bearer KEY`."
        ),
    )


# The most general kind: it answers calls of every other kind with a status just as well.
_DENY = grpc.stream_stream_rpc_method_handler(_deny)


def _listen_on_port(server: grpc.aio.Server, settings: ControlPlaneSettings) -> int:
    host, port = settings.grpc_host, settings.grpc_port
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    check_port(host, port, "--grpc-host", "--grpc-port")
    credentials = tls_credentials(settings)
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ListenError(f"cannot listen on {address}: choose another with --grpc-host and --grpc-port") from error


def check_port(host: str, port: int, host_flag: str, port_flag: str) -> None:
    """Raise `ListenError` for a port that is in use.

    Tries it with a plain socket: gRPC says only that it failed, and logs several lines about it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ListenError(
                f"port {port} on {host} is in use: stop what listens there, or choose another with {port_flag}"
            ) from error
        raise ListenError(f"cannot listen on {host}:{port} ({host_flag}, {port_flag}): {error.strerror}") from error


def listen_on_socket(server: grpc.aio.Server, listen: str, flag: str) -> None:
    """Raises `ListenError`."""
    path = Path(listen.removeprefix("unix:"))
    if len(str(path).encode()) > _MAX_SOCKET_PATH_BYTES:
        raise ListenError(
            f"{flag} {listen}: the path is longer than {_MAX_SOCKET_PATH_BYTES} bytes; choose a shorter one"
        )
    if not path.parent.is_dir():
        raise ListenError(f"{flag} {listen}: its directory does not exist; create it, or choose another path")
    if path.exists():
        _check_socket_is_free(path, listen, flag)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise ListenError(f"{flag} {listen}: cannot create this socket; check the directory's permissions") from error


def _check_socket_is_free(path: Path, listen: str, flag: str) -> None:
    """gRPC replaces whatever is at the path, a socket in use as well."""
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ListenError(f"{flag} {listen}: there is a file of this name; remove it, or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return  # left behind by a process that is gone
    raise ListenError(f"{flag} {listen} is in use: stop the server that listens there, or choose another path")


def tls_credentials(settings: ControlPlaneSettings) -> grpc.ServerCredentials | None:
    """None where the ports are not encrypted. Raises `TlsFileError`."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return server_credentials("--tls", settings.tls_cert, settings.tls_key, settings.tls_client_ca)
