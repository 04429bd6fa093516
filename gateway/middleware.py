"""Pure ASGI middleware: what every HTTP request passes. (Starlette's BaseHTTPMiddleware would cost 37 us a token.)"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Mapping

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from stepwire.process.traces import HEADER, traced

from gateway.errors import RATE_LIMIT, ApiError, draining, too_many_connections
from gateway.file_reserve import is_visit
from gateway.messages.errors import error_body, is_anthropics
from gateway.metrics import GatewayMetrics

_access_log = structlog.get_logger("gateway.access")

REQUEST_ID_HEADER = b"x-request-id"
# What may come back in a header and stand in a log line.
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
# The client left before the answer began; never sent, only counted.
CLIENT_CLOSED_REQUEST = 499
# Route labels by path; where an id follows a prefix, by that. Bounded, whatever paths clients make up.
_KNOWN_ROUTES = frozenset(
    {
        "/",
        "/console/steps",
        "/detokenize",
        "/health",
        "/load",
        "/metrics",
        "/openapi.json",
        "/ready",
        "/tokenize",
        "/version",
        "/v1/batches",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/files",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/rerank",
        "/v1/responses",
        "/v1/responses/input_tokens",
        "/v1/score",
    }
)
_ID_ROUTES = {
    "/v1/models/": "/v1/models/{model}",
    "/v1/responses/": "/v1/responses/{id}",
    "/v1/files/": "/v1/files/{id}",
    "/v1/batches/": "/v1/batches/{id}",
}
_PROBES = frozenset({"/health", "/ready", "/metrics"})


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this (lower-case) name."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


async def send_error(send: Send, error: ApiError, scope: Scope) -> None:
    """In the shape that the clients of the scope's path know."""
    body = error_body(error, scope)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers().items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def route_label(path: str) -> str:
    """A route's name for metrics: a bounded set, whatever paths clients make up."""
    if path in _KNOWN_ROUTES:
        return path
    return next((label for prefix, label in _ID_ROUTES.items() if path.startswith(prefix)), "other")


class Lifecycle:
    """Whether the process takes requests, and how many it is answering."""

    def __init__(self) -> None:
        self.draining = False
        self.num_in_flight = 0
        self._idle = asyncio.Event()

    def started(self) -> None:
        self.num_in_flight += 1
        self._idle.clear()

    def ended(self) -> None:
        self.num_in_flight -= 1
        if self.num_in_flight == 0:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Until no request is being answered."""
        if self.num_in_flight:
            await self._idle.wait()


class RequestContextMiddleware:
    """Outermost: request id, trace, metrics, access log; refuses requests while draining or when too many run."""

    def __init__(
        self, app: ASGIApp, lifecycle: Lifecycle, metrics: GatewayMetrics, max_concurrent_requests: int
    ) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._max_concurrent_requests = max_concurrent_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = header(scope, HEADER.encode())
        with traced("" if trace is None else trace.decode("latin-1")):
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        status = CLIENT_CLOSED_REQUEST

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                nonlocal status
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *((name, request_id) for name in id_headers)]
            await send(message)

        # Anthropic's clients look for it under their own name.
        id_headers = (REQUEST_ID_HEADER, b"request-id") if is_anthropics(scope) else (REQUEST_ID_HEADER,)
        started_at = time.perf_counter()
        refusal = self._refusal(scope)
        self._lifecycle.started()
        self._metrics.http_requests_in_flight.inc()
        try:
            if refusal is None:
                await self._app(scope, receive, send_with_id)
            else:
                await send_error(send_with_id, refusal, scope)
        except Exception:
            # Starlette's outer handler answers 500 if nothing was sent yet.
            status = 500 if status == CLIENT_CLOSED_REQUEST else status
            raise
        finally:
            self._lifecycle.ended()
            self._record(scope, request_id, status, time.perf_counter() - started_at)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if scope["path"] in _PROBES:
            return None
        if self._lifecycle.draining:
            return draining()
        if is_visit(scope):
            return too_many_connections()
        if self._lifecycle.num_in_flight >= self._max_concurrent_requests:
            return ApiError(
                429,
                f"The gateway answers {self._max_concurrent_requests} requests at a time and has as many. Try again.",
                type=RATE_LIMIT,
                code="too_many_requests",
                retry_after_s=1.0,
                retryable=True,
            )
        return None

    def _record(self, scope: Scope, request_id: bytes, status: int, duration_s: float) -> None:
        route = route_label(scope["path"])
        self._metrics.http_requests_in_flight.dec()
        self._metrics.http_requests.labels(route, str(status)).inc()
        self._metrics.http_request_duration.labels(route).observe(duration_s)
        log = _access_log.debug if route in _PROBES else _access_log.info
        log(
            "request",
            method=scope["method"],
            route=route,
            status=status,
            duration_s=round(duration_s, 4),
            request_id=request_id.decode(),
        )


def _request_id(scope: Scope) -> bytes:
    given = header(scope, REQUEST_ID_HEADER)
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return f"req-{uuid.uuid4().hex}".encode()


class _TooLarge(Exception):
    """The body has passed the limit."""


class BodyLimitMiddleware:
    """Refuses a body above the limit: by its announced length, and while it is read."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, larger: Mapping[str, int] | None = None) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        # Paths with a limit of their own.
        self._larger = larger or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._larger.get(scope["path"], self._max_body_bytes)
        announced = header(scope, b"content-length")
        if announced is not None and announced.isdigit() and int(announced) > limit:
            await send_error(send, self._error(f"{int(announced)} bytes", limit), scope)
            return
        try:
            await self._app(scope, self._counting(receive, limit), send)
        except _TooLarge:
            # Raised while the body is read, so nothing was sent yet.
            await send_error(send, self._error("larger", limit), scope)

    def _counting(self, receive: Receive, limit: int) -> Receive:
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise _TooLarge
            return message

        return counted

    def _error(self, what: str, limit: int) -> ApiError:
        return ApiError(
            413,
            f"The request body is {what}, and at most {limit} bytes are taken (--max-body-bytes, --files-max-bytes).",
            code="request_too_large",
            # What is still coming of the body would be read as the next request.
            headers={"connection": "close"},
        )
