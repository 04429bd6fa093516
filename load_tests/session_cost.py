"""One Session, plain and as the gateway has it, against a call per request: `python -m load_tests.session_cost`.

The same requests (token ids in, text out, steps of a simulated worker) are sent all ways, in turns, and CPU a token is
read of the control plane and of this client. `packed` is a Session with `SessionOptions`: texts packed, one message at
a time; `ids` and `packed_ids` are both with token ids beside the text. One line goes into
load_tests/results/session_cost.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import uvloop
from stepwire.v1 import inference_pb2 as pb
from stepwire.v1 import inference_pb2_grpc as pb_grpc

from load_tests.gateway_cost import write_model
from load_tests.process_cpu import idle_cpu_s, read_cpu
from load_tests.results import RESULTS_DIRECTORY, append_result, measurement_facts
from load_tests.stack import ControlPlaneStack

SCENARIO = "session_cost"
_SETTLE_S = 1.0


def endless(index: int, *, with_ids: bool = False) -> pb.GenerateRequest:
    ids = [1 + index, *range(2, 34)]
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        stop=pb.StopConditions(max_tokens=100_000, ignore_eos=True),
        output=pb.OutputOptions(token_ids=with_ids),
    )


class Count:
    num_tokens = 0
    num_ids = 0

    def take(self, response: pb.GenerateResponse) -> None:
        for delta in response.deltas:
            self.num_tokens += delta.num_tokens
            if delta.token_ids:
                self.num_ids += len(list(delta.token_ids))


async def read_session(stub: Any, num_requests: int, count: Count, *, with_ids: bool = False) -> None:
    async def requests() -> AsyncIterator[pb.SessionRequest]:
        for tag in range(1, num_requests + 1):
            yield pb.SessionRequest(tag=tag, generate=pb.SessionGenerate(request=endless(tag, with_ids=with_ids)))
        await asyncio.Event().wait()

    async for message in stub.Session(requests()):
        for tagged in message.responses:
            count.take(tagged.response)


async def read_packed(stub: Any, num_requests: int, count: Count, *, with_ids: bool = False) -> None:
    receipts: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()
    receipt = pb.SessionRequest(receipt=pb.SessionReceipt())

    async def requests() -> AsyncIterator[pb.SessionRequest]:
        options = pb.SessionOptions(packed_texts=True, packed_token_ids=True, max_outstanding_messages=1)
        yield pb.SessionRequest(options=options)
        for tag in range(1, num_requests + 1):
            yield pb.SessionRequest(tag=tag, generate=pb.SessionGenerate(request=endless(tag, with_ids=with_ids)))
        while True:
            yield await receipts.get()

    async for message in stub.Session(requests()):
        for num_tokens in message.texts.num_tokens:
            count.num_tokens += num_tokens
        count.num_ids += len(list(message.token_ids.token_ids))
        for num_tokens in message.token_ids.num_tokens:
            count.num_tokens += num_tokens
        for tagged in message.responses:
            count.take(tagged.response)
        receipts.put_nowait(receipt)


async def read_calls(stub: Any, num_requests: int, count: Count) -> None:
    async def one(index: int) -> None:
        async for response in stub.Generate(endless(index)):
            count.take(response)

    await asyncio.gather(*(one(index) for index in range(num_requests)))


async def window(stack: ControlPlaneStack, way: str, num_requests: int, seconds: float) -> dict[str, float]:
    async with grpc.aio.insecure_channel(stack.grpc_address) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        count = Count()
        read = {
            "session": read_session,
            "packed": read_packed,
            "ids": partial(read_session, with_ids=True),
            "packed_ids": partial(read_packed, with_ids=True),
            "calls": read_calls,
        }[way]
        reading = asyncio.create_task(read(stub, num_requests, count))
        await asyncio.sleep(_SETTLE_S)
        pids = {"control_plane": stack.pids()["control_plane"], "client": os.getpid()}
        begin = {name: read_cpu(pid).total_s for name, pid in pids.items()}
        begun_s, idle_s, begun_tokens = time.monotonic(), idle_cpu_s(), count.num_tokens
        await asyncio.sleep(seconds)
        used = {name: read_cpu(pid).total_s - begin[name] for name, pid in pids.items()}
        window_s, idle_s = time.monotonic() - begun_s, idle_cpu_s() - idle_s
        num_tokens = count.num_tokens - begun_tokens
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    while stack.metric("stepwire_open_requests")[0]:
        await asyncio.sleep(0.05)
    return {
        "tokens_per_s": round(num_tokens / window_s),
        "control_plane_us_per_token": round(used["control_plane"] / num_tokens * 1e6, 2),
        "client_us_per_token": round(used["client"] / num_tokens * 1e6, 2),
        "busy_cores": round((os.cpu_count() or 1) - idle_s / window_s, 2),
    }


async def measure(stack: ControlPlaneStack, num_requests: int, seconds: float, repeats: int) -> dict[str, Any]:
    turns: dict[str, list[dict[str, float]]] = {way: [] for way in ("session", "packed", "ids", "packed_ids", "calls")}
    for _ in range(repeats):
        for way, windows in turns.items():
            windows.append(await window(stack, way, num_requests, seconds))
    numbers: dict[str, Any] = {"num_requests": num_requests, "turns": turns}
    for name in ("control_plane_us_per_token", "client_us_per_token"):
        for way, other in (("calls", "session"), ("packed", "session"), ("packed_ids", "ids")):
            ratios = [one[name] / two[name] for one, two in zip(turns[way], turns[other], strict=True)]
            numbers[f"{way}_over_{other}_{name.partition('_us')[0]}"] = round(median(ratios), 2)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=128, help="requests at one time (default 128)")
    parser.add_argument("--step-ms", type=float, default=20.0, help="length of a step (default 20)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a window (default 4)")
    parser.add_argument("--repeats", type=int, default=3, help="windows of each way, in turns (default 3)")
    parser.add_argument("--label", default="", help="about the machine at that time")
    parser.add_argument("--output", type=Path, default=RESULTS_DIRECTORY / f"{SCENARIO}.jsonl")
    arguments = parser.parse_args()
    facts = measurement_facts(f"load_tests.{SCENARIO}", sys.argv[1:])
    context = ["--sim-max-model-len", "131072", "--sim-num-blocks", "1100000"]
    with contextlib.ExitStack() as on_exit:
        directory = Path(on_exit.enter_context(tempfile.TemporaryDirectory(prefix="stepwire-")))
        write_model(directory)
        model = ["--model", str(directory)]
        worker = ["--sim-step-ms", str(arguments.step_ms), *context, *model]
        stack = on_exit.enter_context(ControlPlaneStack(worker, model))
        numbers = uvloop.run(measure(stack, arguments.requests, arguments.seconds, arguments.repeats))
    result = facts | {"scenario": SCENARIO, "label": arguments.label, "step_ms": arguments.step_ms} | numbers
    append_result(arguments.output, result)
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
