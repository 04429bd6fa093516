"""/v1/chat/completions"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from gateway.answers import ChatCompletion
from gateway.openapi import body_schema, error_responses
from gateway.schemas import ChatCompletionBody
from gateway.serving import Serving

router = APIRouter(tags=["chat"])


@router.post(
    "/v1/chat/completions",
    summary="Continue a conversation",
    responses={200: {"model": ChatCompletion}, **error_responses(400, 401, 404, 413, 415, 429, 503, 504)},
    openapi_extra=body_schema(ChatCompletionBody),
)
async def create_chat_completion(request: Request) -> Response:
    serving: Serving = request.app.state.serving
    return await serving.chat_completion(request)
