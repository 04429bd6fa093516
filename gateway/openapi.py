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


def error_responses(*statuses: int, model: type[BaseModel] = ErrorAnswer) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": model} for status in statuses}


def _without_422(document: dict[str, Any]) -> None:
    """The framework's own answer to a wrong parameter, which is OpenAI's 400 here."""
    for operations in document["paths"].values():
        for operation in operations.values():
            responses = operation["responses"]
            if responses.pop("422", None) is not None:
                schema = {"$ref": _REFERENCE.format(model=ErrorAnswer.__name__)}
                answer = {"description": "Bad Request", "content": {"application/json": {"schema": schema}}}
                responses.setdefault("400", answer)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, bodies = models_json_schema(
            [(body, "validation") for body in sorted(_BODIES, key=lambda body: body.__name__)],
            ref_template=_REFERENCE,
        )
        document["components"]["schemas"].update(bodies["$defs"])
        _without_422(document)
        app.openapi_schema = document
    return app.openapi_schema
