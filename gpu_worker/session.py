"""One RunSteps stream: reads steps and masks, writes results. Everything here runs on the gRPC event loop.

Exactly one task reads and one writes for the life of the stream: a second write in flight ends a gRPC stream, and so
does a read that is given up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from grpc.aio import EOF  # type: ignore[attr-defined]  # the stubs lack it
from stepwire.v1 import worker_pb2

from gpu_worker.recording import Recorder
from gpu_worker.runner_api import SessionEnded, StepBatch, StepError, TokenMask, UInt32Array, WorkerFacts
from gpu_worker.step_codec import decode_mask, decode_step

logger = structlog.get_logger(__name__)

# A control plane has two steps in flight, or a few. One that sends without waiting is told so before it fills memory.
MAX_UNANSWERED_STEPS = 64
# How long a result that is being written may hold up the end of its stream.
_LAST_WRITE_TIMEOUT_S = 1.0

StreamContext = grpc.aio.ServicerContext[worker_pb2.RunStepsRequest, worker_pb2.RunStepsResponse]


@dataclass(frozen=True, slots=True)
class QueuedStep:
    """A step on its way to the main thread."""

    session: Session
    batch: StepBatch
    arrived_ns: int  # of time.monotonic_ns
    mask: Future[TokenMask] | None

    def wait_for_mask(self) -> TokenMask:
        """Block until the mask has come. Raises `SessionEnded` if it will not."""
        if self.mask is None:
            raise RuntimeError(f"step {self.batch.step_id} has no mask_rows: no mask will come")
        return self.mask.result()


class Session:
    """The life of a stream after its hello. `is_over` may be read on any thread."""

    def __init__(
        self,
        hello: worker_pb2.SessionHello,
        facts: WorkerFacts,
        submit: Callable[[QueuedStep], None],
        recorder: Recorder | None = None,
    ) -> None:
        self._recorder = recorder
        self.session_id = hello.session_id
        self._understands_leaving = hello.understands_leaving
        self._is_ready = False
        self.is_over = False
        self.finished = asyncio.Event()  # the stream is closed
        self._facts = facts
        self._submit = submit
        self._end: asyncio.Future[tuple[grpc.StatusCode, str]] = asyncio.get_running_loop().create_future()
        self._outbox: asyncio.Queue[worker_pb2.RunStepsResponse | None] = asyncio.Queue()
        self._next_step_id = 1
        self._num_unanswered = 0
        self._masks: dict[int, tuple[UInt32Array, Future[TokenMask]]] = {}
        self._last_status: tuple[grpc.StatusCode, str] | None = None

    def end(self, code: grpc.StatusCode, message: str) -> None:
        """Close the stream with this status; only the first call counts. Steps that are still queued are discarded."""
        if self.is_over:
            return
        self.is_over = True
        for _, mask in self._masks.values():
            mask.set_exception(SessionEnded(message))
        self._masks.clear()
        self._outbox.put_nowait(None)
        self._end.set_result((code, message))

    def leave(self, message: str, serves_for_s: float) -> None:
        """The worker is told to end: say so, and go on until the control plane has closed the stream.

        One that does not understand, or waits for its session to begin, is refused more steps.
        """
        if not self._understands_leaving or not self._is_ready:
            self.end_when_answered(grpc.StatusCode.UNAVAILABLE, message)
        elif not self.is_over:
            leaving = worker_pb2.SessionLeaving(serves_for_ns=int(serves_for_s * 1e9), reason=message)
            self._outbox.put_nowait(worker_pb2.RunStepsResponse(leaving=leaving))

    def end_when_answered(self, code: grpc.StatusCode, message: str) -> None:
        """Take no more steps, and close the stream once those that were taken are answered."""
        if self._last_status is None:
            self._last_status = (code, message)
        self._end_if_answered()

    def deliver(self, response: worker_pb2.RunStepsResponse) -> None:
        """Send a step's result."""
        if not self.is_over:
            if self._recorder is not None:
                self._recorder.result(response.result)
            self._outbox.put_nowait(response)

    async def run(self, context: StreamContext, wait_until_ready: asyncio.Future[str]) -> None:
        """Serve the stream until it ends; `wait_until_ready` gives the instance id once the runner is reset."""
        try:
            either: set[asyncio.Future[Any]] = {wait_until_ready, self._end}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not self.is_over:
                instance_id = wait_until_ready.result()
                ready = worker_pb2.SessionReady(session_id=self.session_id, instance_id=instance_id)
                # From the write's beginning on: steps may be on their way before it has ended.
                self._is_ready = True
                await context.write(worker_pb2.RunStepsResponse(ready=ready))
                await self._serve(context)
            code, message = self._end.result()
            if code is not grpc.StatusCode.OK:
                await context.abort(code, message)
        finally:
            # Where the client is gone this coroutine is cancelled, and nobody hears the status.
            self.end(grpc.StatusCode.CANCELLED, "the client closed the stream")
            self.finished.set()

    async def _serve(self, context: StreamContext) -> None:
        reader = asyncio.create_task(self._read(context), name=f"read {self.session_id}")
        writer = asyncio.create_task(self._write(context), name=f"write {self.session_id}")
        try:
            either: set[asyncio.Future[Any]] = {self._end, writer}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({writer}, timeout=_LAST_WRITE_TIMEOUT_S)
            if not self.is_over:
                # The writer ended by itself: nothing can be sent any more.
                self.end(grpc.StatusCode.UNAVAILABLE, "a result could not be written")
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self, context: StreamContext) -> None:
        try:
            while (message := await context.read()) is not EOF:
                self._take(message, time.monotonic_ns())
            self.end_when_answered(grpc.StatusCode.OK, "")
        except StepError as error:
            logger.warning("session refused", session_id=self.session_id, reason=str(error))
            self.end(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Exception as error:
            logger.exception("session failed", session_id=self.session_id)
            self.end(grpc.StatusCode.INTERNAL, f"the worker could not read the stream: {type(error).__name__}")

    def _take(self, message: worker_pb2.RunStepsRequest, arrived_ns: int) -> None:
        if self.is_over:
            return
        kind = message.WhichOneof("message")
        if kind == "step":
            if self._last_status is None:
                self._take_step(message.step, arrived_ns)
        elif kind == "mask":
            self._take_mask(message.mask)
        elif kind == "hello":
            raise StepError("a second hello in one stream: open a new stream for a new session")
        else:
            raise StepError("a message that is neither hello, step nor mask: does this worker speak an older contract?")

    def _take_step(self, message: worker_pb2.StepBatch, arrived_ns: int) -> None:
        if message.step_id != self._next_step_id:
            raise StepError(
                f"step_id is {message.step_id}, and {self._next_step_id} is the next: step ids are contiguous"
            )
        if self._num_unanswered >= MAX_UNANSWERED_STEPS:
            text = f"step {message.step_id} comes while {MAX_UNANSWERED_STEPS} steps are unanswered: wait for results"
            self.end(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            return
        try:
            batch = decode_step(message, self._facts)
        except StepError as error:
            raise StepError(f"step {message.step_id}: {error}") from error
        mask: Future[TokenMask] | None = None
        if len(batch.mask_rows):
            mask = Future()
            self._masks[batch.step_id] = (batch.mask_rows, mask)
        if self._recorder is not None:
            self._recorder.step(message)
        self._next_step_id += 1
        self._num_unanswered += 1
        logger.debug("step queued", step_id=batch.step_id, num_runs=len(batch.run_rows), num_tokens=batch.num_tokens)
        self._submit(QueuedStep(self, batch, arrived_ns, mask))

    def _take_mask(self, message: worker_pb2.TokenMask) -> None:
        waiting = self._masks.get(message.step_id)
        if waiting is None:
            if self._last_status is not None and message.step_id >= self._next_step_id:
                return  # of a step that was not taken any more
            raise StepError(
                f"TokenMask for step {message.step_id}, which does not wait for one: a mask follows its step,"
                f" once (next step_id is {self._next_step_id})"
            )
        mask_rows, mask = waiting
        decoded = decode_mask(message, mask_rows, self._facts.vocab_size)
        if self._recorder is not None:
            self._recorder.mask(message)
        del self._masks[message.step_id]
        mask.set_result(decoded)

    async def _write(self, context: StreamContext) -> None:
        while (response := await self._outbox.get()) is not None:
            await context.write(response)
            self._num_unanswered -= response.WhichOneof("message") == "result"
            self._end_if_answered()

    def _end_if_answered(self) -> None:
        if self._last_status is not None and self._num_unanswered == 0:
            self.end(*self._last_status)
