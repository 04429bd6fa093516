"""What the control plane says becomes the status, headers and error object that OpenAI's clients act on."""

from __future__ import annotations

import json

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from stepwire.v1 import inference_pb2

from gateway import errors
from gateway.errors import ApiError, from_request_error, from_rpc_error
from gateway.field_names import COMPLETION


def request_error(
    code: int, reason: str = "", *, field: str | None = None, retry_s: float | None = None, retryable: bool = False
) -> inference_pb2.RequestError:
    error = inference_pb2.RequestError(code=code, message="what happened", reason=reason, retryable=retryable)
    if field is not None:
        error.violations.add(field=field, description="is wrong")
    if retry_s is not None:
        error.retry_after.CopyFrom(Duration(seconds=int(retry_s), nanos=int(retry_s % 1 * 1e9)))
    return error


@pytest.mark.parametrize(
    ("error", "status", "error_type", "code", "headers"),
    [
        (
            request_error(code_pb2.INVALID_ARGUMENT, "context_length_exceeded"),
            400,
            "invalid_request_error",
            "context_length_exceeded",
            {},
        ),
        (request_error(code_pb2.OUT_OF_RANGE), 400, "invalid_request_error", None, {}),
        (request_error(code_pb2.NOT_FOUND, "model_not_found"), 404, "invalid_request_error", "model_not_found", {}),
        (
            request_error(code_pb2.RESOURCE_EXHAUSTED, "queue_full", retry_s=2.2, retryable=True),
            429,
            "rate_limit_error",
            "queue_full",
            {"retry-after": "3"},
        ),
        (
            request_error(code_pb2.RESOURCE_EXHAUSTED, "queue_full", retry_s=0.01, retryable=True),
            429,
            "rate_limit_error",
            "queue_full",
            {"retry-after": "1"},
        ),
        (
            request_error(code_pb2.UNAVAILABLE, "draining", retryable=True),
            503,
            "service_unavailable_error",
            "draining",
            {"retry-after": "1"},
        ),
        (
            request_error(code_pb2.UNAVAILABLE, "no_worker", retry_s=5, retryable=True),
            503,
            "service_unavailable_error",
            "no_worker",
            {"retry-after": "5"},
        ),
        (
            request_error(code_pb2.DEADLINE_EXCEEDED, "deadline_exceeded", retryable=True),
            504,
            "timeout_error",
            "deadline_exceeded",
            {},
        ),
        (
            request_error(code_pb2.INTERNAL, "crashes_the_worker"),
            500,
            "server_error",
            "crashes_the_worker",
            {"x-should-retry": "false"},
        ),
        (request_error(code_pb2.INTERNAL, retryable=True), 500, "server_error", "internal_error", {}),
        (request_error(code_pb2.DATA_LOSS), 500, "server_error", "internal_error", {"x-should-retry": "false"}),
    ],
)
def test_status_table(
    error: inference_pb2.RequestError, status: int, error_type: str, code: str | None, headers: dict[str, str]
) -> None:
    converted = from_request_error(error, COMPLETION)
    assert (converted.status, converted.type, converted.code, converted.headers()) == (
        status,
        error_type,
        code,
        headers,
    )
    body = json.loads(converted.body())
    expected = {"message": "what happened", "type": error_type, "param": converted.param, "code": code}
    assert body == {"error": expected}


@pytest.mark.parametrize("code", [code_pb2.UNAUTHENTICATED, code_pb2.PERMISSION_DENIED])
def test_a_refused_gateway_is_not_the_clients_fault(code: int) -> None:
    converted = from_request_error(request_error(code), COMPLETION)
    assert converted.status == 500
    assert converted.headers() == {"x-should-retry": "false"}


def test_the_message_uses_the_clients_names() -> None:
    error = request_error(code_pb2.INVALID_ARGUMENT, field="sampling.top_p")
    error.violations.add(field="stop.include_stop_string", description="is odd")
    converted = from_request_error(error, COMPLETION)
    assert converted.message == "top_p: is wrong; include_stop_str_in_output: is odd"
    assert converted.param == "top_p"


def test_an_unknown_model_keeps_its_message() -> None:
    converted = from_request_error(request_error(code_pb2.NOT_FOUND, "model_not_found", field="model"), COMPLETION)
    assert (converted.message, converted.param) == ("what happened", "model")
    assert from_request_error(request_error(code_pb2.NOT_FOUND, "model_not_found"), COMPLETION).param == "model"


def rpc_error(code: grpc.StatusCode, details: str, rich: status_pb2.Status | None = None) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata()
    if rich is not None:
        trailing.add("grpc-status-details-bin", rich.SerializeToString())
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=details)


def test_rich_statuses_carry_reason_violations_and_retry_time() -> None:
    rich = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="the queue is full")
    for detail in (
        error_details_pb2.ErrorInfo(reason="queue_full"),
        error_details_pb2.RetryInfo(retry_delay=Duration(seconds=7)),
        error_details_pb2.BadRequest(
            field_violations=[error_details_pb2.BadRequest.FieldViolation(field="sampling.seed", description="d")]
        ),
    ):
        packed = any_pb2.Any()
        packed.Pack(detail)
        rich.details.append(packed)
    converted = from_rpc_error(rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "x", rich), COMPLETION)
    assert (converted.status, converted.code, converted.param) == (429, "queue_full", "seed")
    assert converted.headers()["retry-after"] == "7"
    assert converted.message == "the queue is full"


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
def test_what_a_channel_says_of_itself_is_not_shown(code: grpc.StatusCode) -> None:
    converted = from_rpc_error(rpc_error(code, "failed to connect to unix:/run/secret.sock 0x7f12"), COMPLETION)
    assert converted.status in (500, 503)
    assert "secret" not in converted.message and "0x7f" not in converted.message


def test_not_found_without_details_has_the_handlers_text() -> None:
    converted = from_rpc_error(rpc_error(grpc.StatusCode.NOT_FOUND, "The model 'x' does not exist"), COMPLETION)
    assert (converted.status, converted.message) == (404, "The model 'x' does not exist")


@pytest.mark.parametrize("make", [errors.control_plane_unreachable, errors.control_plane_lost, errors.draining])
def test_passing_trouble_can_be_retried(make: object) -> None:
    error = make()  # type: ignore[operator]
    assert isinstance(error, ApiError)
    assert error.status == 503
    assert error.headers()["retry-after"] == "1"
    assert "x-should-retry" not in error.headers()
