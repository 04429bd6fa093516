"""Where a control plane's CPU goes in a step, part by part, in this process and without gRPC.

The parts are the production classes, called in the engine's order: read the worker's answer, apply it, plan the next
step, encode it, name the blocks that were filled, publish to the mailboxes, and build the message of packed text that a
gateway's Session would write.
The worker's answer is made up between two steps, outside of the clock. CPU time of the thread is read, so that
neighbours do not count.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry
from stepwire.v1 import inference_pb2 as pb
from stepwire.v1 import worker_pb2

from control_plane.core.metrics import CoreMetrics
from control_plane.core.request import CoreRequest, ModelFacts, OutputSink
from control_plane.core.scheduler import Scheduler
from control_plane.core.scheduler_config import SchedulerConfig
from control_plane.core.step_codec import decode_result, encode_step
from control_plane.core.step_plan import StepPlan
from control_plane.frontend.metrics import FrontendMetrics
from control_plane.frontend.output_stream import RequestOutput
from control_plane.frontend.packed_texts import PackedTexts
from control_plane.frontend.request_intake import RequestIntake
from control_plane.frontend.served_model import load_served_model
from load_tests.gateway_cost import VOCAB_SIZE, write_model
from load_tests.workload import TokenIdSource

CORE_PARTS = ("plan", "encode", "decode", "apply", "share", "metrics")
FRONTEND_PARTS = ("publish", "message")
_BLOCK_SIZE = 16
_STEPS_IN_FLIGHT = 2
# Prompts differ in length by up to a block, so that rows do not all need a new block in the same step.
_PROMPT_LEN = 32


@dataclass(slots=True)
class PartTimes:
    """CPU nanoseconds of each part, summed over `num_steps` steps."""

    num_steps: int = 0
    ns: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*CORE_PARTS, *FRONTEND_PARTS), 0))

    def us_per_step(self) -> dict[str, float]:
        return {part: round(ns / self.num_steps / 1e3, 1) for part, ns in self.ns.items()}


class _InProcessCore:
    """The engine without a worker: an `EngineClient` that is stepped by hand."""

    def __init__(self, num_rows: int, max_model_len: int) -> None:
        blocks_per_row = -(-max_model_len // _BLOCK_SIZE) + 1
        self.facts = ModelFacts("profiled", max_model_len, VOCAB_SIZE, 20, True)
        self.scheduler = Scheduler(
            SchedulerConfig(
                first_block_id=1,
                num_blocks=1 + num_rows * blocks_per_row,
                block_size=_BLOCK_SIZE,
                max_num_seqs=num_rows,
                max_num_batched_tokens=8192,
            )
        )
        self._registry = CollectorRegistry()
        self._metrics = CoreMetrics(self._registry).of_group(0)
        self.frontend_metrics = FrontendMetrics(self._registry)
        self._in_flight: deque[tuple[StepPlan, float]] = deque()
        self._ready: list[RequestOutput] = []
        self.packed = PackedTexts(self.frontend_metrics, lambda: None)
        self.packed.texts.is_wanted = True
        self._rng = np.random.default_rng(0)

    # ---- EngineClient ----

    def submit(self, request: CoreRequest, sink: OutputSink) -> None:
        self.scheduler.add_request(request, time.monotonic()).sink = sink

    def cancel(self, request_id: str) -> None:
        self.scheduler.cancel(request_id)

    def finish_sequence(self, request_id: str, index: int) -> None:
        self.scheduler.finish_sequence(request_id, index)

    # ---- the loop ----

    def on_ready(self, output: RequestOutput) -> None:
        self._ready.append(output)

    def step(self, times: PartTimes) -> None:
        """One turn of the engine: a result comes, the window is filled again, the outputs go out."""
        clock = time.thread_time_ns
        answer = self._answer() if len(self._in_flight) == _STEPS_IN_FLIGHT else None
        marks = [clock()]
        events = None
        if answer is not None:
            plan, sent_s = self._in_flight.popleft()
            result = worker_pb2.RunStepsResponse.FromString(answer).result
            outcome = decode_result(result, plan)
            marks.append(clock())
            events = self.scheduler.apply(outcome)
            marks.append(clock())
        now_s = time.monotonic()
        next_plan = self.scheduler.plan(now_s)
        marks.append(clock())
        if next_plan is not None:
            encode_step(next_plan, ()).SerializeToString()
            self._in_flight.append((next_plan, now_s))
        marks.append(clock())
        self.scheduler.share_computed()
        marks.append(clock())
        if events is None:
            return
        for state, output in events.outputs:
            if state.sink is not None:
                state.sink.on_output(output)
        for sequence, token_id in zip(events.sequences, events.token_ids, strict=True):
            sink = sequence.request.sink
            if sink is not None:
                sink.on_token(sequence.index, token_id)
        marks.append(clock())
        if next_plan is not None:
            self._metrics.note_plan(next_plan, now_s)
        self._metrics.note_result(result.timings, now_s - sent_s)
        marks.append(clock())
        self._message(now_s)
        marks.append(clock())
        parts = ("decode", "apply", "plan", "encode", "share", "publish", "metrics", "message")
        for part, (begin, end) in zip(parts, pairwise(marks), strict=True):
            times.ns[part] += end - begin
        times.num_steps += 1

    def _message(self, now_s: float) -> None:
        """What a Session's writer does when it keeps up: one message a step."""
        message = pb.SessionResponse()
        self.packed.take(message, now_s)
        ready, self._ready = self._ready, []
        for output in ready:
            tagged = message.responses.add()
            tagged.tag = output.tag
            output.take(tagged.response, now_s)
        message.SerializeToString()

    def _answer(self) -> bytes:
        """The oldest step's result, as it comes off the wire."""
        plan = self._in_flight[0][0]
        rows = np.array([row for row, sample in zip(plan.rows, plan.samples, strict=True) if sample], dtype="<u4")
        result = worker_pb2.StepResult(
            step_id=plan.step_id,
            rows=rows.tobytes(),
            offsets=np.arange(len(rows) + 1, dtype="<u4").tobytes(),
            token_ids=self._rng.integers(0, VOCAB_SIZE, len(rows)).astype("<u4").tobytes(),
        )
        return worker_pb2.RunStepsResponse(result=result).SerializeToString()


