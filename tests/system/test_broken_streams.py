"""Connections that break: cut at any byte, reset, half closed, read slowly or not at all; gRPC calls given up.

Whatever a client does to its own stream, nothing of it is left behind (requests, KV blocks, open streams, log entries),
and a stream of somebody else says at the same time what it says alone.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from stepwire.v1 import inference_pb2 as pb
from stepwire.v1 import inference_pb2_grpc as pb_grpc

from tests.system.conftest import LIMIT_S, ROOT, Stack, wait_until

from .test_openai_raw_http import request_head, unchunk

MESSAGES: list[dict[str, str]] = [{"role": "user", "content": "hi"}]
# Path -> a body that streams, and the name that it gives to the most tokens.
STREAMS: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/chat/completions": ({"messages": MESSAGES}, "max_tokens"),
    "/v1/completions": ({"prompt": "hi"}, "max_tokens"),
    "/v1/responses": ({"input": "hi"}, "max_output_tokens"),
    "/v1/messages": ({"messages": MESSAGES}, "max_tokens"),
}
# The newest two in every run; the others, whose streams take the same road, with the slow tests.
SOME_STREAMS = [
    pytest.param(path, marks=() if path in ("/v1/responses", "/v1/messages") else pytest.mark.slow) for path in STREAMS
]
ENDINGS = ("close", "reset", "half")
NUM_CLIENTS = 8
# With steps of 1 ms longer than any client here stays: half a minute at least.
ENDLESS = 30_000
# For a reader that reads late: more than the sockets on the way can hold.
MUCH = 3500
# A request of a reader that reads late: everything that it makes can be waited for.
LONG = 550


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    data = tmp_path_factory.mktemp("data")
    flags = ["--data-dir", str(data), "--files-max-bytes", "40000000"]
    worker_flags = ["--sim-step-ms", "1", "--sim-max-model-len", "32768"]
    with Stack(tiny_model, worker_flags=worker_flags, gateway_flags=flags) as running:
        yield running


def stream_request(path: str, max_tokens: int, **fields: Any) -> bytes:
    """The bytes of a POST that streams."""
    body, max_name = STREAMS[path]
    whole = {**body, max_name: max_tokens, "seed": 5, "ignore_eos": True, "stream": True, **fields}
    content = json.dumps(whole).encode()
    return request_head(path, content, "Connection: close") + content


@dataclass
class Bystander:
    """Somebody else's stream, again and again beside what a test does; all say the same."""

    stack: Stack

    def __post_init__(self) -> None:
        self.expected = self.read()
        self.answers: list[str] = []
        self.ended = threading.Event()

    def read(self) -> str:
        with closing(socket.create_connection(("127.0.0.1", self.stack.port), timeout=120)) as raw:
            raw.sendall(stream_request("/v1/chat/completions", 150))
            received = b"".join(iter(lambda: raw.recv(65536), b""))
        return text_of(received)

    def go_on(self) -> None:
        self.answers.append(self.read())
        while not self.ended.is_set():
            self.answers.append(self.read())


def text_of(received: bytes) -> str:
    """The text of a chat stream that ended as it should."""
    events = unchunk(received.partition(b"\r\n\r\n")[2]).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], received[-300:]
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


@contextmanager
def undisturbed(stack: Stack) -> Iterator[None]:
    """A bystander reads along; afterwards nothing is left of the broken streams."""
    bystander = Bystander(stack)
    thread = threading.Thread(target=bystander.go_on)
    thread.start()
    try:
        yield
    finally:
        bystander.ended.set()
        thread.join()
    assert bystander.answers and set(bystander.answers) == {bystander.expected}
    assert_nothing_left(stack)


