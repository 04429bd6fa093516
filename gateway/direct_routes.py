"""The shortest way from the last middleware to the endpoints that models answer.

FastAPI looks for a route twice, opens three exit stacks and resolves parameters for each request: a quarter of what a
request costs the gateway before it is sent on. An endpoint that takes the request and nothing else needs none of it,
and is found by its path here. All routes stay FastAPI's as well, which describes them, and answers other methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

Endpoint = Callable[[Request], Awaitable[Response]]
ErrorHandler = Callable[[Request, Exception], Awaitable[Response]]


class DirectRoutes:
    """The innermost middleware. `handlers`: by class, what answers an endpoint's errors; others are passed on."""

    def __init__(
        self, app: ASGIApp, routers: Iterable[APIRouter], handlers: Mapping[type[Exception], ErrorHandler]
    ) -> None:
        self._app = app
        self._handlers = handlers
        self._endpoints: dict[str, Endpoint] = {
            route.path: route.endpoint
            for router in routers
            for route in router.routes
            if isinstance(route, APIRoute) and _is_direct(route)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await endpoint(request)
        except Exception as error:
            handler = next((self._handlers[kind] for kind in type(error).__mro__ if kind in self._handlers), None)
            if handler is None:
                raise
            response = await handler(request, error)
        await response(scope, receive, send)


def _is_direct(route: APIRoute) -> bool:
    takes: Any = inspect.signature(route.endpoint).parameters
    return route.methods == {"POST"} and "{" not in route.path and list(takes) == ["request"]
