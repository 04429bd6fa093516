"""The stack at the level of bytes: framing, statuses, disconnects, overload, restarts, shutdown."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.conftest import ROOT, Stack, free_port, wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
# With steps of 20 ms this takes far longer than any test waits.
ENDLESS: dict[str, Any] = {**BODY, "max_tokens": 3000}


@pytest.fixture(scope="module")
def slow(tiny_model: Path) -> Iterator[Stack]:
    """Two rows, two places in the queue, 20 ms a step."""
    with Stack(
        tiny_model,
        worker_flags=["--sim-step-ms", "20", "--sim-max-num-seqs", "2"],
        control_plane_flags=["--max-queued-requests", "2"],
    ) as running:
        yield running


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=30) as client:
        yield client


def data_of(line: str) -> str | None:
    return line.removeprefix("data: ") if line.startswith("data: ") else None


def events_of(response: httpx.Response) -> list[Any]:
    """The stream's JSON objects; checks the framing down to the last byte."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    raw = response.read().decode("utf-8", errors="strict")
    assert raw.endswith("data: [DONE]\n\n") and raw.count("[DONE]") == 1
    events = raw.split("\n\n")[:-2]
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def open_stream(stack: Stack, body: dict[str, Any], **headers: str) -> tuple[httpx.Client, httpx.Response]:
    """A streamed answer whose first event was read; close the client to disconnect."""
    client = httpx.Client(base_url=stack.url, timeout=30, headers=stack.headers)
    request = client.build_request("POST", CHAT, json={**body, "stream": True}, headers=headers)
    response = client.send(request, stream=True)
    assert response.status_code == 200, response.read()
    return client, response


# ---- shapes ----


def test_chat_stream_framing(http: httpx.Client) -> None:
    events = events_of(http.post(CHAT, json={**BODY, "stream": True, "stream_options": {"include_usage": True}}))
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-2]["choices"][0]["finish_reason"] == "length" and events[-2]["choices"][0]["delta"] == {}
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 8
    assert all("error" not in event and event["object"] == "chat.completion.chunk" for event in events)


def test_completion_stream_framing(http: httpx.Client) -> None:
    events = events_of(http.post(COMPLETIONS, json={"prompt": "hi", "stream": True}))
    assert all(event["object"] == "text_completion" and len(event["choices"]) == 1 for event in events)
    assert "".join(event["choices"][0]["text"] for event in events)
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "length"


def test_chat_answer_has_exactly_these_fields(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=BODY).json()
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage"}
    (choice,) = answer["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason", "stop_reason"}
    assert set(choice["message"]) == {"role", "content", "refusal"}
    assert choice["logprobs"] is None and choice["message"]["refusal"] is None
    assert answer["model"] == "tiny"


