"""The stack at the level of bytes: framing, statuses, disconnects, overload."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.conftest import LIMIT_S, Stack, wait_until
from tests.system.http_streams import BODY, CHAT, COMPLETIONS, ENDLESS, data_of, error_of, open_stream


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
    with httpx.Client(base_url=stack.url, timeout=120) as client:
        yield client


def events_of(response: httpx.Response) -> list[Any]:
    """The stream's JSON objects; checks the framing down to the last byte."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    raw = response.read().decode("utf-8", errors="strict")
    assert raw.endswith("data: [DONE]\n\n") and raw.count("[DONE]") == 1
    events = raw.split("\n\n")[:-2]
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


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

    with httpx.Client(base_url=stack.url, timeout=120) as http:
        announced = http.post(CHAT, content=b" " * (8 * 2**20 + 1), headers={"content-type": "application/json"})
        assert announced.status_code == 413
        assert str(8 * 2**20) in error_of(announced)["message"]
    # A client that does not say how much is coming, and would never stop.
    with closing(socket.create_connection(("127.0.0.1", stack.port), timeout=120)) as raw:
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
    with closing(socket.create_connection(("127.0.0.1", stack.port), timeout=120)) as raw:
        raw.sendall(request[:cut])
    assert httpx.post(f"{stack.url}{CHAT}", json=BODY, timeout=120).status_code == 200
    stack.wait_idle()


def test_metrics_of_streams(stack: Stack, http: httpx.Client) -> None:
    before = stack.gateway_metric("stepwire_gateway_sse_events_total")
    raw = http.post(CHAT, json={**BODY, "stream": True}).content
    assert stack.gateway_metric("stepwire_gateway_sse_events_total") == before + raw.count(b"data: ")
    stack.wait_streams(0)
    assert stack.gateway_metric("stepwire_gateway_control_plane_connected") == 1
    assert stack.gateway_metric(f'stepwire_gateway_http_requests_total{{code="200",route="{CHAT}"}}') >= 1


# ---- disconnects ----


def test_a_client_that_leaves_a_stream_frees_its_blocks(slow: Stack) -> None:
    cancelled = slow.control_plane_metric("stepwire_cancelled_requests_total")
    client, response = open_stream(slow, ENDLESS)
    lines = response.iter_lines()
    assert data_of(next(lines))
    wait_until(lambda: slow.control_plane_metric("stepwire_kv_blocks_in_use") > 0, LIMIT_S)
    assert slow.gateway_metric("stepwire_gateway_open_streams") == 1
    client.close()
    slow.wait_idle()
    assert slow.control_plane_metric("stepwire_cancelled_requests_total") == cancelled + 1
    slow.wait_streams(0)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_client_that_leaves_a_whole_answer_frees_its_blocks(slow: Stack, path: str) -> None:
    cancelled = slow.control_plane_metric("stepwire_cancelled_requests_total")
    body = {**ENDLESS, "n": 2} if path == CHAT else {"prompt": ["a", "b"], "max_tokens": 3000}
    with closing(socket.create_connection(("127.0.0.1", slow.port), timeout=120)) as raw:
        content = json.dumps(body).encode()
        raw.sendall(request_head(path, content) + content)
        wait_until(lambda: slow.control_plane_metric("stepwire_requests_running") == 2, LIMIT_S, slow.logs)
    slow.wait_idle()
    num_requests = 1 if path == CHAT else 2
    assert slow.control_plane_metric("stepwire_cancelled_requests_total") == cancelled + num_requests
    left = f'stepwire_gateway_http_requests_total{{code="499",route="{path}"}}'
    wait_until(lambda: left in gateway_page(slow) and slow.gateway_metric(left) == 1, LIMIT_S, slow.logs)


def gateway_page(stack: Stack) -> str:
    return httpx.get(f"{stack.url}/metrics", timeout=LIMIT_S).text


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole answer"])
def test_no_step_is_planned_for_a_client_that_has_left(slow: Stack, is_stream: bool) -> None:
    content = json.dumps({**ENDLESS, "stream": is_stream}).encode()
    cancelled = slow.control_plane_metric("stepwire_cancelled_requests_total")
    with closing(socket.create_connection(("127.0.0.1", slow.port), timeout=120)) as raw:
        raw.sendall(request_head(CHAT, content) + content)
        wait_until(lambda: slow.control_plane_metric("stepwire_kv_blocks_in_use") > 0, LIMIT_S, slow.logs)
        # No step ends while it leaves.
        with slow.paused():
            num_answered = slow.control_plane_metric("stepwire_step_tokens_count")
            raw.close()
            slow.wait_for("stepwire_cancelled_requests_total", cancelled + 1)
    slow.wait_idle()
    # What is in flight when it leaves comes to its end; its blocks are free after that and not a step later.
    assert slow.control_plane_metric("stepwire_step_tokens_count") <= num_answered + 2


