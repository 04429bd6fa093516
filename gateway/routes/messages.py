"""/v1/messages and /v1/messages/count_tokens, in Anthropic's shape."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from stepwire.v1 import inference_pb2

from gateway.chat_input import read_chat_input
from gateway.client import ControlPlaneClient
from gateway.convert import plan_chat
from gateway.errors import made_a_chat
from gateway.field_names import MESSAGE
from gateway.messages.answers import MessageEvents, whole_message
from gateway.messages.convert import chat_body, names_of
from gateway.messages.errors import MessageErrorAnswer
from gateway.messages.schemas import CountTokensBody, MessagesBody
from gateway.middleware import CLIENT_CLOSED_REQUEST
from gateway.openapi import body_schema, error_responses
from gateway.serving import Serving, read_body, stream_shape

router = APIRouter(tags=["messages"])
_ERRORS = error_responses(400, 401, 404, 413, 415, 429, 503, 504, model=MessageErrorAnswer)


@router.post(
    "/v1/messages", summary="Continue a conversation", responses=_ERRORS, openapi_extra=body_schema(MessagesBody)
)
async def create_message(request: Request) -> Response:
    serving: Serving = request.app.state.serving
    body = await read_body(request, MessagesBody)
    plan = plan_chat(chat_body(body), request.state.request_id, names_of(body))
    async with serving.generating(request, plan) as (generation, accepted):
        mailbox = generation.mailbox
        if mailbox.disconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        shape = stream_shape("msg", plan, accepted)
        if plan.stream:
            return serving.stream(request, generation, MessageEvents(shape))
        updates = await mailbox.take_all()
        if mailbox.disconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return Response(whole_message(shape, updates[0], mailbox.usage), media_type="application/json")


@router.post(
    "/v1/messages/count_tokens",
    summary="How many tokens a conversation has",
    responses=_ERRORS,
    openapi_extra=body_schema(CountTokensBody),
)
async def count_tokens(request: Request) -> Response:
    client: ControlPlaneClient = request.app.state.client
    body = await read_body(request, CountTokensBody)
    with made_a_chat(MESSAGE):
        chat = read_chat_input(chat_body(body))
    token_ids, _ = await client.tokenize(inference_pb2.TokenizeRequest(model=body.model or "", chat=chat), MESSAGE)
    return Response(b'{"input_tokens":%d}' % len(token_ids), media_type="application/json")
