"""Errors as OpenAI's clients expect them, and the one table from gRPC statuses to HTTP.

Every error body is `{"error": {"message", "type", "param", "code"}}`; `code` is a string or null
(https://platform.openai.com/docs/guides/error-codes). Messages come from the control plane, which keeps addresses and
traces out of them, or from here; a text that a gRPC channel made up is logged and never shown.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grpc
import orjson
from google.rpc import code_pb2, error_details_pb2, status_pb2
from pydantic import ValidationError
from stepwire.v1 import inference_pb2

from gateway.field_names import Names, field_name, in_text, of_made_chat

INVALID_REQUEST = "invalid_request_error"
AUTHENTICATION = "authentication_error"
RATE_LIMIT = "rate_limit_error"
TIMEOUT = "timeout_error"
SERVER_ERROR = "server_error"
UNAVAILABLE = "service_unavailable_error"

# What a client should wait when the server did not say.
DEFAULT_RETRY_AFTER_S = 1.0
# More than this many wrong fields are counted, not listed.
MAX_LISTED_VIOLATIONS = 5


class ApiError(Exception):
    """An error that a client is told of: an HTTP status with an OpenAI error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        retryable: bool | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        # None leaves it to the client's own rule (the official one repeats 408, 409, 429 and 5xx).
        self.retryable = retryable
        self.extra_headers = dict(headers or {})

    def body(self) -> bytes:
        """The error object as JSON."""
        return orjson.dumps(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )

    def headers(self) -> dict[str, str]:
        headers = dict(self.extra_headers)
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.retryable is False and self.status >= 500:
            headers["x-should-retry"] = "false"
        return headers


# google.rpc.Code -> HTTP status, type, code where the control plane gives no reason.
_STATUS_TABLE: dict[int, tuple[int, str, str | None]] = {
    code_pb2.INVALID_ARGUMENT: (400, INVALID_REQUEST, None),
    code_pb2.FAILED_PRECONDITION: (400, INVALID_REQUEST, None),
    code_pb2.OUT_OF_RANGE: (400, INVALID_REQUEST, None),
    code_pb2.NOT_FOUND: (404, INVALID_REQUEST, "not_found"),
    code_pb2.RESOURCE_EXHAUSTED: (429, RATE_LIMIT, "rate_limit_exceeded"),
    code_pb2.UNAVAILABLE: (503, UNAVAILABLE, "unavailable"),
    code_pb2.ABORTED: (503, UNAVAILABLE, "aborted"),
    code_pb2.CANCELLED: (503, UNAVAILABLE, "cancelled"),
    code_pb2.DEADLINE_EXCEEDED: (504, TIMEOUT, "deadline_exceeded"),
    code_pb2.UNIMPLEMENTED: (501, SERVER_ERROR, "not_implemented"),
}
_REFUSED_GATEWAY = (code_pb2.UNAUTHENTICATED, code_pb2.PERMISSION_DENIED)


def from_request_error(error: inference_pb2.RequestError, names: Names) -> ApiError:
    """What the control plane says of a request, before or after it was accepted; `names`: of its fields in the body."""
    if error.code in _REFUSED_GATEWAY:
        return refused_gateway()
    status, error_type, default_code = _STATUS_TABLE.get(error.code, (500, SERVER_ERROR, "internal_error"))
    param = field_name(error.violations[0].field, names) if error.violations else None
    retry_after_s: float | None = None
    if error.HasField("retry_after"):
        retry_after_s = error.retry_after.seconds + error.retry_after.nanos / 1e9
    elif status in (429, 503):
        retry_after_s = DEFAULT_RETRY_AFTER_S
    if param is None and error.reason == "model_not_found":
        param = "model"
    message = error.message
    if error.violations and (status == 400 or not message):
        # The same violations, under the names that the client knows.
        message = "; ".join(f"{field_name(each.field, names)}: {each.description}" for each in error.violations)
    return ApiError(
        status,
        in_text(message, names) or "The request failed.",
        type=error_type,
        param=param,
        code=error.reason or default_code,
        retry_after_s=retry_after_s,
        retryable=error.retryable or retry_after_s is not None,
    )


def from_rpc_error(error: grpc.aio.AioRpcError, names: Names) -> ApiError:
    """A gRPC status of a unary call.

    Only a status with google.rpc details, or one that can come from a handler alone, has a text for clients: what a
    channel says of itself names sockets.
    """
    converted = inference_pb2.RequestError(code=error.code().value[0])
    details = _rich_status(error)
    if details is not None:
        converted.message = details.message
        for detail in details.details:
            _add_detail(converted, detail)
    elif error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
        converted.message = error.details() or ""
    elif error.code() is grpc.StatusCode.UNAVAILABLE:
        return control_plane_unreachable()
    else:
        converted.message = "The server could not answer this request."
    converted.retryable = converted.retryable or error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )
    return from_request_error(converted, names)