async def profile_steps(num_rows: int, num_steps: int, generated_before: int = 0) -> dict[str, Any]:
    """Mean CPU microseconds of each part over `num_steps` steps of `num_rows` rows that have `generated_before` tokens.

    Steps without a clock come first: the prompts, and then as many as it takes to get there.
    """
    num_idle = generated_before + num_rows * (_PROMPT_LEN + _BLOCK_SIZE) // 8192 + 8
    max_model_len = _PROMPT_LEN + _BLOCK_SIZE + num_idle + num_steps + 8
    core = _InProcessCore(num_rows, max_model_len)
    with tempfile.TemporaryDirectory(prefix="stepwire-") as directory:
        write_model(Path(directory))
        model = load_served_model(Path(directory))
    intake = RequestIntake(core, model, core.frontend_metrics)
    ids = TokenIdSource(0, VOCAB_SIZE)
    for index in range(num_rows):
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=ids.draw(_PROMPT_LEN + index % _BLOCK_SIZE)),
            stop=pb.StopConditions(max_tokens=num_idle + num_steps + 4, ignore_eos=True),
        )
        await intake.submit(request, core.on_ready, tag=index + 1, packed=core.packed)
    not_counted, times = PartTimes(), PartTimes()
    for _ in range(num_idle):
        core.step(not_counted)
    for _ in range(num_steps):
        core.step(times)
    parts = times.us_per_step()
    return {
        "num_rows": num_rows,
        "generated_before": generated_before,
        "num_steps": times.num_steps,
        "us_per_step": parts,
        "core_us": round(sum(parts[part] for part in CORE_PARTS), 1),
        "frontend_us": round(sum(parts[part] for part in FRONTEND_PARTS), 1),
    }


def profile(num_rows: int, num_steps: int, generated_before: int = 0) -> dict[str, Any]:
    # The control plane's own settings, from its main function: they are worth a quarter of the core at 512 rows.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    return asyncio.run(profile_steps(num_rows, num_steps, generated_before))
