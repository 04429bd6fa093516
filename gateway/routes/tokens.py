"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from stepwire.v1 import inference_pb2

from gateway.answers import DetokenizeAnswer, TokenizeAnswer
from gateway.chat_input import read_chat_input
from gateway.client import ControlPlaneClient
from gateway.errors import ApiError
from gateway.field_names import TOKENIZE
from gateway.logprobs import token_text
from gateway.openapi import body_schema, error_responses
from gateway.schemas import ChatCompletionBody, DetokenizeBody, TokenizeBody
from gateway.serving import read_body

router = APIRouter(tags=["tokens"])


@router.post(
    "/tokenize",
    summary="The token ids of a text or a conversation",
    responses={200: {"model": TokenizeAnswer}, **error_responses(400, 401, 404, 413, 415, 503)},
    openapi_extra=body_schema(TokenizeBody),
)
async def tokenize(request: Request) -> Response:
    client: ControlPlaneClient = request.app.state.client
    body = await read_body(request, TokenizeBody)
    (token_ids, pieces), max_model_len = await asyncio.gather(
        client.tokenize(tokenize_request(body), TOKENIZE), _max_model_len(client, body.model)
    )
    answer = TokenizeAnswer(
        count=len(token_ids),
        max_model_len=max_model_len,
        tokens=token_ids,
        token_strs=[token_text(piece) for piece in pieces] if body.return_token_strs else None,
    )
    return Response(answer.model_dump_json(), media_type="application/json")


@router.post(
    "/detokenize",
    summary="The text of token ids",
    responses={200: {"model": DetokenizeAnswer}, **error_responses(400, 401, 404, 413, 415, 503)},
    openapi_extra=body_schema(DetokenizeBody),
)
async def detokenize(request: Request) -> Response:
    client: ControlPlaneClient = request.app.state.client
    body = await read_body(request, DetokenizeBody)
    text = await client.detokenize(body.model or "", body.tokens)
    return Response(DetokenizeAnswer(prompt=text).model_dump_json(), media_type="application/json")


def tokenize_request(body: TokenizeBody) -> inference_pb2.TokenizeRequest:
    """Raises `ApiError` unless there is either a prompt or messages."""
    message = inference_pb2.TokenizeRequest(model=body.model or "", token_bytes=bool(body.return_token_strs))
    if body.messages is not None:
        fields = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
        chat = ChatCompletionBody.model_validate({name: getattr(body, name) for name in fields})
        message.chat.CopyFrom(read_chat_input(chat))
    elif body.prompt is not None:
        message.text = body.prompt
        message.no_special_tokens = body.add_special_tokens is False
    else:
        raise ApiError(400, "prompt: needed, or messages instead.", param="prompt")
    return message


async def _max_model_len(client: ControlPlaneClient, model: str | None) -> int:
    return (await client.model(model)).max_model_len if model else (await client.models())[0].max_model_len
