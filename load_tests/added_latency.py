"""What gateway and control plane add to a token's way, and to the first one's: `python -m load_tests.added_latency`.

`streams`: 256 SSE chats at steps of 5 ms, against a simulated worker whose tokens say when they were made
(`load_tests.stamping_worker`). Added is what passes from then until the client has the event: the worker's gRPC,
control plane, gateway, two sockets, and the driver's own queue.
`first_byte`: one request at a time with a prompt of 1,024 tokens, all different: as a chat over REST, with a real
tokenizer and template, and as token ids straight to the control plane. `--words invented`: no word comes twice, so that
nothing of a tokenizer's or the frontend's memory of words helps. Added by gateway and frontend is the difference
of the two times to the first token; core, worker and the step are in both.

Both go into load_tests/results/added_latency.jsonl with the CPU that others used meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import uvloop
from stepwire.v1 import inference_pb2, inference_pb2_grpc
from tokenizers import Tokenizer

from load_tests.gateway_cost import MAX_MODEL_LEN, WARM_UP_S, Services
from load_tests.process_cpu import idle_cpu_s, read_cpu
from load_tests.results import RESULTS_DIRECTORY, append_result, measurement_facts
from load_tests.stamping_worker import write_stamp_model
from load_tests.timed_streams import TimedStream, chat_request, open_streams

SCENARIO = "added_latency"
PROMPT_TOKENS = 1024
GOAL_TOKENS_PER_S = 20_000
GOAL_STREAM_P99_MS = 20.0
GOAL_FIRST_BYTE_P50_MS = 5.0


@contextlib.contextmanager
def running(
    write_model: Callable[[Path], None],
    step_ms: float,
    num_streams: int,
    worker_module: str,
    gateway_flags: tuple[str, ...] = (),
) -> Iterator[Services]:
    directory = Path(tempfile.mkdtemp(prefix="stepwire-"))
    services = Services(directory, step_ms, num_streams, worker_module, gateway_flags=gateway_flags)
    try:
        write_model(directory)
        services.start()
        services.wait_ready()
        yield services
    finally:
        services.stop()
        shutil.rmtree(directory, ignore_errors=True)


def measure_streams(services: Services, seconds: float, driver_processes: int) -> dict[str, Any]:
    request = chat_request(services.port, "Say something long.", MAX_MODEL_LEN - 256)
    with open_streams(services.port, request, services.num_streams, driver_processes) as readers:
        time.sleep(WARM_UP_S)
        pids = {name: [process.pid] for name, process in services.processes.items()} | {"driver": readers.pids}
        begin_ns, idle_s = time.monotonic_ns(), idle_cpu_s()
        begin_cpu = {name: _cpu_s(each) for name, each in pids.items()}
        time.sleep(seconds)
        cpu_s = {name: _cpu_s(each) - begin_cpu[name] for name, each in pids.items()}
        end_ns, idle_s = time.monotonic_ns(), idle_cpu_s() - idle_s
        received = readers.received(begin_ns, end_ns)

    window_s = (end_ns - begin_ns) / 1e9
    num_tokens = len(received.delays_ms)
    others = (os.cpu_count() or 1) - (idle_s + sum(cpu_s.values())) / window_s
    return {
        "tokens_per_s": round(num_tokens / window_s),
        "tokens_per_read": round(num_tokens / received.num_reads, 3),
        "added_ms": spread(received.delays_ms),
        "cpu_us_per_token": {name: round(seconds / num_tokens * 1e6, 2) for name, seconds in cpu_s.items()},
        "cores": {name: round(seconds / window_s, 2) for name, seconds in cpu_s.items()},
        "others_cores": round(others, 3),
    }


def _cpu_s(pids: list[int]) -> float:
    """Of processes and those that they have started."""
    children = [child.pid for pid in pids for child in psutil.Process(pid).children()]
    return sum(read_cpu(each).total_s for each in [*pids, *children])


def spread(values: list[float] | np.ndarray) -> dict[str, float]:
    points = np.percentile(values, (50, 90, 99, 99.9))
    return {name: round(float(point), 2) for name, point in zip(("p50", "p90", "p99", "p999"), points, strict=True)}


def prompts(tokenizer: Tokenizer, count: int, words: str) -> list[str]:
    """Texts of words of about `PROMPT_TOKENS` tokens each, no two of which begin alike.

    `words`: "met" draws from one vocabulary, of which the server soon knows all; "invented" puts halves of such words
    together, and no word comes twice.
    """
    drawn = random.Random(7)
    met = [word for word in Path(__file__).with_name("NOTES.md").read_text().split() if word.isalpha()]
    invented = _invented_words(met, drawn)
    found = []
    for _ in range(count):
        text = " ".join(drawn.choice(met) if words == "met" else next(invented) for _ in range(PROMPT_TOKENS * 2))
        found.append(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids[:PROMPT_TOKENS]))
    return found


def _invented_words(met: list[str], drawn: random.Random) -> Iterator[str]:
    """Words that are in nobody's text: a beginning, a middle and an end of three words in use."""
    parts = sorted({word.lower() for word in met if len(word) > 4})
    seen = set(met)
    while True:
        beginning, middle, end = drawn.choices(parts, k=3)
        word = beginning[: drawn.randint(2, 4)] + middle[1 : drawn.randint(2, 5)] + end[-drawn.randint(2, 4) :]
        if word not in seen:
            seen.add(word)
            yield word


