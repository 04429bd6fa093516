"""Errors in Anthropic's shape, for the routes that have it (https://docs.anthropic.com/en/api/errors)."""

from __future__ import annotations

from typing import Literal

import orjson
from pydantic import BaseModel
from starlette.types import Scope

from gateway.errors import ApiError

PREFIX = "/v1/messages"
# Both APIs have it, each in its own shape.
_SHARED = "/v1/models"
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class MessageErrorObject(BaseModel):
    type: str
    message: str


class MessageErrorAnswer(BaseModel):
    """An error, as /openapi.json describes it."""

    type: Literal["error"]
    error: MessageErrorObject
    request_id: str | None


def message_error(error: ApiError, request_id: str | None = None) -> dict[str, object]:
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


def is_anthropics(scope: Scope) -> bool:
    """Whether its client asks: on a route of its own, or naming its version of the API, as it always does."""
    if scope["path"].startswith(PREFIX):
        return True
    return scope["path"].startswith(_SHARED) and any(name == b"anthropic-version" for name, _ in scope["headers"])


def error_body(error: ApiError, scope: Scope) -> bytes:
    """The body of an error answer, in the shape that the client knows."""
    if is_anthropics(scope):
        return orjson.dumps(message_error(error, scope.get("state", {}).get("request_id")))
    return error.body()
