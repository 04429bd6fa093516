"""/v1/completions"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from gateway.answers import Completion
from gateway.openapi import body_schema, error_responses
from gateway.schemas import CompletionBody
from gateway.serving import Serving

router = APIRouter(tags=["completions"])


@router.post(
    "/v1/completions",
    summary="Continue a text, or several",
    responses={200: {"model": Completion}, **error_responses(400, 401, 404, 413, 415, 429, 503, 504)},
    openapi_extra=body_schema(CompletionBody),
)
async def create_completion(request: Request) -> Response:
    serving: Serving = request.app.state.serving
    return await serving.completion(request)
