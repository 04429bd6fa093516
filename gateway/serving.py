"""From a parsed body to an answer: what chat and text completions do alike.

A request is sent, accepted or refused (as plain HTTP, also for streams), and then either collected or streamed. The
client is watched from the first moment: when it leaves, its request is cancelled at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive
from stepwire.v1 import inference_pb2

from gateway import answers, errors
from gateway.client import ControlPlaneClient, Generation
from gateway.convert import GenerationPlan, plan_chat, plan_completion, read_timeout
from gateway.errors import ApiError
from gateway.known_fields import refuse_unknown_fields
from gateway.metrics import GatewayMetrics
from gateway.middleware import CLIENT_CLOSED_REQUEST
from gateway.schemas import ChatCompletionBody, CompletionBody
from gateway.sse import ChatChunks, CompletionChunks, StreamShape
from gateway.streaming import EventWriter, SseResponse, StreamTurns

_log = structlog.get_logger(__name__)

_Body = TypeVar("_Body", bound=BaseModel)


async def read_body(request: Request, schema: type[_Body]) -> _Body:
    """The request's JSON body. Raises `ApiError`: 415 for another content type, 400 for what does not fit."""
    serving: Serving = request.app.state.serving
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        shown = f"'{content_type[:80]}'" if content_type else "missing"
        raise ApiError(415, f"The content type is {shown}; send 'Content-Type: application/json'.")
    try:
        return serving.parse_body(await request.body(), schema)
    except ClientDisconnect as error:
        # Nobody hears it: for the metrics and the log.
        raise ApiError(CLIENT_CLOSED_REQUEST, "The client left before its request was complete.") from error


@dataclass
class Serving:
    """What answering needs; one a process."""

    client: ControlPlaneClient
    metrics: GatewayMetrics
    max_batch_prompts: int
    sse_keepalive_s: float
    refuses_unknown_fields: bool = False

    def __post_init__(self) -> None:
        self.turns = StreamTurns(self.metrics)

    def parse_body(self, data: bytes, schema: type[_Body]) -> _Body:
        """Raises `ApiError` for what does not fit."""
        try:
            body = schema.model_validate_json(data)
        except ValidationError as error:
            raise errors.from_validation_error(error) from error
        if self.refuses_unknown_fields:
            refuse_unknown_fields(body)
        return body

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
            names=plan.names,
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
        return SseResponse(generation, chunks, self.turns, self.sse_keepalive_s, request.state.request_id)


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
