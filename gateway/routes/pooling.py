"""/v1/embeddings, /v1/rerank and /v1/score: what models give for whole texts. Others answer 400 there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from stepwire.v1 import inference_pb2

from gateway import field_names
from gateway.client import ControlPlaneClient
from gateway.convert import read_timeout
from gateway.embeddings import embed_request, embeddings_answer
from gateway.errors import ApiError
from gateway.field_names import Names
from gateway.json_types import type_name
from gateway.middleware import CLIENT_CLOSED_REQUEST
from gateway.openapi import body_schema, error_responses
from gateway.pooling_schemas import (
    EmbeddingsAnswer,
    EmbeddingsBody,
    PoolingUsage,
    RerankAnswer,
    RerankBody,
    RerankDocument,
    RerankResult,
    ScoreAnswer,
    ScoreBody,
    ScoreObject,
)
from gateway.serving import read_body
from gateway.unsupported import check_pooling_fields

router = APIRouter(tags=["pooling"])

Answer = TypeVar("Answer")
_ERRORS = error_responses(400, 401, 404, 413, 415, 429, 500, 503, 504)


@router.post(
    "/v1/embeddings",
    summary="A vector for every input",
    responses={200: {"model": EmbeddingsAnswer}, **_ERRORS},
    openapi_extra=body_schema(EmbeddingsBody),
)
async def embeddings(request: Request) -> Response:
    client: ControlPlaneClient = request.app.state.client
    body = await read_body(request, EmbeddingsBody)
    call, names = embed_request(body, request.state.request_id)
    answer = await _computed(request, client.embed(call, names, _timeout(request)))
    return Response(embeddings_answer(answer, body), media_type="application/json")


# Other servers of this kind have these as well.
@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
@router.post(
    "/v1/rerank",
    summary="Documents in the order of how well they answer a query",
    responses={200: {"model": RerankAnswer}, **_ERRORS},
    openapi_extra=body_schema(RerankBody),
)
async def rerank(request: Request) -> Response:
    client: ControlPlaneClient = request.app.state.client
    body = await read_body(request, RerankBody)
    query, documents = _text("query", body.query), read_documents(body.documents)
    call = score_request(body, [(query, text) for text in documents], request.state.request_id)
    answer = await _computed(request, client.score(call, field_names.RERANK, _timeout(request)))
    best = sorted(range(len(documents)), key=lambda index: -answer.scores[index])[: body.top_n]
    shows = body.return_documents is not False
    results = [
        RerankResult(
            index=index,
            relevance_score=answer.scores[index],
            document=RerankDocument(text=documents[index]) if shows else None,
        )
        for index in best
    ]
    usage = _usage(answer.num_prompt_tokens)
    return _json(
        RerankAnswer(id=f"rerank-{request.state.request_id}", model=answer.model, usage=usage, results=results)
    )


@router.post("/score", include_in_schema=False)
@router.post(
    "/v1/score",
    summary="How well pairs of texts belong together",
    responses={200: {"model": ScoreAnswer}, **_ERRORS},
    openapi_extra=body_schema(ScoreBody),
)
async def score(request: Request) -> Response:
    client: ControlPlaneClient = request.app.state.client
    body = await read_body(request, ScoreBody)
    call = score_request(body, pair_up(body.text_1, body.text_2), request.state.request_id)
    names = score_names(body)
    answer = await _computed(request, client.score(call, names, _timeout(request)))
    return _json(
        ScoreAnswer(
            id=f"score-{request.state.request_id}",
            created=int(time.time()),
            model=answer.model,
            data=[ScoreObject(index=index, score=value) for index, value in enumerate(answer.scores)],
            usage=_usage(answer.num_prompt_tokens),
        )
    )


def score_request(
    body: RerankBody | ScoreBody, pairs: Sequence[tuple[str, str]], request_id: str
) -> inference_pb2.ScoreRequest:
    check_pooling_fields(body.model_extra)
    call = inference_pb2.ScoreRequest(model=body.model or "", priority=body.priority or 0, request_id=request_id)
    for first, second in pairs:
        call.pairs.add(first=first, second=second)
    if body.truncate_prompt_tokens is not None:
        call.truncate_prompt_tokens = body.truncate_prompt_tokens
    return call


def score_names(body: ScoreBody) -> Names:
    names = dict(field_names.SCORE)
    if isinstance(body.text_1, list) and len(body.text_1) > 1:
        names["pairs[].first"] = "text_1[]"
    if isinstance(body.text_2, str):
        names |= {"pairs[]": "text_2", "pairs[].second": "text_2"}
    return names


def read_documents(documents: Any) -> list[str]:
    """Texts, or objects with a `text`. Raises `ApiError` naming the wrong element."""
    if not isinstance(documents, list) or not documents:
        raise ApiError(400, "documents: must be a list of texts that is not empty.", param="documents")
    texts = [each.get("text") if isinstance(each, dict) else each for each in documents]
    return [_text(f"documents[{index}]", text) for index, text in enumerate(texts)]


def pair_up(first: Any, second: Any) -> list[tuple[str, str]]:
    """One text against many, or as many against as many. Raises `ApiError`."""
    ones, others = _texts("text_1", first), _texts("text_2", second)
    if len(ones) == 1:
        ones = ones * len(others)
    if len(ones) != len(others):
        raise ApiError(
            400,
            f"text_2: has {len(others)} texts, and text_1 has {len(ones)}; give as many, or one text_1.",
            param="text_2",
        )
    return list(zip(ones, others, strict=True))


def _texts(param: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [_text(param, value)]
    if not isinstance(value, list) or not value:
        raise ApiError(400, f"{param}: must be a text, or a list of texts that is not empty.", param=param)
    return [_text(f"{param}[{index}]", text) for index, text in enumerate(value)]


def _text(param: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ApiError(400, f"{param}: must be a string, not {type_name(value)}.", param=param)
    if not value:
        raise ApiError(400, f"{param}: must not be empty.", param=param)
    return value


def _usage(num_tokens: int) -> PoolingUsage:
    return PoolingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)


def _timeout(request: Request) -> float | None:
    return read_timeout(request.headers.get("x-request-timeout"))


def _json(answer: RerankAnswer | ScoreAnswer) -> Response:
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


async def _computed(request: Request, call: Awaitable[Answer]) -> Answer:
    """The call's answer; it is cancelled when the client leaves."""
    task = asyncio.ensure_future(call)
    watcher = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_CLOSED_REQUEST, "The client left before its answer.")
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
