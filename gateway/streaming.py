"""Answers as server-sent events.

All streams that one message of the session has brought something for are written in one turn of the event loop, by
plain calls: no task wakes for a token. A stream is written all that has come for it since its last write, so that
deltas which a gateway or a client is too slow for travel together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway import errors, sse
from gateway.client import Generation
from gateway.errors import ApiError
from gateway.mailbox import SequenceUpdate, UsageTotals
from gateway.metrics import GatewayMetrics
from gateway.response_body import ResponseBody, response_body

_log = structlog.get_logger(__name__)

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies of the nginx kind hold a stream back otherwise.
    (b"x-accel-buffering", b"no"),
]


class EventWriter(Protocol):
    """What turns updates into the events of one kind of stream."""

    @property
    def num_events(self) -> int:
        """Events rendered so far."""
        ...

    def render(self, updates: Iterable[SequenceUpdate]) -> bytes: ...

    def render_text(self, text: str, num_tokens: int) -> bytes:
        """`render` of an update of the first sequence that is text and nothing else."""
        ...

    def end(self, usage: UsageTotals) -> bytes:
        """The last events of a stream that ended well."""
        ...

    def fail(self, error: ApiError) -> bytes:
        """The last events of one that did not."""
        ...

    async def settle(self) -> None:
        """Return once what the last events say is true for whoever asks another process."""
        ...


class StreamTurns:
    """Has the streams that were due in one turn of the loop written in the next one."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self.metrics = metrics
        self._due: list[SseResponse] = []

    def add(self, stream: SseResponse) -> None:
        if not self._due:
            asyncio.get_running_loop().call_soon(self._write_all)
        self._due.append(stream)

    def _write_all(self) -> None:
        due, self._due = self._due, []
        num_events = num_bytes = num_sends = 0
        for stream in due:
            num_new, size = stream.write_news()
            if size:
                num_events += num_new
                num_bytes += size
                num_sends += 1
        self.metrics.count_streamed(num_events, num_bytes, num_sends)


class SseResponse(Response):
    def __init__(
        self, generation: Generation, chunks: EventWriter, turns: StreamTurns, keepalive_s: float, request_id: str
    ) -> None:
        super().__init__()
        self._generation = generation
        self._mailbox = generation.mailbox
        self._chunks = chunks
        self._turns = turns
        self._keepalive_s = keepalive_s
        self._request_id = request_id
        self._num_counted = 0
        self._is_due = False
        self._resuming: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        metrics = self._turns.metrics
        metrics.open_streams.inc()
        keepalive = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            self._body: ResponseBody = response_body(scope)
            self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._mailbox.on_news = self._be_due
            self._be_due()
            if self._keepalive_s:
                keepalive = asyncio.create_task(self._keep_alive())
            await self._ended
            # The end may have come together with the last text.
            last = self._chunks.render(self._mailbox.take_updates()) + self._last_events()
            await self._chunks.settle()
            metrics.count_streamed(self._num_new_events(), len(last), 1)
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            metrics.open_streams.dec()
            self._mailbox.on_news = None
            self._generation.cancel()
            for task in (keepalive, self._resuming, self._generation.watcher):
                if task is not None:
                    task.cancel()

    def _be_due(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._turns.add(self)

    def write_news(self) -> tuple[int, int]:
        """Write what has come; (events, bytes) that it was. The end is left to the response's own task."""
        self._is_due = False
        mailbox = self._mailbox
        if self._ended.done():
            return 0, 0
        if mailbox.ended:
            self._ended.set_result(None)
            return 0, 0
        if not self._body.may_write:
            if self._resuming is None:
                self._resuming = asyncio.create_task(self._resume())
            return 0, 0
        try:
            text, num_tokens = mailbox.take_text()
            # Updates may hold nothing to show yet: half a character, the beginning of a stop string.
            data = self._chunks.render_text(text, num_tokens) if text else self._chunks.render(mailbox.take_updates())
            if data:
                self._body.write(data)
        except Exception:
            # Of this stream alone: others are written in the same turn.
            _log.exception("a stream's events could not be made or written", request_id=self._request_id)
            mailbox.fail(errors.internal())
            return 0, 0
        return (self._num_new_events(), len(data)) if data else (0, 0)

    async def _resume(self) -> None:
        await self._body.drain()
        self._resuming = None
        self._be_due()

    def _num_new_events(self) -> int:
        before, self._num_counted = self._num_counted, self._chunks.num_events
        return self._num_counted - before

    def _last_events(self) -> bytes:
        error = self._mailbox.error
        if error is None:
            return self._chunks.end(self._mailbox.usage)
        _log.warning("stream ended with an error", request_id=self._request_id, code=error.code, message=error.message)
        return self._chunks.fail(error)

    async def _keep_alive(self) -> None:
        """Write a comment where nothing was sent for an interval."""
        while True:
            num_events = self._chunks.num_events
            await asyncio.sleep(self._keepalive_s)
            if self._chunks.num_events == num_events and self._body.may_write and not self._mailbox.ended:
                self._body.write(sse.KEEP_ALIVE)
                self._turns.metrics.count_streamed(0, len(sse.KEEP_ALIVE), 1)
