"""/v1/responses"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from gateway.errors import ApiError
from gateway.openapi import body_schema, error_responses
from gateway.responses.schemas import ResponsesBody
from gateway.responses.serving import ResponsesServing

router = APIRouter(tags=["responses"])
# What SQLite takes, less what is counted on from there.
MAX_SEQUENCE_NUMBER = 2**53
_STORED = error_responses(401, 404)


@router.post(
    "/v1/responses",
    summary="Continue a conversation, and keep it",
    responses=error_responses(400, 401, 404, 413, 415, 429, 503, 504),
    openapi_extra=body_schema(ResponsesBody),
)
async def create_response(request: Request) -> Response:
    return await _serving(request).create(request)


@router.post(
    "/v1/responses/input_tokens",
    summary="How many tokens the conversation of a response has",
    responses=error_responses(400, 401, 404, 413, 415, 503, 504),
    openapi_extra=body_schema(ResponsesBody),
)
async def count_input_tokens(request: Request) -> Response:
    return await _serving(request).count_input_tokens(request)


@router.get(
    "/v1/responses/{response_id}",
    summary="A stored response, or the events of one that was streamed from the background",
    responses=error_responses(400, 401, 404),
)
async def get_response(
    request: Request,
    response_id: str,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0, le=MAX_SEQUENCE_NUMBER)] = None,
) -> Response:
    if stream:
        return await _serving(request).stream(response_id, -1 if starting_after is None else starting_after)
    if starting_after is not None:
        raise ApiError(400, "starting_after: is for streams; send stream=true with it.", param="starting_after")
    return await _serving(request).get(response_id)


@router.delete("/v1/responses/{response_id}", summary="Forget a stored response", responses=_STORED)
async def delete_response(request: Request, response_id: str) -> Response:
    return await _serving(request).delete(response_id)


@router.post(
    "/v1/responses/{response_id}/cancel",
    summary="Stop a response that runs in the background",
    responses=error_responses(400, 401, 404),
)
async def cancel_response(request: Request, response_id: str) -> Response:
    return await _serving(request).cancel(response_id)


@router.get(
    "/v1/responses/{response_id}/input_items", summary="What was given for it", responses=error_responses(400, 401, 404)
)
async def list_input_items(
    request: Request,
    response_id: str,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    return await _serving(request).input_items(response_id, limit=limit, order=order, after=after)


def _serving(request: Request) -> ResponsesServing:
    serving: ResponsesServing = request.app.state.responses
    return serving