def test_clients_that_give_up_in_crowds_do_not_hold_up_the_next(slow: Stack) -> None:
    with ThreadPoolExecutor(16) as pool:

        def give_up(_: int) -> None:
            with closing(socket.create_connection(("127.0.0.1", slow.port), timeout=120)) as raw:
                content = json.dumps(ENDLESS).encode()
                raw.sendall(request_head(CHAT, content) + content)

        list(pool.map(give_up, range(200)))
    slow.wait_idle()
    answer = httpx.post(f"{slow.url}{CHAT}", json={**BODY, "max_tokens": 1}, timeout=120)
    assert answer.status_code == 200


# ---- overload and deadlines ----


def test_a_full_queue_is_429_with_a_time_to_retry(slow: Stack) -> None:
    streams = [open_stream(slow, ENDLESS) for _ in range(2)]
    wait_until(lambda: slow.control_plane_metric("stepwire_requests_running") == 2, LIMIT_S, slow.logs)
    streams += [open_stream(slow, ENDLESS) for _ in range(2)]
    try:
        for stream in (False, True):
            refused = httpx.post(f"{slow.url}{CHAT}", json={**BODY, "stream": stream}, timeout=120)
            assert refused.status_code == 429, refused.text
            assert int(refused.headers["retry-after"]) >= 1
            assert error_of(refused)["code"] == "queue_full"
            assert error_of(refused)["type"] == "rate_limit_error"
    finally:
        for client, _ in streams:
            client.close()
    slow.wait_idle()
    assert httpx.post(f"{slow.url}{CHAT}", json={**BODY, "max_tokens": 1}, timeout=120).status_code == 200


def test_timeouts_are_504_or_an_error_on_the_stream(slow: Stack) -> None:
    headers = {"x-request-timeout": "3"}
    whole = httpx.post(f"{slow.url}{CHAT}", json=ENDLESS, headers={"x-request-timeout": "0.5"}, timeout=120)
    assert whole.status_code == 504
    assert error_of(whole)["code"] == "deadline_exceeded"
    streamed = httpx.post(f"{slow.url}{CHAT}", json={**ENDLESS, "stream": True}, headers=headers, timeout=120)
    *rest, last = events_of(streamed)
    assert len(rest) > 2 and all("error" not in event for event in rest)
    assert last["error"]["code"] == "deadline_exceeded" and last["error"]["type"] == "timeout_error"
    wrong = httpx.post(f"{slow.url}{CHAT}", json=BODY, headers={"x-request-timeout": "soon"}, timeout=120)
    assert (wrong.status_code, error_of(wrong)["param"]) == (400, "x-request-timeout")
    slow.wait_idle()


def test_a_slow_reader_gets_everything_in_fewer_pieces(stack: Stack) -> None:
    """A client that reads nothing for a while: what waits for it grows together, and arrives complete."""
    # Some 2 KB a token: more than the sockets on the way can hold.
    body = {**BODY, "max_tokens": 2000, "seed": 3, "n": 2, "ignore_eos": True}
    content = json.dumps({**body, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    sends = stack.gateway_metric("stepwire_gateway_sse_sends_total")
    generated = stack.control_plane_metric("stepwire_generation_tokens_total")
    with closing(socket.socket()) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(60)
        raw.connect(("127.0.0.1", stack.port))
        raw.sendall(request_head(CHAT, content, "Connection: close") + content)
        # Beside it, in the same steps, the same for somebody who reads it all.
        whole = httpx.post(f"{stack.url}{CHAT}", json=body, timeout=120).json()
        everything = generated + 2 * 2 * 2000
        wait_until(
            lambda: stack.control_plane_metric("stepwire_generation_tokens_total") >= everything, LIMIT_S, stack.logs
        )
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
