"""The ASGI application: routes, middleware, and errors in OpenAI's shape."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import AsyncIterator
from http import HTTPStatus

import stepwire
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from gateway import errors, openapi
from gateway.admin_client import AdminClient
from gateway.auth import ApiKeyMiddleware, ApiKeys
from gateway.batches.files import FileStore
from gateway.batches.orphans import remove_orphans
from gateway.batches.runner import BatchRunner
from gateway.client import ControlPlaneClient
from gateway.config import GatewaySettings
from gateway.direct_routes import DirectRoutes, ErrorHandler
from gateway.errors import ApiError
from gateway.messages.errors import error_body
from gateway.metrics import GatewayMetrics
from gateway.middleware import BodyLimitMiddleware, Lifecycle, RequestContextMiddleware
from gateway.responses.serving import ResponsesServing
from gateway.responses.store import ResponseStore
from gateway.responses.stored_events import StoredEvents
from gateway.routes import batches, chat, completions, console, messages, models, ops, pooling, responses, tokens
from gateway.run_directory import RunDirectory
from gateway.serving import Serving
from gateway.store import Store, is_storage_error

_log = structlog.get_logger(__name__)

# For one of several processes to be of use, before it takes connections all the same and answers that it is not.
_SESSION_LIMIT_S = 5.0


def create_app(settings: GatewaySettings) -> FastAPI:
    """`app.state` holds what routes need: `serving`, `client`, `metrics`, `lifecycle`."""
    several = settings.is_one_of_several
    run_directory = None if settings.gateway_run_dir is None else RunDirectory(settings.gateway_run_dir)
    metrics = GatewayMetrics(run_directory)
    lifecycle = Lifecycle()
    client = ControlPlaneClient(settings, metrics)
    admin = AdminClient(settings)
    store = Store(settings.data_dir, shares=several)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await client.start()
        if several:
            # The kernel already deals out connections to this one: they wait, where others would have answered.
            await client.wait_for_session(_SESSION_LIMIT_S)
        else:
            await remove_orphans(store)
        await app.state.responses.start()
        await app.state.batches.start()
        if run_directory is not None and settings.gateway_process is not None:
            run_directory.enter(settings.gateway_process)
        try:
            yield
        finally:
            await app.state.batches.close()
            await app.state.responses.close()
            await admin.close()
            await client.close()
            store.close()

    app = FastAPI(
        title="stepwire",
        version=stepwire.__version__,
        description="OpenAI's REST API over stepwire's control plane.",
        lifespan=lifespan,
        middleware=_middleware(settings, lifecycle, metrics),
        # The pages behind these load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Nothing here records spans; to know that, the framework would read the environment for each request.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.metrics = metrics
    app.state.lifecycle = lifecycle
    app.state.client = client
    app.state.admin = admin
    app.state.serving = Serving(
        client,
        metrics,
        settings.max_batch_prompts,
        settings.sse_keepalive_s,
        refuses_unknown_fields=settings.unknown_fields == "reject",
    )
    kept = ResponseStore(
        store,
        max_responses=settings.responses_max,
        ttl_s=settings.responses_ttl_s,
        process=settings.gateway_process,
    )
    app.state.responses = ResponsesServing(
        app.state.serving,
        kept if settings.responses_store else None,
        StoredEvents(store, max_bytes=settings.responses_events_max_bytes),
        is_one_of_several=several,
    )
    app.state.files = FileStore(store, max_total_bytes=settings.files_max_total_bytes, ttl_s=settings.files_ttl_s)
    app.state.batches = BatchRunner(
        store,
        app.state.files,
        app.state.serving,
        concurrency=settings.batch_concurrency,
        max_lines=settings.batch_max_requests,
        window_s=settings.batch_window_s,
        num_interactive=metrics.num_in_flight,
        is_one_of_several=several,
    )
    app.openapi = functools.partial(openapi.describe, app)  # type: ignore[method-assign]
    for resource in (chat, completions, messages, responses, batches, pooling, models, tokens, ops):
        app.include_router(resource.router)
    if settings.console:
        app.include_router(console.router)
    for kind, handler in _error_handlers().items():
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(Exception, _answer_unexpected)
    return app


def _middleware(settings: GatewaySettings, lifecycle: Lifecycle, metrics: GatewayMetrics) -> list[Middleware]:
    """Outermost first. CORS stands before the key, so that a page learns of a 401 as such."""
    stack = [
        Middleware(
            RequestContextMiddleware,
            lifecycle=lifecycle,
            metrics=metrics,
            max_concurrent_requests=settings.max_concurrent_requests,
        )
    ]
    if settings.cors_origins:
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    stack.append(Middleware(ApiKeyMiddleware, keys=ApiKeys(settings.api_keys)))
    limits = {"/v1/files": settings.files_max_bytes}
    stack.append(Middleware(BodyLimitMiddleware, max_body_bytes=settings.max_body_bytes, larger=limits))
    answered = [resource.router for resource in (chat, completions, messages, responses, pooling, tokens)]
    stack.append(Middleware(DirectRoutes, routers=answered, handlers=_error_handlers()))
    return stack


def _error_handlers() -> dict[type[Exception], ErrorHandler]:
    """What is answered to a request that an endpoint, or routing, has ended with an error."""
    return {
        RequestValidationError: _answer_wrong_parameter,
        ApiError: _answer_api_error,
        HTTPException: _answer_http_exception,
        sqlite3.OperationalError: _answer_unusable_storage,
        OSError: _answer_unusable_storage,
    }


async def _answer_api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return Response(error_body(error, request.scope), error.status, error.headers(), "application/json")


async def _answer_wrong_parameter(request: Request, error: Exception) -> Response:
    """A parameter of the query; bodies are read by ourselves."""
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return await _answer_api_error(request, ApiError(400, f"{name}: {first['msg']}.", param=name))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Routing's own answers: no such route, not this method."""
    if not isinstance(error, HTTPException):
        raise error
    status, path = error.status_code, request.url.path[:200]
    if status == HTTPStatus.NOT_FOUND:
        message = f"There is no route {request.method} {path}. /openapi.json lists those that there are."
        code = "unknown_route"
    elif status == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{request.method} is not allowed on {path}."
        code = "method_not_allowed"
    else:
        message, code = str(error.detail), None
    kind = errors.INVALID_REQUEST if status < 500 else errors.SERVER_ERROR
    return await _answer_api_error(request, ApiError(status, message, type=kind, code=code, headers=error.headers))


async def _answer_unusable_storage(request: Request, error: Exception) -> Response:
    if not is_storage_error(error):
        raise error
    _log.error("nothing can be stored", request_id=request.state.request_id, error=str(error))
    return await _answer_api_error(request, errors.storage_unusable())


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    # The trace is for the log only: Starlette raises the error again, and the server writes it there.
    _log.error("request failed", request_id=request.state.request_id, error=type(error).__name__)
    return await _answer_api_error(request, errors.unexpected())