def assert_nothing_left(stack: Stack) -> None:
    stack.wait_idle()
    wait_until(lambda: stack.control_plane_metric("stepwire_open_requests") == 0, LIMIT_S, stack.logs)
    wait_until(lambda: stack.gateway_metric("stepwire_gateway_open_streams") == 0, LIMIT_S, stack.logs)
    wait_until(lambda: httpx.get(f"{stack.url}/load", timeout=LIMIT_S).json()["server_load"] == 0, LIMIT_S, stack.logs)
    assert stack.control_plane_metric("stepwire_open_sessions") == 1
    assert all(process.poll() is None for process in stack.processes.values())
    for log in stack.directory.glob("*.log"):
        assert "Traceback" not in log.read_text(), log.read_text()[-4000:]


def break_off(stack: Stack, request: bytes, num_bytes: int, ending: str) -> bytes:
    """Read so many bytes of the answer, then end the connection; what was read of it."""
    with closing(socket.create_connection(("127.0.0.1", stack.port), timeout=120)) as raw:
        raw.sendall(request)
        received = b""
        while len(received) < num_bytes and (piece := raw.recv(num_bytes - len(received))):
            received += piece
        if ending == "reset":
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif ending == "half":
            raw.shutdown(socket.SHUT_WR)
            # The server takes it for a client that left, and ends the connection.
            while raw.recv(65536):
                pass
    return received


def length_of(stack: Stack, request: bytes) -> int:
    """Bytes of the answer; a little more or less the next time, as steps come together or alone."""
    return len(break_off(stack, request, 1 << 30, "close"))


def break_at(stack: Stack, path: str, positions: range) -> None:
    """Streams of a few tokens, broken at these bytes; the three endings take turns."""
    request = stream_request(path, 4)
    with undisturbed(stack), ThreadPoolExecutor(NUM_CLIENTS) as pool:
        calls = [
            pool.submit(break_off, stack, request, position, ENDINGS[number % len(ENDINGS)])
            for number, position in enumerate(positions)
        ]
        received = [call.result() for call in calls]
    assert all(len(piece) <= position for piece, position in zip(received, positions, strict=True))
    # Those that were cut in the middle have got whole bytes of a good answer up to there.
    assert all(piece.startswith(b"HTTP/1.1 200 "[: len(piece)]) for piece in received)


