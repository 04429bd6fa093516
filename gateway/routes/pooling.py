"""/v1/embeddings, /v1/rerank and /v1/score: what a model that generates text answers there, which is that it cannot."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from gateway.client import ControlPlaneClient
from gateway.errors import ApiError
from gateway.openapi import body_schema, error_responses
from gateway.schemas import RequestModel
from gateway.serving import read_body

router = APIRouter(tags=["pooling"])


class PoolingBody(RequestModel):
    model: str | None = None


async def _refuse(request: Request) -> Response:
    """404 for a model that is not served, 400 for one that is: all models served today generate text."""
    client: ControlPlaneClient = request.app.state.client
    body = await read_body(request, PoolingBody)
    model = await client.model(body.model) if body.model else (await client.models())[0]
    raise ApiError(
        400,
        f"The model '{model.id}' generates text; it computes neither embeddings nor scores.",
        param="model",
        code="model_cannot_embed",
    )


for _path in ("/v1/embeddings", "/v1/rerank", "/v1/score"):
    router.add_api_route(
        _path,
        _refuse,
        methods=["POST"],
        summary="Refused: no model that is served can",
        responses=error_responses(400, 401, 404, 413, 415, 503),
        openapi_extra=body_schema(PoolingBody),
        operation_id=f"refuse_{_path.rpartition('/')[2]}",
    )