def test_cached_tokens_are_reported(http: httpx.Client) -> None:
    body = {**BODY, "messages": [{"role": "user", "content": "a prompt of more than one block of tokens " * 4}]}
    http.post(CHAT, json=body)
    usage = http.post(CHAT, json=body).json()["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]
    salted = http.post(CHAT, json={**body, "cache_salt": "mine"}).json()["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


def test_unknown_fields_are_ignored(http: httpx.Client) -> None:
    odd = {**BODY, "nobody_knows": 1, "messages": [{"role": "user", "content": "hi", "odd": [1]}]}
    assert http.post(CHAT, json=odd).status_code == 200


def test_request_ids_come_back_on_every_kind_of_answer(http: httpx.Client) -> None:
    headers = {"x-request-id": "from-the-client"}
    for body in (BODY, {**BODY, "stream": True}, {**BODY, "temperature": 9}):
        assert http.post(CHAT, json=body, headers=headers).headers["x-request-id"] == "from-the-client"


def test_wrong_bodies_are_400_and_the_server_goes_on(http: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    for content in (b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"messages": 3}', b"[" * 100_000, b"\xff\xfe"):
        for path in (CHAT, COMPLETIONS):
            response = http.post(path, content=content, headers=headers)
            assert response.status_code == 400, content[:20]
            error_of(response)
    assert http.post(CHAT, json=BODY).status_code == 200


def test_a_body_of_unsupported_features_names_the_first(http: httpx.Client) -> None:
    response = http.post(CHAT, json={**BODY, "audio": {"voice": "alloy", "format": "wav"}})
    assert (response.status_code, error_of(response)["param"]) == (400, "audio")


def test_large_bodies_are_413_while_they_are_sent(stack: Stack) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 65536

    with httpx.Client(base_url=stack.url, timeout=30) as http:
        announced = http.post(CHAT, content=b" " * (8 * 2**20 + 1), headers={"content-type": "application/json"})
        assert announced.status_code == 413
        assert str(8 * 2**20) in error_of(announced)["message"]
    # A client that does not say how much is coming, and would never stop.
    with closing(socket.create_connection(("127.0.0.1", stack.port), timeout=30)) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        answered = threading.Event()

        def send() -> None:
            try:
                for piece in endless():
                    if answered.is_set():
                        return
                    raw.sendall(b"%x\r\n" % len(piece) + piece + b"\r\n")
            except OSError:
                return  # the server closed the connection, as it should

        sender = threading.Thread(target=send)
        sender.start()
        assert raw.recv(64).startswith(b"HTTP/1.1 413 ")
        answered.set()
        sender.join()


@pytest.mark.parametrize("cut", range(0, 240, 24))
def test_a_connection_cut_anywhere_in_the_request_does_no_harm(stack: Stack, cut: int) -> None:
    content = json.dumps(BODY).encode()
    request = request_head(CHAT, content) + content
    with closing(socket.create_connection(("127.0.0.1", stack.port), timeout=30)) as raw:
        raw.sendall(request[:cut])
    assert httpx.post(f"{stack.url}{CHAT}", json=BODY, timeout=30).status_code == 200
    stack.wait_idle()


def test_metrics_of_streams(stack: Stack, http: httpx.Client) -> None:
    before = stack.gateway_metric("stepwire_gateway_sse_events_total")
    raw = http.post(CHAT, json={**BODY, "stream": True}).content
    assert stack.gateway_metric("stepwire_gateway_sse_events_total") == before + raw.count(b"data: ")
    assert stack.gateway_metric("stepwire_gateway_open_streams") == 0
    assert stack.gateway_metric("stepwire_gateway_control_plane_connected") == 1
    assert stack.gateway_metric(f'stepwire_gateway_http_requests_total{{code="200",route="{CHAT}"}}') >= 1


# ---- disconnects ----


def test_a_client_that_leaves_a_stream_frees_its_blocks(slow: Stack) -> None:
    cancelled = slow.control_plane_metric("stepwire_cancelled_requests_total")
    client, response = open_stream(slow, ENDLESS)
    lines = response.iter_lines()
    assert data_of(next(lines))
    wait_until(lambda: slow.control_plane_metric("stepwire_kv_blocks_in_use") > 0, 10)
    assert slow.gateway_metric("stepwire_gateway_open_streams") == 1
    client.close()
    slow.wait_idle()
    assert slow.control_plane_metric("stepwire_cancelled_requests_total") == cancelled + 1
    assert slow.gateway_metric("stepwire_gateway_open_streams") == 0


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_client_that_leaves_a_whole_answer_frees_its_blocks(slow: Stack, path: str) -> None:
    cancelled = slow.control_plane_metric("stepwire_cancelled_requests_total")
    body = {**ENDLESS, "n": 2} if path == CHAT else {"prompt": ["a", "b"], "max_tokens": 3000}
    with closing(socket.create_connection(("127.0.0.1", slow.port), timeout=30)) as raw:
        content = json.dumps(body).encode()
        raw.sendall(request_head(path, content) + content)
        wait_until(lambda: slow.control_plane_metric("stepwire_requests_running") == 2, 10, slow.logs)
    slow.wait_idle()
    num_requests = 1 if path == CHAT else 2
    assert slow.control_plane_metric("stepwire_cancelled_requests_total") == cancelled + num_requests
    assert slow.gateway_metric(f'stepwire_gateway_http_requests_total{{code="499",route="{path}"}}') == 1


def test_clients_that_give_up_in_crowds_do_not_hold_up_the_next(slow: Stack) -> None:
    with ThreadPoolExecutor(16) as pool:

        def give_up(_: int) -> None:
            with closing(socket.create_connection(("127.0.0.1", slow.port), timeout=30)) as raw:
                content = json.dumps(ENDLESS).encode()
                raw.sendall(request_head(CHAT, content) + content)

        list(pool.map(give_up, range(200)))
    slow.wait_idle()
    answer = httpx.post(f"{slow.url}{CHAT}", json={**BODY, "max_tokens": 1}, timeout=30)
    assert answer.status_code == 200


# ---- overload and deadlines ----


def test_a_full_queue_is_429_with_a_time_to_retry(slow: Stack) -> None:
    streams = [open_stream(slow, ENDLESS) for _ in range(2)]
    wait_until(lambda: slow.control_plane_metric("stepwire_requests_running") == 2, 10, slow.logs)
    streams += [open_stream(slow, ENDLESS) for _ in range(2)]
    try:
        for stream in (False, True):
            refused = httpx.post(f"{slow.url}{CHAT}", json={**BODY, "stream": stream}, timeout=30)
            assert refused.status_code == 429, refused.text
            assert int(refused.headers["retry-after"]) >= 1
            assert error_of(refused)["code"] == "queue_full"
            assert error_of(refused)["type"] == "rate_limit_error"
    finally:
        for client, _ in streams:
            client.close()
    slow.wait_idle()
    assert httpx.post(f"{slow.url}{CHAT}", json={**BODY, "max_tokens": 1}, timeout=30).status_code == 200


def test_timeouts_are_504_or_an_error_on_the_stream(slow: Stack) -> None:
    headers = {"x-request-timeout": "0.5"}
    whole = httpx.post(f"{slow.url}{CHAT}", json=ENDLESS, headers=headers, timeout=30)
    assert whole.status_code == 504
    assert error_of(whole)["code"] == "deadline_exceeded"
    streamed = httpx.post(f"{slow.url}{CHAT}", json={**ENDLESS, "stream": True}, headers=headers, timeout=30)
    *rest, last = events_of(streamed)
    assert len(rest) > 2 and all("error" not in event for event in rest)
    assert last["error"]["code"] == "deadline_exceeded" and last["error"]["type"] == "timeout_error"
    wrong = httpx.post(f"{slow.url}{CHAT}", json=BODY, headers={"x-request-timeout": "soon"}, timeout=30)
    assert (wrong.status_code, error_of(wrong)["param"]) == (400, "x-request-timeout")
    slow.wait_idle()


def test_a_slow_reader_gets_everything_in_fewer_pieces(stack: Stack) -> None:
    """A client that reads nothing for a while: what waits for it grows together, and arrives complete."""
    # Some 2 KB a token: more than the sockets on the way can hold.
    extras = {"n": 2, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    body = {**BODY, "max_tokens": 2000, "seed": 3, **extras}
    whole = httpx.post(f"{stack.url}{CHAT}", json=body, timeout=60).json()
    content = json.dumps({**body, "stream": True}).encode()
    sends = stack.gateway_metric("stepwire_gateway_sse_sends_total")
    with closing(socket.socket()) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(60)
        raw.connect(("127.0.0.1", stack.port))
        raw.sendall(request_head(CHAT, content, "Connection: close") + content)
        wait_until(lambda: stack.gateway_metric("stepwire_gateway_open_streams") == 1, 10)
        wait_until(lambda: stack.control_plane_metric("stepwire_requests_running") == 0, 60)
        received = b"".join(iter(lambda: raw.recv(65536), b""))
    text, num_logprobs = {0: "", 1: ""}, {0: 0, 1: 0}
    events = [
        json.loads(event[6:]) for event in unchunk(received.partition(b"\r\n\r\n")[2]).decode().split("\n\n")[:-2]
    ]
    for choice in (event["choices"][0] for event in events):
        text[choice["index"]] += choice["delta"].get("content", "")
        num_logprobs[choice["index"]] += len(choice["logprobs"]["content"]) if choice["logprobs"] else 0
    assert text == {choice["index"]: choice["message"]["content"] for choice in whole["choices"]}
    assert num_logprobs == {0: 2000, 1: 2000}
    # The last send took what had waited: a step's tokens are no longer one event.
    assert len(events) < 3000
    assert stack.gateway_metric("stepwire_gateway_sse_sends_total") - sends < 1500


def request_head(path: str, content: bytes, *lines: str) -> bytes:
    """A POST's request line and headers."""
    head = [
        f"POST {path} HTTP/1.1",
        "Host: gateway",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    ]
    return "\r\n".join([*head, *lines, "", ""]).encode()


def unchunk(raw: bytes) -> bytes:
    """HTTP's chunked encoding undone."""
    body = bytearray()
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        body += raw[:length]
        raw = raw[length + 2 :]
    return bytes(body)


# ---- keys, restarts, shutdown ----


def test_with_a_key_everything_but_probes_is_closed(tiny_model: Path) -> None:
    key = "sk-test"
    closed = (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/metrics"), ("GET", "/x"))
    with (
        Stack(tiny_model, api_key=key, control_plane_flags=["--api-key", key]) as stack,
        httpx.Client(base_url=stack.url, timeout=30) as http,
    ):
        for method, path in closed:
            refused = http.request(method, path, json=BODY if method == "POST" else None)
            assert refused.status_code == 401
            assert error_of(refused)["code"] == "invalid_api_key"
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        assert http.post(CHAT, json=BODY, headers=stack.headers).status_code == 200
        assert http.get("/v1/models/alias/tiny", headers=stack.headers).json()["id"] == "alias/tiny"


def test_a_gateway_whose_key_the_control_plane_refuses(tiny_model: Path) -> None:
    with Stack(
        tiny_model, control_plane_flags=["--api-key", "right"], gateway_flags=["--control-plane-api-key", "right"]
    ) as stack:
        stack.kill("gateway", signal.SIGTERM)
        stack.gateway_flags = ["--control-plane-api-key", "wrong"]
        stack.start("gateway")

        def answers() -> bool:
            try:
                return httpx.get(f"{stack.url}/health").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers, 30, stack.logs)

        def is_refused() -> bool:
            response = httpx.post(f"{stack.url}{CHAT}", json=BODY, timeout=30)
            return response.status_code == 500 and error_of(response)["code"] == "gateway_unauthorized"

        wait_until(is_refused, 10, stack.logs)
        refused = httpx.get(f"{stack.url}/v1/models")
        assert (refused.status_code, refused.headers["x-should-retry"]) == (500, "false")
        assert httpx.get(f"{stack.url}/ready").status_code == 503


def test_a_control_plane_that_restarts(tiny_model: Path) -> None:
    with Stack(tiny_model, worker_flags=["--sim-step-ms", "20"]) as stack:
        client, response = open_stream(stack, ENDLESS)
        lines = response.iter_lines()
        assert data_of(next(lines))
        stack.kill("control_plane")
        events = [json.loads(data) for line in lines if (data := data_of(line)) and data != "[DONE]"]
        client.close()
        assert events[-1]["error"]["code"] == "control_plane_lost"
        assert events[-1]["error"]["type"] == "service_unavailable_error"
        assert httpx.get(f"{stack.url}/health").status_code == 200
        down = httpx.get(f"{stack.url}/ready")
        assert down.status_code == 503
        refused = httpx.post(f"{stack.url}{CHAT}", json=BODY, timeout=30)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert str(stack.directory) not in refused.text + down.text
        stack.start("control_plane")
        stack.wait_ready()
        assert httpx.post(f"{stack.url}{CHAT}", json=BODY, timeout=30).status_code == 200
        assert stack.gateway_metric("stepwire_gateway_control_plane_reconnects_total") == 1


def finish_in_thread(lines: Iterator[str]) -> Callable[[], list[str]]:
    """Read a stream to its end on another thread; the result waits for it."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(lambda: [data for line in lines if (data := data_of(line))])
    return lambda: future.result(60)


def test_sigterm_lets_streams_end_and_refuses_the_rest(tiny_model: Path) -> None:
    with Stack(tiny_model, worker_flags=["--sim-step-ms", "20"]) as stack:
        client, response = open_stream(stack, {**BODY, "max_tokens": 100})
        lines = response.iter_lines()
        assert data_of(next(lines))
        result = finish_in_thread(lines)
        stack.processes["gateway"].send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{stack.url}/ready").status_code == 503, 10, stack.logs)
        assert httpx.get(f"{stack.url}/health").status_code == 200
        refused = httpx.post(f"{stack.url}{CHAT}", json=BODY, timeout=30)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        *events, done = result()
        client.close()
        assert done == "[DONE]"
        assert json.loads(events[-1])["choices"][0]["finish_reason"] == "length"
        assert stack.processes["gateway"].wait(20) == 0


def test_a_drain_that_runs_out_of_time_tells_its_streams(tiny_model: Path) -> None:
    with Stack(tiny_model, worker_flags=["--sim-step-ms", "20"], gateway_flags=["--drain-timeout-s", "0.2"]) as stack:
        client, response = open_stream(stack, ENDLESS)
        lines = response.iter_lines()
        assert data_of(next(lines))
        stack.processes["gateway"].send_signal(signal.SIGTERM)
        *events, done = finish_in_thread(lines)()
        client.close()
        assert done == "[DONE]"
        assert json.loads(events[-1])["error"]["code"] == "draining"
        assert stack.processes["gateway"].wait(20) == 0
        stack.wait_idle()


def test_silent_streams_are_kept_alive(tiny_model: Path) -> None:
    with Stack(
        tiny_model,
        worker_flags=["--sim-step-ms", "1", "--sim-delay-at-step", "4", "--sim-delay-s", "1"],
        gateway_flags=["--sse-keepalive-s", "0.1"],
    ) as stack:
        raw = httpx.post(f"{stack.url}{CHAT}", json={**BODY, "stream": True}, timeout=30).text
        assert raw.count(": keep-alive\n\n") >= 3
        events = [part for part in raw.split("\n\n") if part.startswith("data: {")]
        assert all(json.loads(event[6:])["object"] == "chat.completion.chunk" for event in events)
        assert raw.endswith("data: [DONE]\n\n")


def run_gateway(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("STEPWIRE_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "proto")])
    command = [sys.executable, "-m", "gateway", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_port_in_use_is_one_line_and_code_1(stack: Stack) -> None:
    result = run_gateway("--port", str(stack.port))
    assert result.returncode == 1
    assert result.stderr.strip().count("\n") == 0
    assert f"port {stack.port}" in result.stderr and "--port" in result.stderr


@pytest.mark.parametrize(
    ("flags", "needle"),
    [
        (["--tls-cert", "/no/cert.pem", "--tls-key", "/no/key.pem"], "/no/cert.pem"),
        (["--control-plane-tls-ca", "/no/ca.pem"], "/no/ca.pem"),
    ],
)
def test_missing_tls_files_are_one_line_and_code_1(flags: list[str], needle: str) -> None:
    result = run_gateway("--port", str(free_port()), *flags)
    assert result.returncode == 1
    assert result.stderr.strip().count("\n") == 0
    assert needle in result.stderr


def test_tls_on_both_sides(tiny_model: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    files = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*make.split(), *files], check=True, capture_output=True)
    trust = ssl.create_default_context(cafile=str(cert))
    with Stack(tiny_model, control_plane_flags=["--tls-cert", str(cert), "--tls-key", str(key)]) as stack:
        stack.kill("gateway", signal.SIGTERM)
        port = free_port()
        flags = ["--port", str(port), "--control-plane", stack.grpc_address, "--control-plane-tls-ca", str(cert)]
        flags += ["--tls-cert", str(cert), "--tls-key", str(key)]
        stack.gateway_flags = flags
        stack.start("gateway")

        def is_ready() -> bool:
            try:
                return httpx.get(f"https://127.0.0.1:{port}/ready", verify=trust).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(is_ready, 30, stack.logs)
        answer = httpx.post(f"https://127.0.0.1:{port}{CHAT}", json=BODY, verify=trust, timeout=30)
        assert answer.status_code == 200


def test_a_unix_socket(tiny_model: Path) -> None:
    with Stack(tiny_model) as stack:
        stack.kill("gateway", signal.SIGTERM)
        path = stack.directory / "gateway.sock"
        stack.gateway_flags = ["--uds", str(path)]
        stack.start("gateway")
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://gateway", timeout=30) as http:

            def is_ready() -> bool:
                try:
                    return http.get("/ready").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(is_ready, 30, stack.logs)
            assert http.post(CHAT, json=BODY).status_code == 200
        assert stack.kill("gateway", signal.SIGTERM) == 0
        assert not path.exists()
