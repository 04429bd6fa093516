"""The web console: one page without a build step, and the samples that its live view shows.

The page itself holds nothing of the server and is open to all; it asks for the key, and everything that it then calls
needs one.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
from functools import cache
from importlib import resources

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from gateway.admin_client import AdminClient
from gateway.errors import ApiError
from gateway.middleware import Lifecycle
from gateway.openapi import error_responses

router = APIRouter(tags=["console"])

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@cache
def _page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers. Its one script and one style are allowed by their hashes, and nothing else is."""
    page = resources.files("gateway").joinpath("console.html").read_bytes()
    script, style = (_hash_of(page, tag) for tag in (b"script", b"style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }
    return page, headers


def _hash_of(page: bytes, tag: bytes) -> str:
    found = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"console.html must have one {tag.decode()} element, not {len(found)}")
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[0]).digest()).decode()}'"


@router.get("/", summary="The web console", include_in_schema=False)
async def console() -> Response:
    page, headers = _page()
    return Response(page, headers=headers, media_type="text/html; charset=utf-8")


@router.get(
    "/console/steps",
    summary="What the last steps held, live, as server-sent events",
    responses={200: {"content": {"text/event-stream": {}}}, **error_responses(401, 404)},
    response_class=Response,
)
async def steps(request: Request) -> Response:
    admin: AdminClient = request.app.state.admin
    if not admin.is_configured:
        raise ApiError(
            404,
            "There is no live view: start the gateway with --control-plane-admin, the address of the control plane's "
            "AdminService.",
            code="no_admin_service",
        )
    return _SampleStream(admin, request.app.state.lifecycle)


class _SampleStream(Response):
    def __init__(self, admin: AdminClient, lifecycle: Lifecycle) -> None:
        super().__init__()
        self._admin = admin
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        writer = asyncio.create_task(self._write(send))
        watcher = asyncio.create_task(_wait_disconnect(receive))
        try:
            await asyncio.wait([writer, watcher], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writer, watcher):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await task

    async def _write(self, send: Send) -> None:
        async with contextlib.aclosing(self._admin.samples()) as samples:
            async for sample in samples:
                if self._lifecycle.draining:
                    break  # a page that looks on holds nothing up
                await send({"type": "http.response.body", "body": b"data: " + sample + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
