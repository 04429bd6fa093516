"""One Session stream: many requests of one client, all their outputs of a step in one message.

One task reads, one task writes (two concurrent writes would end the stream). The writer wakes when a mailbox has
something, takes all that have, and awaits the write: while the client is slow to read, the mailboxes collect. A client
may bound the messages that it has not dealt with (`SessionOptions`): what would wait in buffers between the two, and be
late one message behind the other, then grows together in the mailboxes as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable

import grpc.aio
import structlog
from stepwire.process.traces import traced, traceparent_of
from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend.errors import RequestRefused, Violation, deadline_exceeded, to_request_error
from control_plane.frontend.output_stream import RequestOutput
from control_plane.frontend.packed_texts import PackedTexts
from control_plane.frontend.request_intake import RequestIntake

log = structlog.get_logger(__name__)


# Logprobs make messages large; beyond this the rest goes into the next message (the limit of one is 64 MiB).
_MESSAGE_BYTES = 4 * 2**20


class _Entry:
    """A running tag. `output` is None while the request is being prepared."""

    __slots__ = ("output", "task", "timer")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.output: RequestOutput | None = None
        self.timer: asyncio.TimerHandle | None = None


class SessionStream:
    def __init__(
        self, intake: RequestIntake, context: grpc.aio.ServicerContext[pb.SessionRequest, pb.SessionResponse]
    ) -> None:
        self._intake = intake
        self._context = context
        self._traceparent = traceparent_of(context.invocation_metadata())
        self._loop = asyncio.get_running_loop()
        self._entries: dict[int, _Entry] = {}
        self._ready: list[RequestOutput] = []
        self._refused: list[tuple[int, RequestRefused]] = []
        self._wake = asyncio.Event()
        self._packed = PackedTexts(intake.metrics, self._wake.set)
        self._max_outstanding = 0  # 0: no limit
        self._num_outstanding = 0

    async def run(self, requests: AsyncIterable[pb.SessionRequest]) -> None:
        """Serve until the client ends the stream or goes away; then nothing of it runs on."""
        metrics = self._intake.metrics
        metrics.num_open_sessions += 1
        reader = asyncio.create_task(self._read(requests))
        reader.add_done_callback(lambda _: self._wake.set())
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                # A step that a new request is part of is written first: the worker waits for it, and nobody for this.
                await asyncio.sleep(0)
                while (self._ready or self._refused or self._packed.has_any()) and self._may_write():
                    self._num_outstanding += 1
                    await self._context.write(self._collect())
                if reader.done():
                    break
            await reader
        finally:
            metrics.num_open_sessions -= 1
            reader.cancel()
            for tag in list(self._entries):
                self._drop(tag)

    # ---- in ----

    async def _read(self, requests: AsyncIterable[pb.SessionRequest]) -> None:
        async for message in requests:
            match message.WhichOneof("action"):
                case "generate":
                    self._generate(message.tag, message.generate)
                case "cancel":
                    self._drop(message.tag)
                case "receipt":
                    self._num_outstanding -= 1
                    self._wake.set()
                case "options":
                    self._packed.texts.is_wanted = message.options.packed_texts
                    self._packed.token_ids.is_wanted = message.options.packed_token_ids
                    self._max_outstanding = message.options.max_outstanding_messages
                case _:
                    description = "is missing: give generate, cancel, options or receipt"
                    self._refuse(message.tag, RequestRefused.invalid(Violation("action", description)))

    def _generate(self, tag: int, generate: pb.SessionGenerate) -> None:
        if tag in self._entries:
            # Whose message would be whose? Both end, and the client hears of it once.
            self._drop(tag)
            description = f"{tag} is the tag of a request that was still running; both have ended"
            self._refuse(tag, RequestRefused.invalid(Violation("tag", description)))
            return
        entry = _Entry()
        if generate.HasField("timeout"):
            timeout_s = generate.timeout.seconds + generate.timeout.nanos / 1e9
            if timeout_s <= 0:
                description = f"must be above 0 s, not {timeout_s:g} s"
                self._refuse(tag, RequestRefused.invalid(Violation("timeout", description)))
                return
            entry.timer = self._loop.call_later(timeout_s, self._expire, tag, entry, timeout_s)
        self._entries[tag] = entry
        entry.task = self._loop.create_task(self._submit(tag, entry, generate))

    async def _submit(self, tag: int, entry: _Entry, generate: pb.SessionGenerate) -> None:
        try:
            with traced(generate.traceparent or self._traceparent):
                entry.output = await self._intake.submit(generate.request, self._on_ready, tag=tag, packed=self._packed)
        except RequestRefused as error:
            self._forget(tag)
            self._refuse(tag, error)

    def _expire(self, tag: int, entry: _Entry, timeout_s: float) -> None:
        error = deadline_exceeded(timeout_s)
        if entry.output is not None:
            entry.output.fail(error)
            return
        self._drop(tag)
        self._intake.metrics.count_end(error.code)
        self._refuse(tag, error)

    def _refuse(self, tag: int, error: RequestRefused) -> None:
        self._refused.append((tag, error))
        self._wake.set()

    def _on_ready(self, output: RequestOutput) -> None:
        self._ready.append(output)
        self._wake.set()

    def _drop(self, tag: int) -> None:
        """End a request of which no further word is wanted; unknown tags have ended already."""
        entry = self._forget(tag)
        if entry is None:
            return
        if entry.output is not None:
            entry.output.cancel()
        elif entry.task is not None:
            entry.task.cancel()

    def _forget(self, tag: int) -> _Entry | None:
        entry = self._entries.pop(tag, None)
        if entry is not None and entry.timer is not None:
            entry.timer.cancel()
        return entry

    # ---- out ----

    def _may_write(self) -> bool:
        return not self._max_outstanding or self._num_outstanding < self._max_outstanding

    def _collect(self) -> pb.SessionResponse:
        """One message with all that has come since the last."""
        message = pb.SessionResponse()
        add = message.responses.add
        for tag, error in self._refused:
            tagged = add(tag=tag)
            tagged.response.error.CopyFrom(to_request_error(error))
        self._refused.clear()
        ready, self._ready = self._ready, []
        now_s = time.monotonic()
        self._packed.take(message, now_s)
        num_bytes = 0
        for position, output in enumerate(ready, 1):
            if output.is_closed:  # cancelled since it became ready
                continue
            tagged = add()
            tagged.tag = output.tag
            output.take(tagged.response, now_s)
            if output.is_closed:
                self._forget(output.tag)
            if output.sends_logprobs:
                num_bytes += tagged.ByteSize()
                if num_bytes > _MESSAGE_BYTES:
                    self._ready = ready[position:]
                    break
        return message
