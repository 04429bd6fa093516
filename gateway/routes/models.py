"""/v1/models"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from gateway.answers import ModelList, ModelObject, model_list, model_object
from gateway.client import ControlPlaneClient
from gateway.openapi import error_responses

router = APIRouter(tags=["models"])


@router.get(
    "/v1/models",
    summary="The names of the served model",
    responses={200: {"model": ModelList}, **error_responses(401, 503)},
)
async def list_models(request: Request) -> Response:
    client: ControlPlaneClient = request.app.state.client
    return _json(model_list(await client.models()))


# Ids may hold slashes, as those of a hub do.
@router.get(
    "/v1/models/{model:path}",
    summary="One of them",
    responses={200: {"model": ModelObject}, **error_responses(401, 404, 503)},
)
async def get_model(request: Request, model: str) -> Response:
    client: ControlPlaneClient = request.app.state.client
    return _json(model_object(await client.model(model)))


def _json(answer: ModelList | ModelObject) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")
