"""The commands' side of a running server: OpenAI's REST API, as any client sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import orjson

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 5.0


class CommandError(Exception):
    """What a command ends with: one line that says what to do."""


class ServerClient:
    """Synchronous: a command asks one thing at a time. `run-batch` has its own, asynchronous one."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.base_url = base_url(url)
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=auth_headers(api_key),
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        )

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        with self._reachable():
            answer = self._http.get("/v1/models", timeout=CONNECT_TIMEOUT_S * 2)
        check(answer)
        models: list[dict[str, Any]] = answer.json()["data"]
        return models

    def check_there(self) -> None:
        """Raises `CommandError` if nobody listens, or the key is wrong; a server that is busy or starts is there."""
        with self._reachable():
            answer = self._http.get("/v1/models", timeout=CONNECT_TIMEOUT_S * 2)
        if answer.status_code in (401, 403):
            check(answer)

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The objects of a streamed answer. Raises `CommandError`, also for an error in its middle."""
        with self._reachable(), self._http.stream("POST", path, json={**body, "stream": True}) as response:
            if response.is_error:
                response.read()
                check(response)
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if not line.startswith("data: ") or data == "[DONE]":
                    continue
                chunk: dict[str, Any] = orjson.loads(data)
                if chunk.get("error"):
                    raise CommandError(chunk["error"]["message"])
                yield chunk

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            raise unreachable(self.base_url, error) from error


def base_url(url: str) -> str:
    """Both `http://host:port` and `http://host:port/v1` are understood."""
    url = url if "://" in url else f"http://{url}"
    return url.rstrip("/").removesuffix("/v1")


def auth_headers(api_key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def unreachable(url: str, error: Exception) -> CommandError:
    return CommandError(
        f"no answer from {url} ({error or type(error).__name__}): start a server with `stepwire serve`, "
        "or name another with --url"
    )


def check(answer: httpx.Response) -> None:
    """Raise `CommandError` with the server's own message for an error status."""
    if not answer.is_error:
        return
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = answer.text[:300]
    if answer.status_code == 401:
        message += " Give it as --api-key or STEPWIRE_API_KEY."
    raise CommandError(f"{answer.request.url.path} answers {answer.status_code}: {message}")
