"""Lines of OpenAI's Batch API: one request each in the input, one result each in the output.

https://platform.openai.com/docs/api-reference/batch/request-input
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.json_types import type_name

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
# Those of lines that a command sends one by one, each where its url says.
SENT_ENDPOINTS = (*ENDPOINTS, "/v1/rerank", "/v1/score")


class LineError(Exception):
    """A line that is no request; the message says why, without the line's number."""


@dataclass(frozen=True, slots=True)
class BatchLine:
    custom_id: str
    url: str
    body: dict[str, Any]


def read_line(line: bytes | str, endpoint: str | None = None) -> BatchLine:
    """One request; with `endpoint`, one of ENDPOINTS, for that one only. Raises `LineError`."""
    try:
        request = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise LineError(f"is not valid JSON: {error}") from error
    if not isinstance(request, dict):
        raise LineError(f"must be a JSON object, not {type_name(request)}")
    custom_id, url, body = request.get("custom_id"), request.get("url"), request.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise LineError("custom_id: must be a string that is not empty")
    if request.get("method") != "POST":
        raise LineError("method: must be 'POST'")
    if not isinstance(url, str) or url not in ((endpoint,) if endpoint else SENT_ENDPOINTS):
        wanted = f"'{endpoint}', the batch's endpoint" if endpoint else f"one of {', '.join(SENT_ENDPOINTS)}"
        raise LineError(f"url: must be {wanted}")
    if not isinstance(body, dict):
        raise LineError(f"body: must be an object, not {type_name(body)}")
    if body.get("stream"):
        raise LineError("body.stream: not possible in a batch")
    return BatchLine(custom_id, url, body)


def result_line(custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """An answer, whatever its status; `body` is the answer's JSON."""
    return _line(custom_id, {"status_code": status, "request_id": request_id, "body": orjson.Fragment(body)}, None)


def error_line(custom_id: str | None, code: str, message: str) -> bytes:
    """A request that got no answer."""
    return _line(custom_id, None, {"code": code, "message": message})


def _line(custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    result = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
    return orjson.dumps(result, option=orjson.OPT_APPEND_NEWLINE)


def is_success(status: int) -> bool:
    return 200 <= status < 300
