"""InferenceService: the public gRPC API, on top of `RequestIntake`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterable, Awaitable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc
import grpc.aio
import structlog
from stepwire.process.traces import traced, traceparent_of
from stepwire.v1 import inference_pb2 as pb
from stepwire.v1 import inference_pb2_grpc as pb_grpc

from control_plane.core.request import ModelFacts
from control_plane.frontend.errors import RequestRefused, Violation, internal_error, to_status
from control_plane.frontend.output_stream import RequestOutput
from control_plane.frontend.pooling import PoolingService
from control_plane.frontend.request_intake import RequestIntake
from control_plane.frontend.session import SessionStream

log = structlog.get_logger(__name__)

Response = TypeVar("Response")
if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


async def refuse(context: Context, error: RequestRefused) -> NoReturn:
    """End a call with the error's status and its google.rpc details."""
    status = to_status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort returns by raising")


@contextlib.contextmanager
def client_may_leave() -> Iterator[None]:
    """Around a handler that writes: a write to a client that has gone fails, and its call is cancelled.

    gRPC would log an error with a traceback for each client that leaves while a message is on its way. It would log
    another one if the handler returned: it then sends a status, and if the write that failed was the first one it
    believes that the initial metadata is still to be sent, which may be sent only once.
    """
    try:
        yield
    except grpc.aio.InternalError as error:
        log.debug("a client left while it was written to", error=str(error))
        raise asyncio.CancelledError from None


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    def __init__(self, intake: RequestIntake) -> None:
        self._intake = intake
        self._pooling = PoolingService(intake)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        wake = asyncio.Event()
        try:
            with traced(traceparent_of(context.invocation_metadata())):
                output = await self._intake.submit(request, lambda _: wake.set())
        except RequestRefused as error:
            await refuse(context, error)
        try:
            with client_may_leave():
                # A turn for the plan, one for the writer of its step: the worker waits for that, and nobody for this.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                await _stream(output, wake, context)
        finally:
            # The client went away, its deadline passed, or the stream broke; nothing happens after the last message.
            output.cancel()

    async def Session(self, requests: AsyncIterable[pb.SessionRequest], context: Context) -> None:
        with client_may_leave():
            await SessionStream(self._intake, context).run(requests)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        return await _answered(self._pooling.embed(request), context)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        return await _answered(self._pooling.score(request), context)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async def answer() -> pb.TokenizeResponse:
            ids = await self._intake.builder.tokenize(request, self._intake.facts())
            token_ids = ids.tolist()
            tokens = self._intake.builder.token_bytes(token_ids) if request.token_bytes else ()
            return pb.TokenizeResponse(token_ids=token_ids, tokens=tokens)

        return await _answered(answer(), context)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        async def answer() -> pb.DetokenizeResponse:
            return pb.DetokenizeResponse(text=await self._intake.builder.detokenize(request, self._intake.facts()))

        return await _answered(answer(), context)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        async def answer() -> pb.ListModelsResponse:
            facts = self._intake.facts()
            model = self._intake.model
            names = model.names or (model.name(facts.model),)
            return pb.ListModelsResponse(models=[self._describe(name, facts) for name in names])

        return await _answered(answer(), context)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        async def answer() -> pb.GetModelResponse:
            facts = self._intake.facts()
            if not request.id:
                raise RequestRefused.invalid(Violation("id", "is missing: give one of the names that ListModels lists"))
            self._intake.builder.check_model(request.id, facts)
            return pb.GetModelResponse(model=self._describe(request.id, facts))

        return await _answered(answer(), context)

    def _describe(self, name: str, facts: ModelFacts) -> pb.Model:
        model = self._intake.model
        return pb.Model(
            id=name,
            created=model.created_s,
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
            has_tokenizer=model.tokenizer is not None,
            has_chat_template=model.chat_template is not None,
            tool_call_parser=model.output_format.tool_parser,
            reasoning_parser=model.output_format.reasoning_parser,
            has_structured_output=model.tokenizer is not None and facts.can_mask_tokens,
            has_infilling=self._intake.builder.can_infill,
            embedding_dimensions=0 if facts.pooling is None or facts.pooling.is_score else facts.pooling.dimensions,
            has_pair_scores=facts.pooling is not None and facts.pooling.is_score,
            pools_only=facts.pooling is not None and facts.pooling.only,
        )


async def _stream(output: RequestOutput, wake: asyncio.Event, context: Context) -> None:
    """Write what the mailbox has until its last message; while a write waits for the client, the mailbox collects."""
    while not output.is_closed:
        await wake.wait()
        wake.clear()
        response = pb.GenerateResponse()
        output.take(response, time.monotonic())
        await context.write(response)


async def _answered(answer: Awaitable[Response], context: Context) -> Response:
    with traced(traceparent_of(context.invocation_metadata())):
        try:
            return await answer
        except RequestRefused as error:
            await refuse(context, error)
        except Exception:
            log.exception("a call failed")
            await refuse(context, internal_error())
