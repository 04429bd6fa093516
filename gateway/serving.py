"""From a parsed body to an answer: what chat and text completions do alike.

A request is sent, accepted or refused (as plain HTTP, also for streams), and then either collected or streamed. The
client is watched from the first moment: when it leaves, its request is cancelled at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import structlog
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from stepwire.v1 import inference_pb2

from gateway import answers, errors, sse
from gateway.client import ControlPlaneClient, Generation
from gateway.convert import GenerationPlan, plan_chat, plan_completion, read_timeout
from gateway.errors import ApiError
from gateway.mailbox import Mailbox, SequenceUpdate, UsageTotals
from gateway.metrics import GatewayMetrics
from gateway.middleware import CLIENT_CLOSED_REQUEST
from gateway.schemas import ChatCompletionBody, CompletionBody
from gateway.sse import ChatChunks, CompletionChunks, StreamShape

_log = structlog.get_logger(__name__)

_Body = TypeVar("_Body", bound=BaseModel)
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies of the nginx kind hold a stream back otherwise.
    (b"x-accel-buffering", b"no"),
]


async def read_body(request: Request, schema: type[_Body]) -> _Body:
    """The request's JSON body. Raises `ApiError`: 415 for another content type, 400 for what does not fit."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        shown = f"'{content_type[:80]}'" if content_type else "missing"
        raise ApiError(415, f"The content type is {shown}; send 'Content-Type: application/json'.")
    try:
        return schema.model_validate_json(await request.body())
    except ValidationError as error:
        raise errors.from_validation_error(error) from error
    except ClientDisconnect as error:
        # Nobody hears it: for the metrics and the log.
        raise ApiError(CLIENT_CLOSED_REQUEST, "The client left before its request was complete.") from error


@dataclass(slots=True)
class Serving:
    """What answering needs; one a process."""

    client: ControlPlaneClient
    metrics: GatewayMetrics
    max_batch_prompts: int
    sse_keepalive_s: float

    async def chat_completion(self, request: Request) -> Response:
        body = await read_body(request, ChatCompletionBody)
        plan = plan_chat(body, request.state.request_id)
        async with self.generating(request, plan) as (generation, accepted):
            if generation.mailbox.disconnected:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            shape = stream_shape("chatcmpl", plan, accepted)
            mailbox = generation.mailbox
            if plan.stream:
                return self.stream(request, generation, ChatChunks(shape, mailbox.prompts))
            updates = await mailbox.take_all()
            if mailbox.disconnected:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            return _json_response(answers.chat_completion(shape, updates, mailbox.usage, mailbox.prompts))

    async def completion(self, request: Request) -> Response:
        body = await read_body(request, CompletionBody)
        plan = plan_completion(body, request.state.request_id, self.max_batch_prompts)
        async with self.generating(request, plan) as (generation, accepted):
            if generation.mailbox.disconnected:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            shape = stream_shape("cmpl", plan, accepted)
            mailbox = generation.mailbox
            if plan.stream:
                chunks = CompletionChunks(shape, plan.num_samples, mailbox.prompts)
                return self.stream(request, generation, chunks)
            updates = await mailbox.take_all()
            if mailbox.disconnected:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            return _json_response(answers.completion(shape, plan.num_samples, updates, mailbox.usage, mailbox.prompts))

    @contextlib.asynccontextmanager
    async def generating(
        self, request: Request, plan: GenerationPlan
    ) -> AsyncIterator[tuple[Generation, Sequence[inference_pb2.Accepted]]]:
        """A generation that all prompts of the plan were accepted for; none if the client left meanwhile.

        On the way out it is cancelled, unless a streaming response has taken it over.
        """
        generation = self.client.generate(
            plan.requests,
            num_samples=plan.num_samples,
            stream=plan.stream,
            timeout_s=read_timeout(request.headers.get("x-request-timeout")),
            renames=plan.renames,
        )
        watcher = asyncio.create_task(self._watch_disconnect(request.receive, generation))
        generation.watcher = watcher
        try:
            yield generation, await generation.mailbox.accepted()
        finally:
            if not generation.handed_over:
                generation.cancel()
                watcher.cancel()

    async def _watch_disconnect(self, receive: Receive, generation: Generation) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.metrics.client_disconnects.inc()
                generation.disconnect()
                return

    def stream(self, request: Request, generation: Generation, chunks: EventWriter) -> Response:
        generation.handed_over = True
        return SseResponse(generation, chunks, self.metrics, self.sse_keepalive_s, request.state.request_id)