async def measure_first_bytes(services: Services, texts: list[str]) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    over_rest, as_ids = [], []
    # CPU of gateway and control plane; others' load does not count there.
    cpu_s = {"over_rest": 0.0, "token_ids": 0.0}
    idle_s, begun_s, own_s = idle_cpu_s(), time.monotonic(), _service_cpu_s(services)
    drawn = np.random.default_rng(7)
    async with grpc.aio.insecure_channel(f"unix:{services.directory}/control_plane.sock") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        for text in texts:
            stream = TimedStream(b"")
            await loop.create_connection(lambda stream=stream: stream, "127.0.0.1", services.port)  # type: ignore[misc]
            request = chat_request(services.port, text, 1)
            sent_ns, begin_s = time.monotonic_ns(), _frontend_cpu_s(services)
            stream.transport.write(request)  # type: ignore[attr-defined]
            await stream.ended.wait()
            over_rest.append((_first_token_ns(stream) - sent_ns) / 1e6)
            stream.transport.abort()  # type: ignore[attr-defined]
            await asyncio.sleep(0.02)
            between_s = _frontend_cpu_s(services)
            as_ids.append(await _first_token_of_ids_ms(stub, drawn.integers(100, 10_000, PROMPT_TOKENS).tolist()))
            await asyncio.sleep(0.02)
            cpu_s["over_rest"] += between_s - begin_s
            cpu_s["token_ids"] += _frontend_cpu_s(services) - between_s
    window_s = time.monotonic() - begun_s
    used_s = _service_cpu_s(services) - own_s
    others = (os.cpu_count() or 1) - (idle_cpu_s() - idle_s + used_s) / window_s
    rest, ids = spread(over_rest), spread(as_ids)
    return {
        "num_requests": len(texts),
        "over_rest_ms": rest,
        "token_ids_ms": ids,
        "added_p50_ms": round(rest["p50"] - ids["p50"], 2),
        "cpu_ms": {name: round(seconds / len(texts) * 1e3, 2) for name, seconds in cpu_s.items()},
        "others_cores": round(others, 3),
    }


async def _first_token_of_ids_ms(stub: Any, ids: list[int]) -> float:
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=ids), stop=inference_pb2.StopConditions(max_tokens=1, ignore_eos=True)
    )
    sent_ns, first_ns = time.monotonic_ns(), 0
    async for response in stub.Generate(request):
        if response.deltas and not first_ns:
            first_ns = time.monotonic_ns()
    return (first_ns - sent_ns) / 1e6


