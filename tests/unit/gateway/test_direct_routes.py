"""Endpoints that are reached past FastAPI answer as they do through it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.middleware import Middleware

from gateway.app import create_app
from gateway.config import GatewaySettings
from gateway.direct_routes import DirectRoutes

PATHS = ["/direct", "/refused", "/full", "/broken", "/items/7", "/asks?size=3", "/asks", "/nowhere", "/direct/"]


class Refused(Exception):
    pass


async def answer_refused(request: Request, error: Exception) -> Response:
    return Response(f"{request.url.path}: {error}", 418, {"x-told": "yes"})


async def answer_full(request: Request, error: Exception) -> Response:
    return Response("full", 507)


async def answer_unexpected(request: Request, error: Exception) -> Response:
    return Response("unexpected", 500)


HANDLERS = {Refused: answer_refused, OSError: answer_full}


def way_of(request: Request) -> str:
    return "FastAPI's" if "route" in request.scope else "direct"


def router() -> APIRouter:
    made = APIRouter()

    @made.post("/direct")
    async def direct(request: Request) -> Response:
        body = (await request.body()).decode()
        return Response(body, 201, {"x-way": way_of(request)})

    @made.post("/refused")
    async def refused(request: Request) -> Response:
        raise Refused("not today")

    @made.post("/full")
    async def full(request: Request) -> Response:
        raise FileNotFoundError("a kind of OSError")

    @made.post("/broken")
    async def broken(request: Request) -> Response:
        raise KeyError("nobody thought of it")

    @made.post("/items/{item}")
    async def item(request: Request, item: int) -> Response:
        return Response(f"{item}", headers={"x-way": way_of(request)})

    @made.post("/asks")
    async def asks(request: Request, size: int) -> Response:
        return Response(f"{size}", headers={"x-way": way_of(request)})

    return made


@asynccontextmanager
async def client_of(routers: list[APIRouter]) -> AsyncIterator[httpx.AsyncClient]:
    """Of an application in which these routers' endpoints may be reached directly."""
    middleware = [Middleware(DirectRoutes, routers=routers, handlers=HANDLERS)]
    app = FastAPI(middleware=middleware, exception_handlers={**HANDLERS, Exception: answer_unexpected})
    app.include_router(router())
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["POST", "GET", "OPTIONS"])
async def test_both_ways_answer_alike(method: str, path: str) -> None:
    answers = []
    for routers in ([], [router()]):
        async with client_of(routers) as client:
            answer = await client.request(method, path, content=b"hello")
            answer.headers.pop("x-way", None)
            answers.append((answer.status_code, answer.text, answer.headers.items()))
    assert answers[0] == answers[1]


async def test_only_what_takes_the_request_alone_is_direct() -> None:
    async with client_of([router()]) as client:
        ways = [(await client.post(path)).headers["x-way"] for path in ("/direct", "/items/7", "/asks?size=3")]
    assert ways == ["direct", "FastAPI's", "FastAPI's"]


async def test_what_models_answer_is_direct_and_described() -> None:
    app = create_app(GatewaySettings(control_plane="unix:/tmp/nobody.sock"))
    stack = app.build_middleware_stack()
    while not isinstance(stack, DirectRoutes):
        stack = getattr(stack, "app", None) or stack._app  # type: ignore[attr-defined]
    direct = stack._endpoints.keys()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/v1/embeddings"} <= direct
    hidden = {"/rerank", "/v2/rerank", "/score"}
    assert direct - hidden <= app.openapi()["paths"].keys()