class EventWriter(Protocol):
    """What turns updates into the events of one kind of stream."""

    @property
    def num_events(self) -> int:
        """Events rendered so far."""
        ...

    def render(self, updates: Iterable[SequenceUpdate]) -> bytes: ...

    def end(self, usage: UsageTotals) -> bytes:
        """The last events of a stream that ended well."""
        ...

    def fail(self, error: ApiError) -> bytes:
        """The last events of one that did not."""
        ...


def stream_shape(prefix: str, plan: GenerationPlan, accepted: Sequence[inference_pb2.Accepted]) -> StreamShape:
    return StreamShape(
        id=f"{prefix}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=plan.model or accepted[0].model,
        include_usage=plan.include_usage,
        continuous_usage=plan.continuous_usage,
        num_prompt_tokens=sum(each.num_prompt_tokens for each in accepted),
        num_top_logprobs=plan.num_top_logprobs,
        return_token_ids=plan.return_token_ids,
        echo=plan.echo,
        echo_text=plan.echo_text,
        num_prompt_logprobs=plan.num_prompt_logprobs,
        is_named_tool=plan.is_named_tool,
    )


def _json_response(body: bytes) -> Response:
    return Response(body, media_type="application/json")


class SseResponse(Response):
    """Writes a generation as server-sent events: one write for all that has come since the last one."""

    def __init__(
        self,
        generation: Generation,
        chunks: EventWriter,
        metrics: GatewayMetrics,
        keepalive_s: float,
        request_id: str,
    ) -> None:
        super().__init__()
        self._generation = generation
        self._chunks = chunks
        self._metrics = metrics
        self._keepalive_s = keepalive_s
        self._request_id = request_id
        self._num_counted = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        mailbox = self._generation.mailbox
        keepalive = asyncio.create_task(self._poke()) if self._keepalive_s else None
        self._metrics.open_streams.inc()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            while not mailbox.ended:
                updates = await mailbox.take()
                # Updates may hold nothing to show yet: half a character, the beginning of a stop string.
                body = self._chunks.render(updates) if updates else self._keep_alive(mailbox)
                if body:
                    await self._write(send, body)
            # The end may have come together with the last text.
            last = self._chunks.render(await mailbox.take())
            await self._write(send, last + self._last_events(), more_body=False)
        finally:
            self._metrics.open_streams.dec()
            self._generation.cancel()
            for task in (keepalive, self._generation.watcher):
                if task is not None:
                    task.cancel()

    @staticmethod
    def _keep_alive(mailbox: Mailbox) -> bytes:
        return b"" if mailbox.ended else sse.KEEP_ALIVE

    def _last_events(self) -> bytes:
        error = self._generation.mailbox.error
        if error is None:
            return self._chunks.end(self._generation.mailbox.usage)
        _log.warning("stream ended with an error", request_id=self._request_id, code=error.code, message=error.message)
        return self._chunks.fail(error)

    async def _write(self, send: Send, body: bytes, *, more_body: bool = True) -> None:
        totals = self._metrics.streams
        num_events = self._chunks.num_events
        totals.num_events += num_events - self._num_counted
        self._num_counted = num_events
        totals.num_bytes += len(body)
        totals.num_sends += 1
        await send({"type": "http.response.body", "body": body, "more_body": more_body})

    async def _poke(self) -> None:
        """Wake the writer where nothing was sent for an interval."""
        mailbox = self._generation.mailbox
        while True:
            num_events = self._chunks.num_events
            await asyncio.sleep(self._keepalive_s)
            if self._chunks.num_events == num_events:
                mailbox.poke()
