"""What a stream's text costs the gateway's own code: `python -m load_tests.gateway_profile`.

One packed message of a Session is read, put into the mailboxes of so many chat streams, and rendered and written by
their responses in one turn, as `gateway.client` and `gateway.streaming` do it; only the sockets are left out. CPU time
of the thread is read; the median says what it costs beside this machine's other work, the least what without.
One line goes into load_tests/results/gateway_profile.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, cast

import uvloop
from stepwire.v1 import inference_pb2 as pb

from gateway.client import Generation
from gateway.mailbox import Mailbox
from gateway.metrics import GatewayMetrics
from gateway.response_body import ResponseBody
from gateway.sse import ChatChunks, StreamShape
from gateway.streaming import SseResponse, StreamTurns
from load_tests.results import RESULTS_DIRECTORY, append_result, measurement_facts

SCENARIO = "gateway_profile"


class _Unconnected:
    """A `ResponseBody` whose bytes go nowhere."""

    may_write = True

    def write(self, data: bytes) -> None:
        pass


class _Streams:
    """Streams that have begun, at a client that knows them by their tags."""

    def __init__(self, num_streams: int) -> None:
        self.turns = StreamTurns(cast(GatewayMetrics, self))
        self.mailboxes: dict[int, Mailbox] = {}
        for tag in range(1, num_streams + 1):
            mailbox = self.mailboxes[tag] = Mailbox(1, 1, stream=True)
            generation = Generation(mailbox, range(tag, tag + 1), {}, cast(Any, None))
            chunks = ChatChunks(StreamShape(f"chatcmpl-{tag:032x}", 1_700_000_000, "model"), mailbox.prompts)
            response = SseResponse(generation, chunks, self.turns, 0, "request")
            response._body = cast(ResponseBody, _Unconnected())
            response._ended = asyncio.get_running_loop().create_future()
            mailbox.on_news = response._be_due

    def count_streamed(self, num_events: int, num_bytes: int, num_sends: int) -> None:
        """As `GatewayMetrics` has it."""

    def read(self, data: bytes) -> None:
        texts = pb.SessionResponse.FromString(data).texts
        for tag, text, num_tokens in zip(texts.tags, texts.texts, texts.num_tokens, strict=True):
            mailbox = self.mailboxes.get(tag)
            if mailbox is not None:
                mailbox.put_text(0, text, num_tokens)


async def measure(num_streams: int, num_messages: int) -> dict[str, Any]:
    streams = _Streams(num_streams)
    message = pb.SessionResponse()
    message.texts.tags.extend(streams.mailboxes)
    message.texts.texts.extend(f" word{tag}" for tag in streams.mailboxes)
    message.texts.num_tokens.extend([1] * num_streams)
    data, clock = message.SerializeToString(), time.thread_time_ns
    read_us, write_us = [], []
    for _ in range(num_messages):
        begin = clock()
        streams.read(data)
        middle = clock()
        streams.turns._write_all()
        end = clock()
        read_us.append((middle - begin) / num_streams / 1e3)
        write_us.append((end - middle) / num_streams / 1e3)
    both = [sum(parts) for parts in zip(read_us, write_us, strict=True)]
    parts = (("read", read_us), ("write", write_us), ("both", both))
    return {"us_per_event": {name: {"least": min(us), "median": median(us)} for name, us in parts}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256, help="streams in a message (default 256)")
    parser.add_argument("--messages", type=int, default=500, help="messages to measure (default 500)")
    parser.add_argument("--label", default="", help="about the machine at that time")
    parser.add_argument("--output", type=Path, default=RESULTS_DIRECTORY / f"{SCENARIO}.jsonl")
    arguments = parser.parse_args()
    facts = measurement_facts(f"load_tests.{SCENARIO}", sys.argv[1:])
    # The gateway's own settings, from its main function.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    numbers = uvloop.run(measure(arguments.streams, arguments.messages))
    rounded = json.loads(json.dumps(numbers), parse_float=lambda text: round(float(text), 2))
    result = facts | {"scenario": SCENARIO, "label": arguments.label, "num_streams": arguments.streams} | rounded
    append_result(arguments.output, result)
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