@pytest.mark.parametrize("path", SOME_STREAMS)
def test_a_stream_may_be_cut_anywhere(served: Stack, path: str) -> None:
    length = length_of(served, stream_request(path, 4))
    break_at(served, path, range(0, length + 40, max(length // 30, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_may_be_cut_at_every_byte(served: Stack, path: str) -> None:
    length = length_of(served, stream_request(path, 4))
    break_at(served, path, range(length + 40))


@pytest.mark.parametrize("path", SOME_STREAMS)
def test_a_stream_that_was_cut_is_cancelled(served: Stack, path: str) -> None:
    """Streams that would go on for long: each one is cancelled, however its connection ended."""
    cancelled = served.control_plane_metric("stepwire_cancelled_requests_total")
    places = random.Random(3).sample(range(6000), 12)
    request = stream_request(path, ENDLESS)
    with undisturbed(served), ThreadPoolExecutor(NUM_CLIENTS) as pool:
        calls = [
            pool.submit(break_off, served, request, place, ENDINGS[number % len(ENDINGS)])
            for number, place in enumerate(places)
        ]
        for call in calls:
            call.result()
    assert served.control_plane_metric("stepwire_cancelled_requests_total") == cancelled + len(places)


# ---- slow readers ----


def read_late(stack: Stack, request: bytes) -> bytes:
    """Send, read nothing until all has been generated, then everything."""
    before = num_long(stack)
    with closing(socket.socket()) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(60)
        raw.connect(("127.0.0.1", stack.port))
        raw.sendall(request)
        wait_until(lambda: num_long(stack) > before, LIMIT_S, stack.logs)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        return b"".join(iter(lambda: raw.recv(65536), b""))


def typed_events(received: bytes) -> list[dict[str, Any]]:
    """Events with names, as /v1/responses and /v1/messages send them."""
    events = unchunk(received.partition(b"\r\n\r\n")[2]).decode().split("\n\n")
    found = []
    for event in events[:-1]:
        name, _, data = event.partition("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def read_response_late(stack: Stack, num_tokens: int, **fields: Any) -> int:
    """Checks that what comes late is complete; the number of its deltas."""
    with undisturbed(stack):
        received = read_late(stack, stream_request("/v1/responses", num_tokens, **fields))
    events = typed_events(received)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "response.incomplete"
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    [message] = events[-1]["response"]["output"]
    assert "".join(deltas) == message["content"][0]["text"]
    assert events[-1]["response"]["usage"]["output_tokens"] == num_tokens
    return len(deltas)


def test_a_slow_reader_of_a_response(served: Stack) -> None:
    read_response_late(served, LONG)


@pytest.mark.slow
def test_what_waits_for_a_slow_reader_of_a_response_grows_together(served: Stack) -> None:
    logprobs = {"include": ["message.output_text.logprobs"], "top_logprobs": 20}
    assert read_response_late(served, MUCH, **logprobs) < MUCH * 3 // 4


@pytest.mark.slow
def test_a_slow_reader_of_a_message(served: Stack) -> None:
    with undisturbed(served):
        received = read_late(served, stream_request("/v1/messages", LONG))
    events = typed_events(received)
    assert events[-1]["type"] == "message_stop"
    assert events[-2]["usage"]["output_tokens"] == LONG and events[-2]["delta"]["stop_reason"] == "max_tokens"


def num_long(stack: Stack) -> float:
    """Requests that ended well after more than 500 tokens: none of the bystander's."""
    name = "stepwire_request_generation_tokens_bucket"
    return stack.control_plane_metric(f'{name}{{le="+Inf"}}') - stack.control_plane_metric(f'{name}{{le="500.0"}}')


@pytest.mark.slow
@pytest.mark.parametrize("path", STREAMS)
def test_readers_that_never_read_hold_no_blocks(served: Stack, path: str) -> None:
    """Several at a time; their requests run to the end, and their connections end when they do."""
    request = stream_request(path, 400, **({"n": 4, "logprobs": True} if path == "/v1/chat/completions" else {}))
    with undisturbed(served):
        connections = []
        for _ in range(NUM_CLIENTS):
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", served.port))
            raw.sendall(request)
            connections.append(raw)
        # Only the bystander's own request may be open.
        wait_until(lambda: served.control_plane_metric("stepwire_open_requests") <= 1, LIMIT_S, served.logs)
        for raw in connections:
            raw.close()


@pytest.mark.slow
def test_files_of_batches_may_be_read_slowly_and_cut(served: Stack) -> None:
    content = b"".join(b'{"line": %d, "filler": "%s"}\n' % (number, b"x" * 900) for number in range(20_000))
    upload = {"file": ("large.jsonl", content)}
    made = httpx.post(f"{served.url}/v1/files", files=upload, data={"purpose": "batch"}, timeout=120).json()
    request = f"GET /v1/files/{made['id']}/content HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n".encode()
    with undisturbed(served):
        for number, place in enumerate([0, 1, 17, 300, 4096, 70_001, 1_000_000, len(content) - 1]):
            for ending in ("close", "reset"):
                break_off(served, request, place + number, ending)
        with closing(socket.socket()) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.settimeout(60)
            raw.connect(("127.0.0.1", served.port))
            raw.sendall(request)
            time.sleep(0.5)  # the server fills what the sockets hold, and waits
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            received = b"".join(iter(lambda: raw.recv(1 << 20), b""))
        assert received.partition(b"\r\n\r\n")[2] == content
    assert httpx.delete(f"{served.url}/v1/files/{made['id']}", timeout=LIMIT_S).json()["deleted"]


def test_an_upload_that_is_cut_leaves_no_file(served: Stack) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{"custom_id": "a"}\r\n--b--\r\n'
    )
    head = (
        b"POST /v1/files HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    with undisturbed(served):
        for number, place in enumerate(range(0, len(body), 9)):
            with closing(socket.create_connection(("127.0.0.1", served.port), timeout=120)) as raw:
                raw.sendall(head + body[:place])
                if number % 2:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert httpx.get(f"{served.url}/v1/files", timeout=LIMIT_S).json()["data"] == []
    with closing(socket.create_connection(("127.0.0.1", served.port), timeout=120)) as raw:
        raw.sendall(head + body)
        assert raw.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_what_waits_for_a_stalled_gateway_grows_together(served: Stack) -> None:
    """Everything is generated while the gateway stands still: it comes in few messages, not in one a step."""
    num_streams, num_tokens = 64, 600
    connections = [socket.create_connection(("127.0.0.1", served.port), timeout=120) for _ in range(num_streams)]
    everything = served.control_plane_metric("stepwire_generation_tokens_total") + num_streams * num_tokens
    with ExitStack() as standing:
        # All of them are accepted before the first step.
        with served.paused():
            for raw in connections:
                raw.sendall(stream_request("/v1/chat/completions", num_tokens))
            begun = [raw.recv(65536) for raw in connections]
            assert all(piece.startswith(b"HTTP/1.1 200 ") for piece in begun)
            sent = served.gateway_metric("stepwire_gateway_sse_events_total")
            standing.enter_context(served.paused("gateway"))
        wait_until(
            lambda: served.control_plane_metric("stepwire_generation_tokens_total") >= everything, LIMIT_S, served.logs
        )
    received = [
        piece + b"".join(iter(lambda raw=raw: raw.recv(65536), b""))  # type: ignore[misc]
        for piece, raw in zip(begun, connections, strict=True)
    ]
    for raw in connections:
        raw.close()
    assert len({text_of(piece) for piece in received}) == 1
    num_events = served.gateway_metric("stepwire_gateway_sse_events_total") - sent
    # What it sent before it stood still, the message in its hands, the next one and the end: as many as a busy machine
    # makes of them, and far from one a token.
    assert num_events < num_streams * num_tokens / 10
    assert_nothing_left(served)


# ---- gRPC ----


def endless_request(max_tokens: int = ENDLESS, **fields: Any) -> pb.GenerateRequest:
    stop = pb.StopConditions(max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(text="hi", stop=stop, sampling=pb.SamplingParams(seed=5), **fields)


def give_up_calls(stack: Stack, num_calls: int, seed: int) -> None:
    """Generate calls that are cancelled before, at or after any message; some by their deadline."""
    drawn = random.Random(seed)
    plans = [(drawn.choice(("time", "messages", "deadline")), drawn.random()) for _ in range(num_calls)]

    def one(plan: tuple[str, float]) -> None:
        kind, share = plan
        call = stub.Generate(endless_request(n=1 + int(share * 3)), timeout=share / 10 if kind == "deadline" else 120)
        try:
            if kind == "time":
                time.sleep(share / 20)
            else:
                limit = int(share * 30) if kind == "messages" else ENDLESS
                for number, _ in enumerate(call):
                    if number >= limit:
                        break
        except grpc.RpcError as error:
            assert kind == "deadline" and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        finally:
            call.cancel()

    with grpc.insecure_channel(stack.grpc_address) as channel, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        stub = pb_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        list(pool.map(one, plans))


def give_up_sessions(stack: Stack, num_sessions: int, seed: int) -> None:
    """Sessions of several requests: some are cancelled one by one, then the stream is half closed or cancelled."""
    drawn = random.Random(seed)
    with grpc.insecure_channel(stack.grpc_address) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        for _ in range(num_sessions):
            requests = SessionRequests()
            call = stub.Session(iter(requests), timeout=120)
            for tag in range(1, 7):
                requests.send(pb.SessionRequest(tag=tag, generate=pb.SessionGenerate(request=endless_request())))
            for _ in range(drawn.randrange(20)):
                next(call)
            for tag in drawn.sample(range(1, 12), 4):
                # Of tags that never were as well.
                requests.send(pb.SessionRequest(tag=tag, cancel=pb.SessionCancel()))
            if drawn.random() < 0.5:
                requests.end()
                for _ in call:
                    pass
                assert call.code() == grpc.StatusCode.OK
            else:
                call.cancel()
                requests.end()


class SessionRequests:
    """What a test sends on a session, as the iterator that gRPC reads from."""

    def __init__(self) -> None:
        self._items: list[pb.SessionRequest | None] = []
        self._condition = threading.Condition()

    def send(self, request: pb.SessionRequest) -> None:
        self._put(request)

    def end(self) -> None:
        self._put(None)

    def _put(self, item: pb.SessionRequest | None) -> None:
        with self._condition:
            self._items.append(item)
            self._condition.notify()

    def __iter__(self) -> Iterator[pb.SessionRequest]:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._items)
                item = self._items.pop(0)
            if item is None:
                return
            yield item


def test_grpc_calls_may_be_given_up_at_any_time(served: Stack) -> None:
    with undisturbed(served):
        give_up_calls(served, 40, seed=1)
        give_up_sessions(served, 6, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 7))
def test_many_grpc_calls_may_be_given_up_at_any_time(served: Stack, seed: int) -> None:
    with undisturbed(served):
        give_up_calls(served, 300, seed)
        give_up_sessions(served, 60, seed)


def test_grpc_clients_that_stop_reading_hold_no_blocks(served: Stack) -> None:
    """More than a window of HTTP/2 comes for each; their requests run to the end and their blocks are free."""
    output = pb.OutputOptions(logprobs=20)
    # A window of its own size is as large as gRPC's estimate of the connection; this one stays small.
    options = [
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 65536),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    drawn = served.control_plane_metric("stepwire_generation_tokens_total")
    with undisturbed(served), grpc.insecure_channel(served.grpc_address, options=options) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        requests = SessionRequests()
        session = stub.Session(iter(requests), timeout=120)
        for tag in range(1, 4):
            message = pb.SessionGenerate(request=endless_request(LONG, output=output))
            requests.send(pb.SessionRequest(tag=tag, generate=message))
        calls = [stub.Generate(endless_request(LONG, output=output), timeout=120) for _ in range(3)]
        # All that they draw, though nobody reads it: their ends are not told of before they are read.
        everything = drawn + 6 * LONG
        wait_until(
            lambda: served.control_plane_metric("stepwire_generation_tokens_total") >= everything, LIMIT_S, served.logs
        )
        wait_until(lambda: served.control_plane_metric("stepwire_requests_running") <= 1, LIMIT_S, served.logs)
        # The first is read after all: it is complete.
        responses = list(calls[0])
        assert responses[-1].usage.num_completion_tokens == LONG
        assert sum(len(delta.logprobs) for response in responses for delta in response.deltas) == LONG
        assert len(responses) < LONG * 3 // 4
        for call in (*calls[1:], session):
            call.cancel()
        requests.end()


KILLED_CLIENT = """
import sys, grpc
from stepwire.v1 import inference_pb2 as pb, inference_pb2_grpc as pb_grpc
stub = pb_grpc.InferenceServiceStub(grpc.insecure_channel(sys.argv[1]))
stop = pb.StopConditions(max_tokens=30000, ignore_eos=True)
calls = [stub.Generate(pb.GenerateRequest(text="hi", stop=stop)) for _ in range(4)]
for responses in zip(*calls):
    print("read", flush=True)
"""


def test_a_grpc_client_that_is_killed(served: Stack) -> None:
    cancelled = served.control_plane_metric("stepwire_cancelled_requests_total")
    command = [sys.executable, "-c", KILLED_CLIENT, served.grpc_address]
    environment = {"PYTHONPATH": str(ROOT / "proto")}
    with undisturbed(served), subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None and client.stdout.readline() == b"read\n"
        client.send_signal(signal.SIGKILL)
        client.wait()
    assert served.control_plane_metric("stepwire_cancelled_requests_total") == cancelled + 4
