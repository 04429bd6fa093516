from __future__ import annotations

import socket
from pathlib import Path

import pytest

from gpu_worker.listen import ListenAddress, ListenError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unix:/run/w.sock", ListenAddress(path=Path("/run/w.sock"))),
        ("unix:///run/w.sock", ListenAddress(path=Path("/run/w.sock"))),
        ("unix:w.sock", ListenAddress(path=Path("w.sock"))),
        ("127.0.0.1:50061", ListenAddress(host="127.0.0.1", port=50061)),
        ("worker-0.workers:0", ListenAddress(host="worker-0.workers", port=0)),
        ("[::1]:50061", ListenAddress(host="[::1]", port=50061)),
    ],
)
def test_addresses(text: str, expected: ListenAddress) -> None:
    assert ListenAddress.parse(text) == expected
    assert ListenAddress.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither HOST:PORT"),
        ("50061", "neither HOST:PORT"),
        (":50061", "neither HOST:PORT"),
        ("localhost", "neither HOST:PORT"),
        ("localhost:http", "neither HOST:PORT"),
        ("localhost:65536", "neither HOST:PORT"),
        ("localhost:-1", "neither HOST:PORT"),
        ("::1:50061", "IPv6 address in brackets"),
        ("unix:", "names no socket file"),
        ("unix://host/w.sock", "names no socket file"),
        ("unix:/" + "x" * 107, "the socket's path has 108 bytes and the system allows 107"),
    ],
)
def test_what_is_no_address(text: str, message: str) -> None:
    with pytest.raises(ListenError, match=message):
        ListenAddress.parse(text)


def test_a_stale_socket_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "w.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    ListenAddress(path=path).claim()
    assert not path.exists()
    ListenAddress(path=path).claim()


def test_a_living_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "w.sock"
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen()
        with pytest.raises(ListenError, match="is in use by another process"):
            ListenAddress(path=path).claim()
    assert path.exists()


def test_only_sockets_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "w.sock"
    path.write_text("precious")
    with pytest.raises(ListenError, match="exists and is not a socket"):
        ListenAddress(path=path).claim()
    assert path.read_text() == "precious"


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match=f"the directory {tmp_path}/no does not exist: create it first"):
        ListenAddress(path=tmp_path / "no" / "w.sock").claim()


def test_a_used_port_is_named() -> None:
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        with pytest.raises(ListenError, match=f"port {port} on 127.0.0.1 is in use by another process"):
            ListenAddress(host="127.0.0.1", port=port).claim()
    ListenAddress(host="127.0.0.1", port=port).claim()


def test_a_host_that_is_not_this_machine() -> None:
    with pytest.raises(ListenError, match=r"cannot listen on 192\.0\.2\.1:50061"):
        ListenAddress(host="192.0.2.1", port=50061).claim()