def _rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return None


def _add_detail(converted: inference_pb2.RequestError, detail: Any) -> None:
    bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    info = error_details_pb2.ErrorInfo()
    if detail.Unpack(bad_request):
        converted.violations.extend(bad_request.field_violations)
    elif detail.Unpack(retry):
        converted.retry_after.CopyFrom(retry.retry_delay)
    elif detail.Unpack(info):
        converted.reason = info.reason.lower()


def from_validation_error(error: ValidationError) -> ApiError:
    """A body that does not fit its schema: 400 with every wrong field named, the first one as `param`."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}.")
    if first["type"] == "value_error" and not first["loc"]:
        # A rule between fields; its message begins with the field it is about.
        message = _lower_first(first["msg"])
        return ApiError(400, f"{message}.", param=message.partition(":")[0])
    if not first["loc"]:
        return ApiError(400, "The body must be a JSON object.")
    shown = problems[:MAX_LISTED_VIOLATIONS]
    listed = [f"{format_location(problem['loc'])}: {_lower_first(problem['msg'])}" for problem in shown]
    hidden = len(problems) - len(shown)
    text = "; ".join(listed) + (f"; and {hidden} more" if hidden > 0 else "")
    return ApiError(400, f"{text}.", param=format_location(first["loc"]))


@contextlib.contextmanager
def made_a_chat(names: Names) -> Iterator[None]:
    """What is wrong with a chat's body is said of the body that it was made of."""
    try:
        yield
    except ValidationError as error:
        raise _renamed(from_validation_error(error), names) from error
    except ApiError as error:
        raise _renamed(error, names) from error


def _renamed(error: ApiError, names: Names) -> ApiError:
    if error.param is not None:
        own = of_made_chat(error.param, names)
        if error.message.startswith(f"{error.param}:"):
            error.message = own + error.message[len(error.param) :]
        error.param = own
    return error


def format_location(location: Sequence[str | int]) -> str:
    """`("messages", 0, "role")` -> `messages[0].role`."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")


def _lower_first(message: str) -> str:
    message = re.sub(r"^(Value error|Assertion failed), ", "", message)
    return message[:1].lower() + message[1:]


def control_plane_unreachable() -> ApiError:
    return ApiError(
        503,
        "The server is starting or restarting: its control plane cannot be reached yet. Try again shortly.",
        type=UNAVAILABLE,
        code="control_plane_unreachable",
        retry_after_s=DEFAULT_RETRY_AFTER_S,
        retryable=True,
    )


def control_plane_lost() -> ApiError:
    return ApiError(
        503,
        "The connection to the control plane was lost while the request ran. Send the request again.",
        type=UNAVAILABLE,
        code="control_plane_lost",
        retry_after_s=DEFAULT_RETRY_AFTER_S,
        retryable=True,
    )


def refused_gateway() -> ApiError:
    """The control plane does not take this gateway's key: for the operator to mend, so a client need not retry."""
    return ApiError(
        500,
        "The gateway is not allowed to use the control plane: set --control-plane-api-key to a key that it accepts.",
        type=SERVER_ERROR,
        code="gateway_unauthorized",
        retryable=False,
    )


def draining() -> ApiError:
    return ApiError(
        503,
        "The server is shutting down and takes no new requests. Try again shortly.",
        type=UNAVAILABLE,
        code="draining",
        retry_after_s=DEFAULT_RETRY_AFTER_S,
        retryable=True,
        headers={"connection": "close"},
    )


def too_many_connections() -> ApiError:
    return ApiError(
        503,
        "The gateway has as many connections open as it may. Try again shortly.",
        type=UNAVAILABLE,
        code="too_many_connections",
        retry_after_s=DEFAULT_RETRY_AFTER_S,
        retryable=True,
        headers={"connection": "close"},
    )


def cut_off() -> ApiError:
    """The drain ran out of time before the request ended."""
    return ApiError(
        503,
        "The server is shutting down and the request did not end in time. Send the request again.",
        type=UNAVAILABLE,
        code="draining",
        retry_after_s=DEFAULT_RETRY_AFTER_S,
        retryable=True,
    )


def storage_unusable() -> ApiError:
    """Nothing can be stored: for the operator to mend, so a client need not retry."""
    return ApiError(
        507,
        "The server cannot store this: its disk is full or cannot be written. What stores nothing is answered.",
        type=SERVER_ERROR,
        code="storage_unusable",
        retryable=False,
    )


def unexpected() -> ApiError:
    """An endpoint has raised what nobody handles. The HTTP server closes the connection afterwards, and the client is
    told: a next request on it would be lost."""
    error = internal()
    error.extra_headers = {"connection": "close"}
    return error


def internal() -> ApiError:
    return ApiError(500, "The server failed to answer this request.", type=SERVER_ERROR, code="internal_error")
