"""Requests that are refused or fail: one form inside, a gRPC status or a RequestError outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import AdmissionError, RequestFault

ERROR_DOMAIN = "stepwire"


class Violation(NamedTuple):
    """One wrong field: its path in GenerateRequest (`sampling.top_p`, `stop.stop[2]`) and what is wrong."""

    field: str
    description: str


@dataclass(eq=False)
class RequestRefused(Exception):
    """A request that ends without an answer.

    `code` is a google.rpc.Code name; `reason` a stable word for programs.
    """

    code: str
    reason: str
    message: str
    violations: Sequence[Violation] = ()
    retry_after_s: float | None = None
    retryable: bool = False

    def __str__(self) -> str:
        return self.message

    @classmethod
    def invalid(cls, *violations: Violation, reason: str = "invalid_request") -> RequestRefused:
        message = "; ".join(f"{field}: {description}" for field, description in violations)
        return cls("INVALID_ARGUMENT", reason, message, violations)

    @classmethod
    def from_admission(cls, error: AdmissionError) -> RequestRefused:
        violations = () if error.field is None else (Violation(error.field, error.message),)
        retryable = error.retry_after_s is not None or error.code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
        return cls(error.code, error.reason, error.message, violations, error.retry_after_s, retryable)

    @classmethod
    def from_fault(cls, fault: RequestFault) -> RequestRefused:
        return cls(fault.code, fault.code.lower(), fault.message, retryable=fault.retryable)


def deadline_exceeded(timeout_s: float) -> RequestRefused:
    return RequestRefused(
        "DEADLINE_EXCEEDED",
        "deadline_exceeded",
        f"The request did not finish within its timeout of {timeout_s:g} s.",
        retryable=True,
    )


def internal_error() -> RequestRefused:
    """What a client hears of a fault of ours; the log has the rest."""
    return RequestRefused("INTERNAL", "internal", "Internal error; the server's log has the details.", retryable=True)


def to_request_error(error: RequestRefused) -> pb.RequestError:
    message = pb.RequestError(
        code=code_pb2.Code.Value(error.code),
        message=error.message,
        violations=_field_violations(error),
        retryable=error.retryable,
        reason=error.reason,
    )
    if error.retry_after_s is not None:
        message.retry_after.CopyFrom(_duration(error.retry_after_s))
    return message


def to_status(error: RequestRefused) -> grpc.Status:
    """With google.rpc details: ErrorInfo (it carries the reason), and BadRequest and RetryInfo where they apply."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message)
    _attach(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN))
    if error.violations:
        _attach(status, error_details_pb2.BadRequest(field_violations=_field_violations(error)))
    if error.retry_after_s is not None:
        _attach(status, error_details_pb2.RetryInfo(retry_delay=_duration(error.retry_after_s)))
    return rpc_status.to_status(status)


def _attach(status: status_pb2.Status, detail: object) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)  # type: ignore[arg-type]
    status.details.append(packed)


def _field_violations(error: RequestRefused) -> list[error_details_pb2.BadRequest.FieldViolation]:
    return [
        error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
        for field, description in error.violations
    ]


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
