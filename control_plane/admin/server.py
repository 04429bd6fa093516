"""AdminService's own listener: another port or socket than the public API's, and another key."""

from __future__ import annotations

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection
from stepwire.v1 import admin_pb2, admin_pb2_grpc

from control_plane.admin.servicer import AdminServicer
from control_plane.config import ControlPlaneSettings
from control_plane.frontend.server import (
    SERVER_OPTIONS,
    ApiKeyInterceptor,
    ListenError,
    check_port,
    listen_on_socket,
    tls_credentials,
)

ADMIN_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name


def create_admin_server(settings: ControlPlaneSettings, servicer: AdminServicer) -> grpc.aio.Server | None:
    """The server, bound but not started; None where the settings ask for none.

    Raises:
        ListenError: an address is in use or cannot be used.
    """
    if settings.admin_port is None and settings.admin_listen is None:
        return None
    interceptors = [ApiKeyInterceptor(settings.admin_api_key)] if settings.admin_api_key else []
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=interceptors)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    reflection.enable_server_reflection((ADMIN_SERVICE, reflection.SERVICE_NAME), server)
    if settings.admin_port is not None:
        _listen_on_port(server, settings, settings.admin_port)
    if settings.admin_listen is not None:
        listen_on_socket(server, settings.admin_listen, "--admin-listen")
    return server


def _listen_on_port(server: grpc.aio.Server, settings: ControlPlaneSettings, port: int) -> None:
    host = settings.admin_host
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    check_port(host, port, "--admin-host", "--admin-port")
    credentials = tls_credentials(settings)
    try:
        if credentials is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ListenError(f"cannot listen on {address}: choose another with --admin-host and --admin-port") from error
