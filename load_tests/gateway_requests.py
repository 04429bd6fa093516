"""What a request costs the gateway's own code, beside its tokens: `python -m load_tests.gateway_requests`.

Requests of 1,024 tokens, as a chat and as token ids, are read by the HTTP protocol from what a socket would have given,
pass the application, and are made messages of a Session; three messages of the control plane answer each, and its
stream is written. Only the sockets and gRPC's channel are left out. CPU time of the thread is read, in parts: until the
message is made (what a first token waits for), until the answer's head is written, and the rest. The median says what
it costs beside this machine's other work, the least what without.
One line goes into load_tests/results/gateway_requests.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import json
import pstats
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, cast

import uvicorn
import uvloop
from stepwire.process.logs import set_up_logging
from stepwire.v1 import inference_pb2 as pb
from uvicorn.server import ServerState

from gateway.app import create_app
from gateway.config import parse_settings
from gateway.response_body import BodyWritingProtocol
from load_tests.results import RESULTS_DIRECTORY, append_result, measurement_facts

SCENARIO = "gateway_requests"
PROMPT_TOKENS = 1024
PARTS = ("sent", "head", "answered")
_END = b"0\r\n\r\n"


class _Socket(asyncio.Transport):
    """Takes what is written; `on_write` is called with it."""

    def __init__(self) -> None:
        super().__init__()
        self.on_write: Callable[[bytes], None] = lambda data: None

    def write(self, data: Any) -> None:
        self.on_write(data)

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 40000), "sockname": ("127.0.0.1", 8000)}.get(name, default)

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class _Session:
    """The control plane's end of the client's session."""

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[bytes] = asyncio.Queue()
        self.outgoing: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()

    async def read(self) -> pb.SessionResponse:
        return pb.SessionResponse.FromString(await self.incoming.get())

    async def sent(self) -> pb.SessionRequest:
        """The next request, made what goes over the wire."""
        while True:
            message = await self.outgoing.get()
            if message.HasField("generate"):
                message.SerializeToString()
                return message


def accepted(tag: int) -> bytes:
    message = pb.SessionResponse()
    answer = message.responses.add(tag=tag).response.accepted
    answer.request_id, answer.model, answer.num_prompt_tokens = f"{tag:032x}", "model", PROMPT_TOKENS
    return message.SerializeToString()


def token(tag: int) -> bytes:
    message = pb.SessionResponse()
    message.texts.tags.append(tag)
    message.texts.texts.append(" word")
    message.texts.num_tokens.append(1)
    return message.SerializeToString()


def ended(tag: int) -> bytes:
    message = pb.SessionResponse()
    response = message.responses.add(tag=tag).response
    response.deltas.add(text=" end", num_tokens=1, finish_reason=pb.FINISH_REASON_LENGTH)
    response.usage.num_prompt_tokens, response.usage.num_completion_tokens = PROMPT_TOKENS, 2
    return message.SerializeToString()


def chat_body(drawn: random.Random) -> tuple[str, dict[str, Any]]:
    words = ("".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(PROMPT_TOKENS // 3))
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": " ".join(words)}]}


def completion_body(drawn: random.Random) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": [drawn.randrange(300, 40_000) for _ in range(PROMPT_TOKENS)]}


def as_request(path: str, fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields | {"model": "model", "max_tokens": 2, "stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Bench:
    def __init__(self) -> None:
        settings = parse_settings(["--log-level", "warning", "--control-plane", "unix:/nowhere"])
        set_up_logging(settings)
        self._app = create_app(settings)
        self._session = _Session()
        config = uvicorn.Config(self._app, http=BodyWritingProtocol, ws="none", log_config=None, proxy_headers=False)
        config.load()
        self._protocol = BodyWritingProtocol(config, ServerState(), {}, asyncio.get_running_loop())
        self._socket = _Socket()
        self._protocol.connection_made(self._socket)
        client = self._app.state.client
        client._outgoing = self._session.outgoing
        self._reader = asyncio.create_task(client._read_all(cast(Any, self._session), self._session.outgoing))

    async def request(self, data: bytes) -> tuple[int, ...]:
        """CPU time of each of `PARTS`, in nanoseconds."""
        head, first, last = (asyncio.Event() for _ in range(3))

        def written(piece: bytes) -> None:
            if piece.startswith(b"HTTP/1.1 200"):
                head.set()
            elif b"data: {" in piece:
                first.set()
            if piece.endswith(_END):
                last.set()

        self._socket.on_write = written
        clock = time.thread_time_ns
        begin = clock()
        self._protocol.data_received(data)
        tag = (await self._session.sent()).tag
        sent = clock()
        self._session.incoming.put_nowait(accepted(tag))
        await head.wait()
        begun = clock()
        self._session.incoming.put_nowait(token(tag))
        await first.wait()
        self._session.incoming.put_nowait(ended(tag))
        await last.wait()
        await asyncio.sleep(0)  # the log and the metrics
        return sent - begin, begun - sent, clock() - begun

    def close(self) -> None:
        self._reader.cancel()


async def measure(num_requests: int, profiled: bool) -> dict[str, Any]:
    bench, found = Bench(), {}
    for name, make in (("chat", chat_body), ("token_ids", completion_body)):
        drawn = random.Random(7)
        requests = [as_request(*make(drawn)) for _ in range(num_requests)]
        for request in requests[: num_requests // 10]:
            await bench.request(request)
        profile = cProfile.Profile()
        if profiled:
            profile.enable()
        times = [await bench.request(request) for request in requests]
        if profiled:
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(45)
        parts = dict(zip(PARTS, zip(*times, strict=True), strict=True)) | {"all": [sum(each) for each in times]}
        found[name] = {part: {"least": min(ns) / 1e3, "median": median(ns) / 1e3} for part, ns in parts.items()}
    bench.close()
    return {"us_per_request": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="requests of each kind (default 1000)")
    parser.add_argument("--profile", action="store_true", help="print where the time goes; nothing is recorded")
    parser.add_argument("--label", default="", help="about the machine at that time")
    parser.add_argument("--output", type=Path, default=RESULTS_DIRECTORY / f"{SCENARIO}.jsonl")
    arguments = parser.parse_args()
    facts = measurement_facts(f"load_tests.{SCENARIO}", sys.argv[1:])
    # The gateway's own settings, from its main function.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    numbers = uvloop.run(measure(arguments.requests, arguments.profile))
    rounded = json.loads(json.dumps(numbers), parse_float=lambda text: round(float(text), 1))
    if not arguments.profile:
        append_result(arguments.output, facts | {"scenario": SCENARIO, "label": arguments.label} | rounded)
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
