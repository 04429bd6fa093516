"""What the frontend costs a token: mailbox, detokenizer, stop strings and message, without gRPC's own part.

    python -m load_tests.frontend_cost --model DIR [--sequences 256] [--steps 100] [--out FILE.jsonl]

Each step puts one token into every mailbox and then builds and serializes one SessionResponse, as a Session's writer
does when it keeps up; `coalesced` fetches every fourth step only. Prints one JSON line a case: CPU time of the thread
(not of the wall: neighbours do not count), the best of five rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import platform
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import CollectorRegistry
from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import CoreRequest, ModelFacts, OutputSink, SequenceOutput, TokenLogprobs
from control_plane.frontend.metrics import FrontendMetrics
from control_plane.frontend.output_stream import RequestOutput
from control_plane.frontend.request_intake import RequestIntake
from control_plane.frontend.served_model import ServedModel, load_served_model


@dataclass(frozen=True)
class Case:
    name: str
    request: pb.GenerateRequest
    with_tokenizer: bool = True
    steps_per_write: int = 1
    num_logprobs: int | None = None


STOPS = ["</answer>", "\n\nUser:", "Observation:", "END"]
PROMPT = pb.TokenIds(ids=[1, 2, 3])
CASES = [
    Case("text", pb.GenerateRequest(token_ids=PROMPT)),
    Case("text, coalesced 4", pb.GenerateRequest(token_ids=PROMPT), steps_per_write=4),
    Case("text, 4 stop strings", pb.GenerateRequest(token_ids=PROMPT, stop=pb.StopConditions(stop=STOPS))),
    Case("token ids only", pb.GenerateRequest(token_ids=PROMPT), with_tokenizer=False),
    Case("text and token ids", pb.GenerateRequest(token_ids=PROMPT, output=pb.OutputOptions(token_ids=True))),
    Case("text, 5 logprobs", pb.GenerateRequest(token_ids=PROMPT, output=pb.OutputOptions(logprobs=5)), num_logprobs=5),
]


class _Core:
    """Takes every request and does nothing: the outputs come from the loop below."""

    def __init__(self, vocab_size: int) -> None:
        self.facts = ModelFacts("bench", 1 << 20, vocab_size, 20, False)

    def submit(self, request: CoreRequest, sink: OutputSink) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def finish_sequence(self, request_id: str, index: int) -> None: ...


async def measure(
    case: Case, model: ServedModel, text_ids: list[int], num_sequences: int, num_steps: int
) -> dict[str, Any]:
    core = _Core(vocab_size=max(text_ids) + 1)
    ready: list[RequestOutput] = []
    served = model if case.with_tokenizer else ServedModel(("bench",))
    intake = RequestIntake(core, served, FrontendMetrics(CollectorRegistry()), max_preparing=num_sequences + 1)
    outputs = [await intake.submit(case.request, ready.append, tag=tag) for tag in range(num_sequences)]
    take_all(ready)
    logprobs = None
    if case.num_logprobs is not None:
        logprobs = [TokenLogprobs(-0.5, text_ids[: case.num_logprobs], [-0.5] * case.num_logprobs)]
    starts = [random.Random(tag).randrange(len(text_ids)) for tag in range(num_sequences)]
    put_ns = take_ns = num_bytes = 0
    for step in range(num_steps):
        token_ids = [text_ids[(start + step) % len(text_ids)] for start in starts]
        # Made by the scheduler, not by the frontend.
        events = [] if logprobs is None else [SequenceOutput(0, [each], 1, logprobs) for each in token_ids]
        before = time.thread_time_ns()
        if logprobs is None:
            for output, token_id in zip(outputs, token_ids, strict=True):
                output.on_token(0, token_id)
        else:
            for output, event in zip(outputs, events, strict=True):
                output.on_output(event)
        after = time.thread_time_ns()
        put_ns += after - before
        if step % case.steps_per_write == case.steps_per_write - 1:
            num_bytes += take_all(ready)
            take_ns += time.thread_time_ns() - after
    num_tokens = num_steps * num_sequences
    return {
        "case": case.name,
        "sequences": num_sequences,
        "steps": num_steps,
        "put_us_per_token": round(put_ns / num_tokens / 1e3, 3),
        "take_and_serialize_us_per_token": round(take_ns / num_tokens / 1e3, 3),
        "us_per_token": round((put_ns + take_ns) / num_tokens / 1e3, 3),
        "bytes_per_token": round(num_bytes / num_tokens, 1),
    }


def take_all(ready: list[RequestOutput]) -> int:
    """One SessionResponse of everything that is ready; its size."""
    message = pb.SessionResponse()
    now_s = time.monotonic()
    for output in ready:
        tagged = message.responses.add()
        tagged.tag = output.tag
        output.take(tagged.response, now_s)
    ready.clear()
    return len(message.SerializeToString())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory with tokenizer.json")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    arguments = parser.parse_args()
    model = load_served_model(arguments.model)
    if model.tokenizer is None:
        parser.error(f"{arguments.model} has no tokenizer.json")
    text = Path(__file__).read_text() + "Größe, naïve café. 東京は日本の首都です。 Привет! 🙂 " * 20
    machine = {
        "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "command": " ".join(["python -m load_tests.frontend_cost", *sys.argv[1:]]),
    }

    async def run() -> None:
        text_ids = (await model.tokenizer.encode_text(text, add_special_tokens=False)).tolist()
        for case in CASES:
            rounds = [await measure(case, model, text_ids, arguments.sequences, arguments.steps) for _ in range(5)]
            result = min(rounds, key=lambda one: one["us_per_token"])
            line = json.dumps(result | machine)
            print(line)
            if arguments.out is not None:
                with arguments.out.open("a") as file:
                    file.write(line + "\n")

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    asyncio.run(run())


if __name__ == "__main__":
    main()
