"""Connections between processes of different machines: who notices that the other end has gone, and proxies."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from stepwire.v1 import inference_pb2 as pb
from stepwire.v1 import inference_pb2_grpc as pb_grpc

from tests.system.conftest import LIMIT_S, ROOT, Stack, wait_until
from tests.system.http_streams import BODY, CHAT, ENDLESS, data_of, error_of, open_stream
from tests.system.ports import free_port


@pytest.fixture(scope="module")
def apart(tiny_model: Path) -> Iterator[Stack]:
    """Its processes speak TCP."""
    port = free_port()
    stack = Stack(
        tiny_model,
        worker_flags=["--sim-step-ms", "20", "--listen", f"127.0.0.1:{port}"],
        control_plane_flags=["--workers", f"127.0.0.1:{port}", "--step-timeout-s", "300"],
    )
    stack.gateway_flags = ["--control-plane", stack.grpc_address]
    with stack:
        yield stack


def test_a_proxy_is_for_the_outside_world(apart: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gateway", "control_plane"):
        apart.kill(name, signal.SIGTERM)
    for variable in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")
    for name in ("control_plane", "gateway"):
        apart.start(name)
    monkeypatch.undo()
    apart.wait_ready()
    assert httpx.post(f"{apart.url}{CHAT}", json=BODY, timeout=120).status_code == 200


def test_a_connection_to_the_metrics_page_that_asks_for_nothing_is_closed(apart: Stack) -> None:
    with socket.create_connection(("127.0.0.1", apart.metrics_port), timeout=LIMIT_S) as silent:
        assert silent.recv(1) == b""
    assert "stepwire_open_requests" in apart.control_plane_page()


@pytest.mark.parametrize("name", ["control_plane", "gateway"])
def test_connections_are_limited_by_the_hard_limit_alone(apart: Stack, name: str) -> None:
    apart.kill(name, signal.SIGTERM)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    try:
        apart.start(name)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    apart.wait_ready()
    assert resource.prlimit(apart.processes[name].pid, resource.RLIMIT_NOFILE) == (hard, hard)


NO_CERTIFICATE = __file__


@pytest.mark.parametrize(
    ("command", "needle"),
    [
        ("gateway --tls-cert /no/cert.pem --tls-key /no/key.pem", "/no/cert.pem"),
        ("gateway --control-plane-tls-ca /no/ca.pem", "/no/ca.pem"),
        ("control_plane --worker-tls-ca /no/ca.pem", "--worker-tls-ca: cannot read /no/ca.pem"),
        (f"control_plane --worker-tls-ca {NO_CERTIFICATE}", "--worker-tls-ca"),
    ],
)
def test_tls_files_that_cannot_be_used_are_one_line_and_code_1(command: str, needle: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEPWIRE_")}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / source) for source in (".", "proto"))
    result = subprocess.run(
        [sys.executable, "-m", *command.split()], env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    *logged, message = result.stderr.strip().splitlines()
    assert result.returncode == 1
    assert needle in message and not any("Traceback" in line for line in logged)


@pytest.mark.slow
def test_a_control_plane_that_hangs_is_a_lost_one(apart: Stack) -> None:
    client, response = open_stream(apart, ENDLESS)
    lines = response.iter_lines()
    assert data_of(next(lines))
    with apart.paused("control_plane"):
        events = [json.loads(data) for line in lines if (data := data_of(line)) and data != "[DONE]"]
        client.close()
        assert events[-1]["error"]["code"] == "control_plane_lost"
        assert error_of(httpx.post(f"{apart.url}{CHAT}", json=BODY, timeout=120))["code"] == "control_plane_unreachable"
    apart.wait_ready()
    assert httpx.post(f"{apart.url}{CHAT}", json=BODY, timeout=120).status_code == 200
    apart.wait_idle()


@pytest.mark.slow
def test_clients_may_ask_whether_the_server_lives_while_they_wait(apart: Stack) -> None:
    every_s = 6
    options = [
        ("grpc.keepalive_time_ms", every_s * 1000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1, 2, 3]), stop=pb.StopConditions(max_tokens=4, ignore_eos=True)
    )
    with grpc.insecure_channel(apart.grpc_address, options=options) as channel:
        call = pb_grpc.InferenceServiceStub(channel).Generate(request)
        assert next(call).HasField("accepted")
        # gRPC forgives two questions that come too soon.
        with apart.paused(), pytest.raises(TimeoutError):
            wait_until(lambda: not call.is_active(), every_s * 4.5)
        assert list(call)[-1].HasField("usage")
    apart.wait_for("stepwire_open_requests", 0)
