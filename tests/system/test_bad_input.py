"""Input that is too large, too deep or cut short: refused or survived, and the next request is served."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import pytest

from tests.system.conftest import Stack

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
MILLION = 10**6


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=350) as client:
        yield client
        # Nothing of what was sent runs on, and others are served.
        assert client.post(CHAT, json=BODY).status_code == 200
    stack.wait_idle()


@pytest.mark.parametrize(
    ("path", "field", "element"),
    [
        (COMPLETIONS, "prompt", "1"),
        (COMPLETIONS, "prompt", "[1]"),
        (COMPLETIONS, "stop", '"a"'),
        (COMPLETIONS, "stop_token_ids", "1"),
        (COMPLETIONS, "allowed_token_ids", "1"),
        (COMPLETIONS, "bad_words", '"a"'),
        (CHAT, "messages", "1"),
        (CHAT, "tools", "{}"),
        (CHAT, "guided_choice", '"a"'),
        ("/v1/responses", "input", "1"),
        # They are read as a chat's are.
        pytest.param("/v1/messages", "messages", "1", marks=pytest.mark.slow),
        ("/detokenize", "tokens", "9999"),
    ],
)
def test_arrays_of_a_million(http: httpx.Client, path: str, field: str, element: str) -> None:
    known = {"max_tokens": 4, "prompt": "hi"} if path == COMPLETIONS else dict(BODY) if path == CHAT else {}
    known.pop(field, None)
    content = json.dumps(known)[:-1] + (", " if known else "") + f'"{field}": [{",".join([element] * MILLION)}]}}'
    answer = http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 413), answer.text[:300]
    assert len(answer.content) < 4096 and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": list(range(60_000))},
        {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(9000)}},
        {"type": "string", "pattern": "(a|aa|aaa|b){200}" * 40},
        {"type": "array", "items": {"type": "string", "pattern": "^(.{0,999}){99}$"}, "maxItems": 10**9},
        {"anyOf": [{"type": "string", "minLength": number} for number in range(3000)]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}},
    ],
    ids=["enum", "properties", "pattern", "nested counts", "branches", "circle"],
)
def test_schemas_that_explode_are_refused_or_held(http: httpx.Client, schema: dict[str, Any]) -> None:
    answer = http.post(CHAT, json={**BODY, "structured_outputs": {"json": schema}})
    assert answer.status_code in (200, 400), answer.text[:300]
    if answer.status_code == 400:
        # Refused while it is compiled, or ended where a mask became too much work.
        error = answer.json()["error"]
        assert "structured_output" in (error["param"] or "") or "the structured output" in error["message"], error


def exchange(stack: Stack, request: bytes, *, is_half_closed: bool = False) -> bytes:
    with closing(socket.create_connection(("127.0.0.1", stack.port), timeout=120)) as raw:
        try:
            raw.sendall(request)
            if is_half_closed:
                raw.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: raw.recv(65536), b""))
        except ConnectionError:
            return b""


def post_of(content: bytes, *lines: bytes) -> bytes:
    head = [b"POST /v1/chat/completions HTTP/1.1", b"Host: x", b"Content-Type: application/json", b"Connection: close"]
    return b"\r\n".join([*head, b"Content-Length: %d" % len(content), *lines, b"", b""]) + content


@pytest.mark.usefixtures("http")
@pytest.mark.parametrize("line", [b"X-Large: " + b"x" * 2**20, b"", b"X-Odd: \xff\xfe\x00", b"no colon", b": empty"])
def test_headers_that_are_too_large_or_none(stack: Stack, line: bytes) -> None:
    lines = [line] if line else [b"X-%d: x" % number for number in range(50_000)]
    answer = exchange(stack, post_of(json.dumps(BODY).encode(), *lines))
    assert not answer or answer.split(b" ")[1] in (b"200", b"400", b"431"), answer[:200]


@pytest.mark.usefixtures("http")
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_half(stack: Stack, stream: bool) -> None:
    """Whoever says no more may still listen, or be gone: either way nothing is left behind."""
    content = json.dumps({**BODY, "max_tokens": 3000, "ignore_eos": True, "stream": stream}).encode()
    exchange(stack, post_of(content), is_half_closed=True)
    exchange(stack, post_of(content)[:-5], is_half_closed=True)


@pytest.mark.usefixtures("http")
@pytest.mark.parametrize("content", [b'{"messages": "\xff'])
def test_bytes_that_are_no_text(stack: Stack, content: bytes) -> None:
    surrogate = b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}'
    for each in (content, surrogate, b"\x00" * 100, b"\xef\xbb\xbf{}"):
        assert exchange(stack, post_of(each)).split(b" ")[1] in (b"200", b"400")


def test_equal_request_ids_are_requests_of_their_own(http: httpx.Client) -> None:
    def ask(number: int) -> str:
        body = {**BODY, "seed": number, "max_tokens": 30}
        answer = http.post(CHAT, json=body, headers={"x-request-id": "twice"})
        assert answer.headers["x-request-id"] == "twice"
        return str(answer.json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, [1, 2] * 8))
    assert together == [ask(1), ask(2)] * 8
