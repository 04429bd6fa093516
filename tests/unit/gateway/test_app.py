"""The application without a control plane: what is answered before one is needed, and that it says so when one is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from gateway.app import create_app
from gateway.config import GatewaySettings
from gateway.middleware import route_label

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}]}


@asynccontextmanager
async def client_for(tmp_path: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(GatewaySettings(control_plane=f"unix:{tmp_path}/nobody.sock", **settings))
    async with app.router.lifespan_context(app), http_client(app) as client:
        yield client


def http_client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://gateway")


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error


async def test_health_is_liveness_and_ready_needs_the_control_plane(tmp_path: Path) -> None:
    async with client_for(tmp_path) as client:
        assert (await client.get("/health")).status_code == 200
        ready = await client.get("/ready")
        assert ready.status_code == 503 and ready.headers["retry-after"] == "1"
        error_of(ready)


async def test_without_a_control_plane_requests_are_retryable(tmp_path: Path) -> None:
    async with client_for(tmp_path) as client:
        for response in (await client.post(CHAT, json=BODY), await client.get("/v1/models")):
            assert response.status_code == 503, response.text
            assert response.headers["retry-after"] == "1"
            assert "nobody.sock" not in response.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("POST", CHAT),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
        ("DELETE", CHAT),
    ],
)
async def test_every_route_needs_the_key_once_one_is_set(tmp_path: Path, method: str, path: str) -> None:
    async with client_for(tmp_path, api_key=["k1", "k2"]) as client:
        for headers in ({}, {"authorization": "Bearer nope"}, {"authorization": "k1"}, {"authorization": "Basic k1"}):
            refused = await client.request(method, path, headers=headers)
            assert refused.status_code == 401
            assert error_of(refused)["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
            assert "x-request-id" in refused.headers
        for headers in ({"authorization": "Bearer k1"}, {"authorization": "bEARER  k2 "}):
            assert (await client.request(method, path, headers=headers)).status_code != 401


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/ready"), ("OPTIONS", CHAT)])
async def test_probes_and_preflights_need_no_key(tmp_path: Path, method: str, path: str) -> None:
    async with client_for(tmp_path, api_key=["k"]) as client:
        assert (await client.request(method, path)).status_code != 401


async def test_without_keys_any_authorization_is_accepted(tmp_path: Path) -> None:
    async with client_for(tmp_path) as client:
        assert (await client.get("/metrics", headers={"authorization": "Bearer whatever"})).status_code == 200


async def test_unknown_routes_and_wrong_methods(tmp_path: Path) -> None:
    async with client_for(tmp_path) as client:
        missing = await client.get("/v1/nothing")
        assert (missing.status_code, error_of(missing)["code"]) == (404, "unknown_route")
        wrong = await client.get(CHAT)
        assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b'"text"', "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"3", "application/json", 400),
        (b"null", "application/json", 400),
        (b'{"messages": "\xff"}', "application/json", 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "application/json", 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"a":' * 10_000, "application/json", 400),
        (b"{}", "application/x-www-form-urlencoded", 415),
        (b"{}", "text/plain", 415),
        (b"{}", None, 415),
    ],
)
async def test_bodies_that_are_no_json_object(
    tmp_path: Path, content: bytes, content_type: str | None, status: int
) -> None:
    headers = {"content-type": content_type} if content_type else {}
    async with client_for(tmp_path) as client:
        for path in (CHAT, "/v1/completions"):
            response = await client.post(path, content=content, headers=headers)
            assert response.status_code == status
            assert error_of(response)["type"] == "invalid_request_error"


async def test_bodies_above_the_limit(tmp_path: Path) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 10

    async with client_for(tmp_path, max_body_bytes=100) as client:
        announced = await client.post(CHAT, content=b"x" * 101, headers={"content-type": "application/json"})
        streamed = await client.post(CHAT, content=pieces(), headers={"content-type": "application/json"})
        for response in (announced, streamed):
            assert response.status_code == 413
            assert "100" in error_of(response)["message"]
        allowed = await client.post(CHAT, content=b"x" * 100, headers={"content-type": "application/json"})
        assert allowed.status_code == 400


async def test_request_ids_are_echoed_or_made(tmp_path: Path) -> None:
    async with client_for(tmp_path) as client:
        assert (await client.get("/health", headers={"x-request-id": "mine"})).headers["x-request-id"] == "mine"
        made = [(await client.get("/health")).headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1]
        odd = await client.get("/nowhere", headers={"x-request-id": "a" * 500})
        assert odd.headers["x-request-id"] != "a" * 500


async def test_cors_is_closed_by_default(tmp_path: Path) -> None:
    headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
    async with client_for(tmp_path) as client:
        for response in (await client.options(CHAT, headers=headers), await client.get("/health", headers=headers)):
            assert "access-control-allow-origin" not in response.headers
    async with client_for(tmp_path, cors_origins=["https://page.example"], api_key=["k"]) as client:
        preflight = await client.options(CHAT, headers=headers)
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        assert {"GET", "POST", "DELETE"} <= set(preflight.headers["access-control-allow-methods"].split(", "))
        refused = await client.get("/v1/models", headers={"origin": "https://page.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"
        other = await client.options(CHAT, headers={**headers, "origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_an_unexpected_failure_is_a_500_without_traces(tmp_path: Path) -> None:
    app = create_app(GatewaySettings(control_plane=f"unix:{tmp_path}/nobody.sock"))

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("secret at 0x7f")

    async with http_client(app) as client:
        response = await client.get("/broken")
        assert response.status_code == 500
        assert error_of(response)["code"] == "internal_error"
        # The HTTP server closes it, which a client that would send its next request on it has to know.
        assert response.headers["connection"] == "close"
        assert "secret" not in response.text
        assert (await client.get("/health")).status_code == 200


async def test_metrics_count_routes_not_paths(tmp_path: Path) -> None:
    async with client_for(tmp_path) as client:
        for path in ("/health", "/v1/models/a/b", "/x/1", "/x/2"):
            await client.get(path)
        text = (await client.get("/metrics")).text
    assert 'stepwire_gateway_http_requests_total{code="404",route="other"} 2.0' in text
    assert 'stepwire_gateway_http_requests_total{code="503",route="/v1/models/{model}"} 1.0' in text
    assert 'stepwire_gateway_http_request_duration_seconds_count{route="/health"} 1.0' in text
    for name in (
        "stepwire_gateway_open_streams 0.0",
        "stepwire_gateway_sse_events_total 0.0",
        "stepwire_gateway_sse_bytes_total 0.0",
        "stepwire_gateway_control_plane_reconnects_total 0.0",
        "stepwire_gateway_control_plane_connected 0.0",
        "process_cpu_seconds_total",
    ):
        assert name in text


@pytest.mark.parametrize(
    ("path", "label"),
    [(CHAT, CHAT), ("/v1/models", "/v1/models"), ("/v1/models/x/y", "/v1/models/{model}"), ("/../etc", "other")],
)
def test_route_labels(path: str, label: str) -> None:
    assert route_label(path) == label


async def test_more_requests_than_allowed_at_a_time_are_429(tmp_path: Path) -> None:
    async with client_for(tmp_path, max_concurrent_requests=1) as client:
        reading, release = asyncio.Event(), asyncio.Event()

        async def slow_body() -> AsyncIterator[bytes]:
            reading.set()
            await release.wait()
            yield b"{}"

        headers = {"content-type": "application/json"}
        first = asyncio.ensure_future(client.post(CHAT, content=slow_body(), headers=headers))
        await reading.wait()
        second = await client.post(CHAT, json=BODY)
        assert (second.status_code, error_of(second)["code"]) == (429, "too_many_requests")
        assert second.headers["retry-after"] == "1"
        # Probes are answered all the same.
        assert (await client.get("/health")).status_code == 200
        release.set()
        assert (await first).status_code == 400


async def test_openapi_describes_bodies_and_errors(tmp_path: Path) -> None:
    async with client_for(tmp_path) as client:
        document = (await client.get("/openapi.json")).json()
    operation = document["paths"][CHAT]["post"]
    assert operation["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/ChatCompletionBody"
    }
    schemas = document["components"]["schemas"]
    assert "messages" in schemas["ChatCompletionBody"]["required"]
    assert operation["responses"]["400"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/ErrorAnswer"
    }
    referenced = set(_references(document))
    assert {name.rpartition("/")[2] for name in referenced} <= set(schemas)


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [found for value in node.values() for found in _references(value)]
    if isinstance(node, list):
        return [found for value in node for found in _references(value)]
    return []
