"""Requests and streamed answers as bytes and lines, for the tests of what the gateway writes."""

from __future__ import annotations

from typing import Any

import httpx

from tests.system.conftest import Stack

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
# With steps of 20 ms this takes far longer than any test waits.
ENDLESS: dict[str, Any] = {**BODY, "max_tokens": 3000}


def data_of(line: str) -> str | None:
    return line.removeprefix("data: ") if line.startswith("data: ") else None


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def open_stream(stack: Stack, body: dict[str, Any], **headers: str) -> tuple[httpx.Client, httpx.Response]:
    """A streamed answer whose first event was read; close the client to disconnect."""
    client = httpx.Client(base_url=stack.url, timeout=120, headers=stack.headers)
    request = client.build_request("POST", CHAT, json={**body, "stream": True}, headers=headers)
    response = client.send(request, stream=True)
    assert response.status_code == 200, response.read()
    return client, response
