"""What /openapi.json says of bodies that the routes read by themselves, and of errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gateway.answers import ErrorAnswer

_REFERENCE = "#/components/schemas/{model}"
# Every body that a route has named.
_BODIES: set[type[BaseModel]] = set()


def body_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """A route's JSON body; `describe` adds its schema to the document."""
    _BODIES.add(schema)
    reference = {"$ref": _REFERENCE.format(model=schema.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer} for status in statuses}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, bodies = models_json_schema(
            [(body, "validation") for body in sorted(_BODIES, key=lambda body: body.__name__)],
            ref_template=_REFERENCE,
        )
        document["components"]["schemas"].update(bodies["$defs"])
        app.openapi_schema = document
    return app.openapi_schema
