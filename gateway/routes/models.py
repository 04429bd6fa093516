"""/v1/models"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from gateway.answers import ModelList, ModelObject, model_list, model_object
from gateway.client import ControlPlaneClient
from gateway.messages.errors import is_anthropics
from gateway.messages.models import model_info, model_page
from gateway.openapi import error_responses

router = APIRouter(tags=["models"])
_JSON = "application/json"


@router.get(
    "/v1/models",
    summary="The names of the served model",
    responses={200: {"model": ModelList}, **error_responses(401, 503)},
)
async def list_models(request: Request) -> Response:
    client: ControlPlaneClient = request.app.state.client
    models = await client.models()
    return Response(model_page(models), media_type=_JSON) if is_anthropics(request.scope) else _json(model_list(models))


# Ids may hold slashes, as those of a hub do.
@router.get(
    "/v1/models/{model:path}",
    summary="One of them",
    responses={200: {"model": ModelObject}, **error_responses(401, 404, 503)},
)
async def get_model(request: Request, model: str) -> Response:
    client: ControlPlaneClient = request.app.state.client
    found = await client.model(model)
    return Response(model_info(found), media_type=_JSON) if is_anthropics(request.scope) else _json(model_object(found))


def _json(answer: ModelList | ModelObject) -> Response:
    return Response(answer.model_dump_json(), media_type=_JSON)
