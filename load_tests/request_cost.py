"""What a request costs beside its tokens: `python -m load_tests.request_cost`.

256 clients send a prompt of 1,024 token ids over REST, read the streamed answer, and send the next one, against a
simulated worker that takes its time for prompts too. With answers of 1 and of 128 tokens in turns: the CPU of the first
is that of a request, and what the second takes more is that of tokens. One line goes into
load_tests/results/request_cost.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import uvloop

from load_tests.gateway_cost import Services, write_model
from load_tests.process_cpu import idle_cpu_s, read_cpu
from load_tests.results import RESULTS_DIRECTORY, append_result, measurement_facts

SCENARIO = "request_cost"
PROMPT_TOKENS = 1024
_SETTLE_S = 1.5
_VOCAB_SIZE = 4000


class Client(asyncio.Protocol):
    """One connection that is never idle; requests are made beforehand, so that they cost the driver little."""

    def __init__(self, requests: list[bytes], first: int) -> None:
        self._requests = requests
        self._next = first
        self.num_answers = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"0\r\n\r\n"):
            self.num_answers += 1
            self._send()
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"a request was refused: {data!r}")

    def _send(self) -> None:
        self.transport.write(self._requests[self._next % len(self._requests)])  # type: ignore[attr-defined]
        self._next += 1


def make_requests(port: int, num_tokens: int, count: int, seed: int) -> list[bytes]:
    """Prompts of token ids, no two alike."""
    drawn = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = drawn.integers(300, _VOCAB_SIZE, PROMPT_TOKENS).tolist()
        fields = {"prompt": ids, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        body = json.dumps(fields, separators=(",", ":")).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        made.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return made


async def window(services: Services, num_tokens: int, seconds: float, seed: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    requests = make_requests(services.port, num_tokens, 1000, seed)
    clients = [Client(requests, first) for first in range(services.num_streams)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", services.port)  # type: ignore[misc]
    await asyncio.sleep(_SETTLE_S)
    pids = {name: process.pid for name, process in services.processes.items()} | {"driver": os.getpid()}
    begin = {name: read_cpu(pid).total_s for name, pid in pids.items()}
    begun_s, idle_s, answers = time.monotonic(), idle_cpu_s(), sum(client.num_answers for client in clients)
    await asyncio.sleep(seconds)
    used = {name: read_cpu(pid).total_s - begin[name] for name, pid in pids.items()}
    window_s, idle_s = time.monotonic() - begun_s, idle_cpu_s() - idle_s
    answers = sum(client.num_answers for client in clients) - answers
    for client in clients:
        client.transport.abort()  # type: ignore[attr-defined]
    await asyncio.sleep(0.5)
    return {
        "requests_per_s": round(answers / window_s, 1),
        "tokens_per_s": round(answers * num_tokens / window_s),
        "us_per_request": {name: round(seconds / answers * 1e6) for name, seconds in used.items()},
        "busy_share": {name: round(seconds / window_s, 3) for name, seconds in used.items()},
        "others_cores": round((os.cpu_count() or 1) - (idle_s + sum(used.values())) / window_s, 2),
    }


async def measure(services: Services, seconds: float, repeats: int, num_tokens: int) -> dict[str, Any]:
    turns: dict[str, list[dict[str, Any]]] = {"1": [], str(num_tokens): []}
    for turn in range(repeats):
        for answer, windows in turns.items():
            windows.append(await window(services, int(answer), seconds, seed=turn * 2 + len(answer)))
    one, many = ([each["us_per_request"] for each in windows] for windows in turns.values())
    names = one[0].keys()
    return {
        "turns": turns,
        "us_per_request": {name: median(each[name] for each in one) for name in names},
        "us_per_token": {
            name: round(
                (median(each[name] for each in many) - median(each[name] for each in one)) / (num_tokens - 1), 2
            )
            for name in names
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=256, help="requests at one time (default 256)")
    parser.add_argument("--tokens", type=int, default=128, help="length of the longer answers (default 128)")
    parser.add_argument("--step-ms", type=float, default=8.0, help="length of a step without tokens (default 8)")
    parser.add_argument("--token-us", type=float, default=6.0, help="what each token of a step adds (default 6)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a window (default 5)")
    parser.add_argument("--repeats", type=int, default=2, help="windows of each kind, in turns (default 2)")
    parser.add_argument("--label", default="", help="about the machine at that time")
    parser.add_argument("--output", type=Path, default=RESULTS_DIRECTORY / f"{SCENARIO}.jsonl")
    arguments = parser.parse_args()
    facts = measurement_facts(f"load_tests.{SCENARIO}", sys.argv[1:]) | {"scenario": SCENARIO, "label": arguments.label}
    directory = Path(tempfile.mkdtemp(prefix="stepwire-"))
    flags = ("--sim-token-us", str(arguments.token_us), "--sim-max-num-batched-tokens", "4096")
    services = Services(directory, arguments.step_ms, arguments.clients, worker_flags=flags)
    try:
        write_model(directory)
        services.start()
        services.wait_ready()
        numbers = uvloop.run(measure(services, arguments.seconds, arguments.repeats, arguments.tokens))
    finally:
        services.stop()
        shutil.rmtree(directory, ignore_errors=True)
    common = {"prompt_tokens": PROMPT_TOKENS, "step_ms": arguments.step_ms, "token_us": arguments.token_us}
    append_result(arguments.output, facts | common | numbers)
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
