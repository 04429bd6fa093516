"""Once a key is set, every route of the application needs it: also those that nobody thought of here."""

from __future__ import annotations

import re
from pathlib import Path

import httpx

from gateway.app import create_app
from gateway.auth import OPEN_PATHS
from gateway.config import GatewaySettings


async def test_every_route_is_closed_without_the_key(tmp_path: Path) -> None:
    app = create_app(GatewaySettings(control_plane=f"unix:{tmp_path}/nobody.sock", api_key=("right",)))  # type: ignore[arg-type]
    documented = [(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods]
    assert len(documented) > 25
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            for method, path in [*documented, ("GET", "/openapi.json"), ("GET", "/nothing")]:
                url = re.sub(r"\{.*?\}", "x", path)
                for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}):
                    status = (await client.request(method, url, headers=headers)).status_code
                    assert (status == 401) == (url not in OPEN_PATHS), (method, url, status)
