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
from contextlib import ExitStack, contextmanager, suppress
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


@contextmanager
def few_files(stack: Stack, name: str, limit: int) -> Iterator[list[socket.socket]]:
    """A process that may have so many descriptors, and clients that hold all that it gives away and ask for more."""
    process = stack.processes[name]
    before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    address = ("127.0.0.1", stack.port if name == "gateway" else stack.grpc_port)
    with ExitStack() as clients:
        yield [clients.enter_context(socket.create_connection(address, timeout=LIMIT_S)) for _ in range(limit + 50)]
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)


def told_of_files(stack: Stack, name: str) -> list[str]:
    log = (stack.directory / f"{name}.log").read_text()
    return [line for line in log.splitlines() if "no file descriptor is left" in line]


def test_a_gateway_with_too_many_connections_still_says_that_it_lives(apart: Stack) -> None:
    with few_files(apart, "gateway", 160):
        # Visits that say nothing are over soon, and those that ask have their answer.
        for path, status in (("/health", 200), ("/ready", 200), ("/metrics", 200), ("/v1/models", 503)):
            answers: list[httpx.Response] = []

            def is_answered(path: str = path, answers: list[httpx.Response] = answers) -> bool:
                with suppress(httpx.TransportError):
                    answers.append(httpx.get(f"{apart.url}{path}", timeout=LIMIT_S))
                return bool(answers)

            wait_until(is_answered, LIMIT_S, apart.logs)
            (answer,) = answers
            assert (answer.status_code, answer.headers["connection"]) == (status, "close")
        assert error_of(answer)["code"] == "too_many_connections"
    (line,) = told_of_files(apart, "gateway")
    assert "limit=160" in line and "ulimit -Hn" in line
    wait_until(lambda: httpx.get(f"{apart.url}/v1/models").status_code == 200, LIMIT_S, apart.logs)


def test_the_metrics_page_outlives_the_last_descriptor(apart: Stack) -> None:
    with few_files(apart, "control_plane", 100):
        wait_until(lambda: bool(told_of_files(apart, "control_plane")), LIMIT_S, apart.logs)
        for _ in range(5):
            assert "stepwire_open_requests" in apart.control_plane_page()
        # What is connected goes on.
        assert httpx.post(f"{apart.url}{CHAT}", json=BODY, timeout=120).status_code == 200
    (line,) = told_of_files(apart, "control_plane")
    assert "limit=100" in line and "ulimit -Hn" in line
    with grpc.insecure_channel(apart.grpc_address) as channel:
        grpc.channel_ready_future(channel).result(LIMIT_S)


@pytest.mark.parametrize(("limit", "is_told"), [(1000, True), (5000, False)])
def test_a_limit_below_what_is_promised_is_told_at_the_start(apart: Stack, limit: int, is_told: bool) -> None:
    """4096 requests at a time is the default; the limit is the hard one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEPWIRE_")}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / source) for source in (".", "proto"))
    command = f"ulimit -n {limit} && exec {sys.executable} -m gateway --port 0 --control-plane {apart.grpc_address}"
    with subprocess.Popen(["sh", "-c", command], env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "listening" in line:
                break
        process.terminate()
        process.stderr.read()
    assert any("few file descriptors" in line and f"limit={limit} " in line for line in lines) == is_told


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
