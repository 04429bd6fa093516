"""The address at which a group's other nodes join."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from gpu_worker.config import WorkerSettings
from gpu_worker.parallel import nodes
from gpu_worker.parallel.layout import GroupError
from gpu_worker.parallel.nodes import group_host


def settings(group_listen: str) -> WorkerSettings:
    return WorkerSettings(
        model="/model", tensor_parallel_size=2, num_nodes=2, group_listen=group_listen, group_timeout_s=0.2
    )


@pytest.fixture
def used_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as used:
        yield used.getsockname()[1]


@pytest.mark.parametrize(
    ("group_listen", "message"),
    [
        ("10.0.0.1", "^--group-listen '10.0.0.1' is neither HOST:PORT"),
        ("0.0.0.0:7077", "names no address that others could reach"),
        ("unix:/s", "names no address that others could reach"),
        ("192.0.2.1:7077", r"^--group-listen: cannot listen on 192\.0\.2\.1:7077: "),
        ("no-such-node.invalid:7077", "^--group-listen: the host 'no-such-node.invalid' is unknown after 0.2 s"),
    ],
)
def test_an_address_that_cannot_be(group_listen: str, message: str) -> None:
    with pytest.raises(GroupError, match=message):
        group_host(settings(group_listen))


def test_a_port_that_is_taken(used_port: int) -> None:
    with pytest.raises(GroupError, match=f"^--group-listen: port {used_port} on 127.0.0.1 is in use"):
        group_host(settings(f"127.0.0.1:{used_port}"))


def test_a_name_that_is_known_a_little_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a cluster's DNS has it while a pod starts."""
    monkeypatch.setattr(nodes, "_NAME_PAUSE_S", 0.001)
    resolve, refusals = socket.getaddrinfo, iter([socket.EAI_NONAME, socket.EAI_AGAIN])

    def late(host: Any, *arguments: Any, **named: Any) -> Any:
        if host == "node-0.nodes" and (refusal := next(refusals, None)) is not None:
            raise socket.gaierror(refusal, "not yet")
        return resolve("127.0.0.1" if host == "node-0.nodes" else host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    patient = settings("node-0.nodes:0").model_copy(update={"group_timeout_s": 60.0})
    assert group_host(patient) == "node-0.nodes"
    assert next(refusals, None) is None
