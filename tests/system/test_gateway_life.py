"""Keys, restarts, shutdown, and what a gateway listens on."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.conftest import LIMIT_S, ROOT, STOP_LIMIT_S, Stack, wait_until
from tests.system.http_streams import BODY, CHAT, ENDLESS, data_of, error_of, open_stream
from tests.system.ports import free_port


@pytest.fixture(scope="module")
def patient(tiny_model: Path) -> Iterator[Stack]:
    """Its worker may stand still during its first steps for as long as a test needs; each test starts its gateway."""
    flags = ["--step-timeout-s", "300"]
    with Stack(tiny_model, worker_flags=["--sim-step-ms", "50"], control_plane_flags=flags) as running:
        yield running


def start_gateway(stack: Stack, *flags: str) -> None:
    """With these flags, in place of the one that was there."""
    if "gateway" in stack.processes:
        stack.kill("gateway", signal.SIGTERM)
    stack.gateway_flags = flags
    stack.start("gateway")


def with_gateway(stack: Stack, *flags: str) -> Stack:
    start_gateway(stack, *flags)
    stack.wait_ready()
    return stack


def test_with_a_key_everything_but_probes_is_closed_also_at_the_control_plane(tiny_model: Path) -> None:
    key = "sk-test"
    closed = (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/metrics"), ("GET", "/x"))
    with (
        Stack(tiny_model, api_key=key, control_plane_flags=["--api-key", key]) as stack,
        httpx.Client(base_url=stack.url, timeout=120) as http,
    ):
        for method, path in closed:
            refused = http.request(method, path, json=BODY if method == "POST" else None)
            assert refused.status_code == 401
            assert error_of(refused)["code"] == "invalid_api_key"
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        assert http.post(CHAT, json=BODY, headers=stack.headers).status_code == 200
        assert http.get("/v1/models/alias/tiny", headers=stack.headers).json()["id"] == "alias/tiny"

        # A gateway may be open to everybody and have a key for its control plane.
        stack.api_key = None
        with_gateway(stack, "--control-plane-api-key", key)
        assert http.post(CHAT, json=BODY).status_code == 200
        # One whose key the control plane refuses says so.
        start_gateway(stack, "--control-plane-api-key", "wrong")

        def answers() -> bool:
            try:
                return httpx.get(f"{stack.url}/health", timeout=LIMIT_S).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers, LIMIT_S, stack.logs)

        def is_refused() -> bool:
            response = httpx.post(f"{stack.url}{CHAT}", json=BODY, timeout=120)
            return response.status_code == 500 and error_of(response)["code"] == "gateway_unauthorized"

        wait_until(is_refused, LIMIT_S, stack.logs)
        refused = httpx.get(f"{stack.url}/v1/models", timeout=LIMIT_S)
        assert (refused.status_code, refused.headers["x-should-retry"]) == (500, "false")
        assert httpx.get(f"{stack.url}/ready", timeout=LIMIT_S).status_code == 503


def test_a_control_plane_that_restarts(patient: Stack) -> None:
    stack = with_gateway(patient)
    client, response = open_stream(stack, ENDLESS)
    lines = response.iter_lines()
    assert data_of(next(lines))
    stack.kill("control_plane")
    events = [json.loads(data) for line in lines if (data := data_of(line)) and data != "[DONE]"]
    client.close()
    assert events[-1]["error"]["code"] == "control_plane_lost"
    assert events[-1]["error"]["type"] == "service_unavailable_error"
    assert httpx.get(f"{stack.url}/health", timeout=LIMIT_S).status_code == 200
    down = httpx.get(f"{stack.url}/ready", timeout=LIMIT_S)
    assert down.status_code == 503
    refused = httpx.post(f"{stack.url}{CHAT}", json=BODY, timeout=120)
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert str(stack.directory) not in refused.text + down.text
    stack.start("control_plane")
    stack.wait_ready()
    assert httpx.post(f"{stack.url}{CHAT}", json=BODY, timeout=120).status_code == 200
    assert stack.gateway_metric("stepwire_gateway_control_plane_reconnects_total") == 1


def finish_in_thread(lines: Iterator[str]) -> Callable[[], list[str]]:
    """Read a stream to its end on another thread; the result waits for it."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(lambda: [data for line in lines if (data := data_of(line))])
    return lambda: future.result(LIMIT_S)


