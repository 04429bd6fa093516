"""`stepwire run-batch`: a file in OpenAI's batch format, run against a server that is up, without storing it there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx
import orjson

from gateway.batch_lines import BatchLine, LineError, error_line, is_success, read_line, result_line
from gateway.commands.server_client import CONNECT_TIMEOUT_S, CommandError, auth_headers, unreachable

# A server that is full or restarting is asked again, so often and so long.
MAX_ATTEMPTS = 8
MAX_PAUSE_S = 30.0
_RETRIED = (429, 503)


@dataclass(slots=True)
class BatchCounts:
    total: int = 0
    completed: int = 0
    failed: int = 0
    # Done by an earlier run whose output is continued.
    skipped: int = 0


def read_batch_file(path: Path) -> list[BatchLine]:
    """Raises `CommandError` naming the first line that is wrong."""
    lines: list[BatchLine] = []
    seen: set[str] = set()
    for number, text in _numbered_lines(path):
        try:
            line = read_line(text)
        except LineError as error:
            raise CommandError(f"{path}, line {number}: {error}") from error
        if line.custom_id in seen:
            raise CommandError(f"{path}, line {number}: custom_id '{line.custom_id}' stands in an earlier line")
        seen.add(line.custom_id)
        lines.append(line)
    if not lines:
        raise CommandError(f"{path} holds no requests")
    return lines


def finished_ids(path: Path) -> set[str]:
    """custom_ids that an earlier run has answered; a last line that was cut off does not count."""
    if not path.exists():
        return set()
    done = set()
    for _, text in _numbered_lines(path):
        with contextlib.suppress(orjson.JSONDecodeError, TypeError, KeyError):
            done.add(orjson.loads(text)["custom_id"])
    return done


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from error


class BatchRun:
    def __init__(self, url: str, api_key: str | None, *, concurrency: int, on_result: Callable[[bool], None]) -> None:
        self._url = url
        self._api_key = api_key
        self._concurrency = concurrency
        self._on_result = on_result

    async def run(self, lines: list[BatchLine], out: BinaryIO, counts: BatchCounts) -> None:
        """Results are written as they come, each line whole. Raises `CommandError` if the server is not there."""
        queue = iter(lines)
        limits = httpx.Limits(max_connections=self._concurrency)
        async with httpx.AsyncClient(
            base_url=self._url,
            headers=auth_headers(self._api_key),
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=limits,
        ) as client:

            async def work() -> None:
                for line in queue:
                    result, is_ok = await self._answer(client, line)
                    out.write(result)
                    out.flush()
                    counts.completed += is_ok
                    counts.failed += not is_ok
                    self._on_result(is_ok)

            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(lines))):
                    group.create_task(work())

    async def _answer(self, client: httpx.AsyncClient, line: BatchLine) -> tuple[bytes, bool]:
        pause_s = 0.5
        for attempt in range(MAX_ATTEMPTS):
            is_last = attempt == MAX_ATTEMPTS - 1
            try:
                answer = await client.post(line.url, json=line.body)
            except httpx.ConnectError as error:
                if is_last:
                    raise unreachable(self._url, error) from error
            except httpx.TransportError as error:
                if is_last:
                    return error_line(line.custom_id, "connection_lost", str(error) or type(error).__name__), False
            else:
                if answer.status_code not in _RETRIED or is_last:
                    request_id = answer.headers.get("x-request-id", "")
                    result = result_line(line.custom_id, answer.status_code, request_id, _json_of(answer))
                    return result, is_success(answer.status_code)
                with contextlib.suppress(ValueError):
                    pause_s = max(pause_s, float(answer.headers.get("retry-after", "0")))
            await asyncio.sleep(min(pause_s, MAX_PAUSE_S))
            pause_s *= 2
        raise AssertionError("the last attempt returns or raises")


def _json_of(answer: httpx.Response) -> bytes:
    """The answer's body; what is no JSON (a proxy's page) as a string."""
    try:
        orjson.loads(answer.content)
    except orjson.JSONDecodeError:
        return orjson.dumps(answer.text)
    return answer.content