def _first_token_ns(stream: TimedStream) -> int:
    """When the first event after the one with the role came, in whatever piece."""
    events = 0
    for at_ns, data in stream.received:
        events += data.count(b"data: {")
        if events > 1:
            return at_ns
    raise SystemExit(f"a stream was refused: {stream.received}")


def _frontend_cpu_s(services: Services) -> float:
    return sum(read_cpu(services.processes[name].pid).total_s for name in ("gateway", "control_plane"))


def _service_cpu_s(services: Services) -> float:
    pids = [process.pid for process in services.processes.values()]
    return sum(read_cpu(pid).total_s for pid in [*pids, os.getpid()])


def copied_from(model: Path) -> Callable[[Path], None]:
    """What the services read of a model that is served by the simulated worker: no weights."""

    def copy(directory: Path) -> None:
        for file in sorted(model.glob("*.json")) + sorted(model.glob("*.jinja")):
            shutil.copy(file, directory)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": MAX_MODEL_LEN}))

    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=["streams", "first_byte"], help="streams, first_byte or both")
    parser.add_argument("--streams", type=int, default=256, help="streams at one time (default 256)")
    parser.add_argument("--gateway-processes", type=int, default=1, help="processes of the gateway (default 1)")
    parser.add_argument("--driver-processes", type=int, default=1, help="processes that read streams (default 1)")
    parser.add_argument("--step-ms", type=float, default=5.0, help="length of a step (default 5)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the window (default 10)")
    parser.add_argument("--requests", type=int, default=200, help="first bytes to measure (default 200)")
    parser.add_argument(
        "--words", choices=("met", "invented"), default="met", help="prompts of first_byte (default met)"
    )
    parser.add_argument("--model", type=Path, help="directory of a model with tokenizer and template, for first_byte")
    parser.add_argument("--label", default="", help="about the machine at that time")
    parser.add_argument("--output", type=Path, default=RESULTS_DIRECTORY / f"{SCENARIO}.jsonl")
    arguments = parser.parse_args()
    facts = measurement_facts(f"load_tests.{SCENARIO}", sys.argv[1:]) | {"scenario": SCENARIO, "label": arguments.label}
    common = {"step_ms": arguments.step_ms}
    for section in arguments.sections:
        if section == "streams":
            stamped = running(
                lambda directory: write_stamp_model(directory, MAX_MODEL_LEN),
                arguments.step_ms,
                arguments.streams,
                "load_tests.stamping_worker",
                ("--gateway-processes", str(arguments.gateway_processes)),
            )
            with stamped as services:
                numbers = measure_streams(services, arguments.seconds, arguments.driver_processes)
            numbers |= {"num_streams": arguments.streams, "gateway_processes": arguments.gateway_processes}
            numbers |= {"driver_processes": arguments.driver_processes}
            numbers |= {"goal_tokens_per_s": GOAL_TOKENS_PER_S, "goal_added_p99_ms": GOAL_STREAM_P99_MS}
        else:
            model: Path = arguments.model
            texts = prompts(Tokenizer.from_file(str(model / "tokenizer.json")), arguments.requests, arguments.words)
            with running(copied_from(model), arguments.step_ms, 16, "gpu_worker") as services:
                uvloop.run(measure_first_bytes(services, texts[:10]))
                numbers = uvloop.run(measure_first_bytes(services, texts[10:]))
            numbers |= {"prompt_tokens": PROMPT_TOKENS, "words": arguments.words}
            numbers |= {"goal_added_p50_ms": GOAL_FIRST_BYTE_P50_MS}
        result = facts | {"part": section} | common | numbers
        append_result(arguments.output, result)
        print(json.dumps({"part": section, **common, **numbers}), flush=True)


if __name__ == "__main__":
    main()