def test_sigterm_lets_streams_end_and_refuses_the_rest(patient: Stack) -> None:
    stack = with_gateway(patient, "--drain-timeout-s", "300")
    client, response = open_stream(stack, {**BODY, "max_tokens": 40})
    lines = response.iter_lines()
    assert data_of(next(lines))
    with stack.paused():
        result = finish_in_thread(lines)
        stack.processes["gateway"].send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{stack.url}/ready", timeout=LIMIT_S).status_code == 503, LIMIT_S, stack.logs)
        assert httpx.get(f"{stack.url}/health", timeout=LIMIT_S).status_code == 200
        refused = httpx.post(f"{stack.url}{CHAT}", json=BODY, timeout=120)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
    *events, done = result()
    client.close()
    assert done == "[DONE]"
    assert json.loads(events[-1])["choices"][0]["finish_reason"] == "length"
    assert stack.processes["gateway"].wait(STOP_LIMIT_S) == 0


def test_a_drain_that_runs_out_of_time_tells_its_streams(patient: Stack) -> None:
    stack = with_gateway(patient, "--drain-timeout-s", "0.2")
    client, response = open_stream(stack, ENDLESS)
    lines = response.iter_lines()
    assert data_of(next(lines))
    stack.processes["gateway"].send_signal(signal.SIGTERM)
    *events, done = finish_in_thread(lines)()
    client.close()
    assert done == "[DONE]"
    assert json.loads(events[-1])["error"]["code"] == "draining"
    assert stack.processes["gateway"].wait(STOP_LIMIT_S) == 0
    stack.wait_idle()


def begin_in_background(stack: Stack, num_tokens: int) -> str:
    asked = {"input": "hi", "max_output_tokens": num_tokens, "ignore_eos": True, "background": True}
    answer = httpx.post(f"{stack.url}/v1/responses", json=asked, timeout=120)
    assert answer.status_code == 200
    return str(answer.json()["id"])


