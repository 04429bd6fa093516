"""OpenAI's /v1/completions with `stream: true`: stepwire's gateway, vLLM, or any other server of that API.

aiohttp, because it is the cheaper client: NOTES.md has what it costs beside httpx.
"""

from __future__ import annotations

import time
from typing import Any, Self

import aiohttp
import orjson

from load_tests.records import RequestRecord
from load_tests.sse import SseParser
from load_tests.target import ServedModelFacts, TargetError, TargetSpec
from load_tests.workload import RequestSpec

_ASK_TIMEOUT_S = 10.0
_DONE = b"[DONE]"
_ERROR_CHARS = 300
_READ_BUFFER_BYTES = 1 << 20


class RestTarget:
    def __init__(self, spec: TargetSpec) -> None:
        self._spec = spec
        self._base_url = spec.address.rstrip("/").removesuffix("/v1") + "/v1"
        self._url = f"{self._base_url}/completions"

    async def __aenter__(self) -> Self:
        headers = {"content-type": "application/json"}
        if self._spec.api_key:
            headers["authorization"] = f"Bearer {self._spec.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_ASK_TIMEOUT_S),
            headers=headers,
            read_bufsize=_READ_BUFFER_BYTES,
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._session.close()

    async def facts(self) -> ServedModelFacts:
        url = f"{self._base_url}/models"
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S)) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TargetError(f"no HTTP server answers at {url} ({error}): is it running there?") from error
        if response.status != 200:
            raise TargetError(f"{url} answers {response.status}: {body[:_ERROR_CHARS].decode(errors='replace')}")
        try:
            models = orjson.loads(body)["data"]
            names = [model["id"] for model in models]
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise TargetError(f"{url} does not answer with OpenAI's list of models: {body[:100]!r}") from error
        if not names:
            raise TargetError(f"{url} lists no model: wait until the server is ready")
        index = names.index(self._spec.model) if self._spec.model in names else 0
        return ServedModelFacts(names[index], models[index].get("max_model_len"))

    def encode(self, spec: RequestSpec) -> bytes:
        body: dict[str, Any] = {
            "model": self._spec.model,
            "prompt": spec.prompt_ids,
            "max_tokens": spec.max_tokens,
            "temperature": self._spec.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._spec.ignore_eos:
            body["ignore_eos"] = True
        return orjson.dumps(body)

    async def send(self, encoded: bytes, record: RequestRecord) -> None:
        record.sent_s = time.monotonic()
        try:
            async with self._session.post(self._url, data=encoded) as response:
                if response.status != 200:
                    body = await response.read()
                    record.error = f"{response.status}: {body[:_ERROR_CHARS].decode(errors='replace')}"
                else:
                    await _read_stream(response, record)
        except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError) as error:
            record.error = f"{type(error).__name__}: {error}"[:_ERROR_CHARS]
        record.ended_s = time.monotonic()


async def _read_stream(response: aiohttp.ClientResponse, record: RequestRecord) -> None:
    clock, feed, loads = time.monotonic, SseParser().feed, orjson.loads
    is_done = False
    async for chunk in response.content.iter_any():
        now_s = clock()
        num_new = 0
        for data in feed(chunk):
            if data == _DONE:
                is_done = True
            else:
                num_new += take_event(loads(data), record)
        if num_new:
            record.arrivals_s.append(now_s)
    if not is_done and record.error is None:
        record.error = "the stream ended without [DONE]"


def take_event(event: dict[str, Any], record: RequestRecord) -> int:
    """Note one event; how many tokens it brought.

    One event counts as one token until the usage says how many there were: a server may put several in one event, or
    hold a token's text back until its characters are whole.
    """
    num_new = 0
    if choices := event.get("choices"):
        choice = choices[0]
        if token_ids := choice.get("token_ids"):
            num_new = len(token_ids)
        elif choice.get("text") or choice.get("finish_reason") is None:
            num_new = 1
        record.num_tokens += num_new
    if usage := event.get("usage"):
        record.num_prompt_tokens = usage["prompt_tokens"]
        record.num_tokens = usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        record.num_cached_tokens = details.get("cached_tokens")
    if error := event.get("error"):
        record.error = (str(error.get("message")) if isinstance(error, dict) else str(error))[:_ERROR_CHARS]
    return num_new
