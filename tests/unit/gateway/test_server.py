"""Listening sockets: what is in the way is said in one line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from gateway.config import GatewaySettings
from gateway.listening import ListenError, bind_socket, reserve_port


def test_a_port_in_use_is_named() -> None:
    with bind_socket(GatewaySettings(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ListenError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
            bind_socket(GatewaySettings(port=port))


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ListenError, match="--host"):
        bind_socket(GatewaySettings(host="192.0.2.1"))


def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sock"
    bind_socket(GatewaySettings(uds=path)).close()
    assert path.exists()
    with bind_socket(GatewaySettings(uds=path)), socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))


def test_a_socket_file_in_use_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sock"
    with bind_socket(GatewaySettings(uds=path)):
        with pytest.raises(ListenError, match="in use"):
            bind_socket(GatewaySettings(uds=path))
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ListenError, match="in use"):
        bind_socket(GatewaySettings(uds=path))
    assert path.read_text() == "mine"


def test_a_port_is_shared_by_those_for_whom_it_was_reserved(tmp_path: Path) -> None:
    with reserve_port(GatewaySettings(port=0)) as holder:
        port = holder.getsockname()[1]
        shared = [
            bind_socket(GatewaySettings(port=port, gateway_process=number, gateway_run_dir=tmp_path))
            for number in (0, 1)
        ]
        try:
            with pytest.raises(ListenError, match="is in use"):
                bind_socket(GatewaySettings(port=port))
            for listener in shared:
                listener.setblocking(False)
            # Whoever holds the port takes no connections: all of these are for the two.
            clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
            taken = [_accepted(listener) for listener in shared]
            assert sum(taken) == len(clients) and min(taken) > 0
            for client in clients:
                client.close()
        finally:
            for listener in shared:
                listener.close()
        with pytest.raises(ListenError, match="is in use"), bind_socket(GatewaySettings(port=port)):
            pass
    with bind_socket(GatewaySettings(port=port)), pytest.raises(ListenError, match="is in use"):
        reserve_port(GatewaySettings(port=port))


def _accepted(listener: socket.socket) -> int:
    count = 0
    while True:
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1