def stored(stack: Stack, response_id: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{stack.url}/v1/responses/{response_id}", timeout=120).json()
    return found


def test_sigterm_lets_background_responses_end(patient: Stack, tmp_path: Path) -> None:
    """Nobody is connected for them, and nobody else goes on with them."""
    flags = ("--data-dir", str(tmp_path))
    stack = with_gateway(patient, *flags, "--drain-timeout-s", "300")
    with stack.paused():
        ends = begin_in_background(stack, 20)
        stack.processes["gateway"].send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{stack.url}/ready", timeout=LIMIT_S).status_code == 503, LIMIT_S, stack.logs)
    assert stack.processes.pop("gateway").wait(STOP_LIMIT_S) == 0

    stack = with_gateway(stack, *flags, "--drain-timeout-s", "0.2")
    found = stored(stack, ends)
    assert (found["status"], found["usage"]["output_tokens"]) == ("incomplete", 20)
    # One that does not end in time is told why, and not only by the next gateway.
    is_cut_off = begin_in_background(stack, 3000)
    stack.kill("gateway", signal.SIGTERM)
    stack = with_gateway(stack, *flags)
    found = stored(stack, is_cut_off)
    assert (found["status"], found["error"]["code"]) == ("failed", "draining")
    stack.wait_idle()


def test_silent_streams_are_kept_alive(patient: Stack) -> None:
    stack = with_gateway(patient, "--sse-keepalive-s", "0.1")
    client, response = open_stream(stack, {**BODY, "max_tokens": 40})
    with stack.paused():
        raw, pieces = "", response.iter_text()
        while raw.count(": keep-alive\n\n") < 3:
            raw += next(pieces)
    raw += "".join(pieces)
    client.close()
    events = [part for part in raw.split("\n\n") if part.startswith("data: {")]
    assert all(json.loads(event[6:])["object"] == "chat.completion.chunk" for event in events)
    assert raw.endswith("data: [DONE]\n\n")


def run_gateway(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("STEPWIRE_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "proto")])
    command = [sys.executable, "-m", "gateway", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_port_in_use_is_one_line_and_code_1(stack: Stack) -> None:
    result = run_gateway("--port", str(stack.port))
    assert result.returncode == 1
    assert result.stderr.strip().count("\n") == 0
    assert f"port {stack.port}" in result.stderr and "--port" in result.stderr


def make_certificate(cert: Path, key: Path) -> None:
    """One that is its own authority: who trusts it trusts no other."""
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    files = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*make.split(), *files], check=True, capture_output=True)


def test_tls_on_both_sides_and_renewed(tiny_model: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make_certificate(cert, key)
    trust = ssl.create_default_context(cafile=str(cert))
    pair, worker_port = ["--tls-cert", str(cert), "--tls-key", str(key)], free_port()
    worker = f"127.0.0.1:{worker_port}"
    with Stack(
        tiny_model,
        worker_flags=["--listen", worker, *pair],
        control_plane_flags=["--workers", worker, "--worker-tls-ca", str(cert), *pair],
    ) as stack:
        stack.kill("gateway", signal.SIGTERM)
        port = free_port()
        flags = ["--port", str(port), "--control-plane", stack.grpc_address, "--control-plane-tls-ca", str(cert)]
        stack.gateway_flags = [*flags, *pair]
        stack.start("gateway")

        def is_ready() -> bool:
            try:
                return httpx.get(f"https://127.0.0.1:{port}/ready", verify=trust, timeout=LIMIT_S).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(is_ready, LIMIT_S, stack.logs)
        answer = httpx.post(f"https://127.0.0.1:{port}{CHAT}", json=BODY, verify=trust, timeout=120)
        assert answer.status_code == 200

        with httpx.Client(verify=trust, timeout=120, base_url=f"https://127.0.0.1:{port}") as connected:
            assert connected.get("/health").status_code == 200
            former = cert.read_bytes()
            make_certificate(tmp_path / "new.pem", tmp_path / "new.key")
            (tmp_path / "new.key").replace(key)
            # Half of a renewal: the former pair is still shown.
            assert shows(stack.grpc_port) == shows(port) == former
            (tmp_path / "new.pem").replace(cert)
            assert shows(stack.grpc_port) == shows(port) == shows(worker_port) == cert.read_bytes() != former
            assert connected.get("/health").status_code == 200, "what is connected goes on"
        trust = ssl.create_default_context(cafile=str(cert))
        assert httpx.post(f"https://127.0.0.1:{port}{CHAT}", json=BODY, verify=trust, timeout=120).status_code == 200

        # Who trusts the new one alone comes back to a server that shows it.
        for server in ("worker", "control_plane"):
            stack.kill(server, signal.SIGKILL)
            wait_until(lambda: not is_ready(), LIMIT_S, stack.logs)
            stack.start(server)
            wait_until(is_ready, LIMIT_S, stack.logs)
        assert httpx.post(f"https://127.0.0.1:{port}{CHAT}", json=BODY, verify=trust, timeout=120).status_code == 200


def shows(port: int) -> bytes:
    """The certificate that a server shows to a new connection, as its file has it."""
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=LIMIT_S).encode()


def test_a_unix_socket(patient: Stack) -> None:
    path = patient.directory / "gateway.sock"
    start_gateway(patient, "--uds", str(path))
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://gateway", timeout=120) as http:

        def is_ready() -> bool:
            try:
                return http.get("/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(is_ready, LIMIT_S, patient.logs)
        assert http.post(CHAT, json=BODY).status_code == 200
    assert patient.kill("gateway", signal.SIGTERM) == 0
    assert not path.exists()
