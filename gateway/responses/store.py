"""Stored responses: bounded in number and age."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.responses.stored_events import EventPiece, append_events, append_failure
from gateway.store import Store, transaction

# A conversation is read back by its chain of responses; no longer chain is followed.
MAX_CHAIN = 1000


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """`answer` is the response object, `input` the items that were given for it alone; `process` is which of several
    processes has stored it."""

    answer: dict[str, Any]
    input: list[dict[str, Any]]
    previous_id: str | None
    process: int | None = None


class ResponseStore:
    """`process`: which of several processes this is; None: the only one."""

    def __init__(self, store: Store, *, max_responses: int, ttl_s: float, process: int | None = None) -> None:
        self._store = store
        self.process = process
        self._max_responses = max_responses
        self._ttl_s = ttl_s

    async def put(self, stored: StoredResponse, events: EventPiece | None = None) -> None:
        """Write or overwrite, with its first events; the oldest go where there are too many."""
        answer = stored.answer
        row = (
            answer["id"],
            answer["created_at"],
            stored.previous_id,
            answer["status"],
            orjson.dumps(answer),
            orjson.dumps(stored.input),
            self.process,
        )

        def write(connection: sqlite3.Connection) -> None:
            with transaction(connection):
                connection.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)", row)
                if events is not None:
                    append_events(connection, events)
                connection.execute("DELETE FROM responses WHERE created_s < ?", (time.time() - self._ttl_s,))
                connection.execute(
                    "DELETE FROM responses WHERE id IN "
                    "(SELECT id FROM responses ORDER BY created_s DESC, rowid DESC LIMIT -1 OFFSET ?)",
                    (self._max_responses,),
                )

        await self._store.run(write)

    async def update(self, answer: dict[str, Any]) -> bool:
        """Replace the answer of a response that is still there and has not ended; whether it was."""

        def write(connection: sqlite3.Connection) -> bool:
            changed = connection.execute(
                "UPDATE responses SET answer = ?, status = ? WHERE id = ? AND status IN ('queued', 'in_progress')",
                (orjson.dumps(answer), answer["status"], answer["id"]),
            )
            return changed.rowcount > 0

        return await self._store.run(write)

    async def still_running(self, response_ids: Collection[str]) -> set[str]:
        """Those of them that nobody, this process or another, has ended or deleted."""
        marks = ",".join("?" * len(response_ids))

        def read(connection: sqlite3.Connection) -> set[str]:
            rows = connection.execute(
                f"SELECT id FROM responses WHERE status IN ('queued', 'in_progress') AND id IN ({marks})",
                tuple(response_ids),
            )
            return {row[0] for row in rows}

        return await self._store.run(read)

    async def get(self, response_id: str) -> StoredResponse | None:
        oldest_s = time.time() - self._ttl_s

        def read(connection: sqlite3.Connection) -> StoredResponse | None:
            return _read(connection, response_id, oldest_s)

        return await self._store.run(read)

    async def chain(self, response_id: str) -> list[StoredResponse] | None:
        """The response and those before it, oldest first; None if one of them is gone."""
        oldest_s = time.time() - self._ttl_s

        def read(connection: sqlite3.Connection) -> list[StoredResponse] | None:
            found: list[StoredResponse] = []
            wanted: str | None = response_id
            while wanted is not None and len(found) < MAX_CHAIN:
                stored = _read(connection, wanted, oldest_s)
                if stored is None:
                    return None
                found.append(stored)
                wanted = stored.previous_id
            return found[::-1]

        return await self._store.run(read)

    async def delete(self, response_id: str) -> bool:
        def write(connection: sqlite3.Connection) -> bool:
            return connection.execute("DELETE FROM responses WHERE id = ?", (response_id,)).rowcount > 0

        return await self._store.run(write)

    async def fail(self, response_id: str, message: str) -> None:
        """End one that nobody will end otherwise, if it is there and has not ended."""

        def write(connection: sqlite3.Connection) -> None:
            with transaction(connection):
                _fail(connection, "id = ?", (response_id,), message)

        await self._store.run(write)

    async def fail_interrupted(self) -> int:
        """Those that an earlier life of this process was at; how many."""

        def write(connection: sqlite3.Connection) -> int:
            with transaction(connection):
                mine = (self.process, self.process)
                return _fail(connection, "(? IS NULL OR process = ?)", mine, "The server was restarted meanwhile.")

        return await self._store.run(write)


def _fail(connection: sqlite3.Connection, which: str, values: tuple[Any, ...], message: str) -> int:
    """Those of them that have not ended; how many."""
    rows = connection.execute(
        f"SELECT id, answer FROM responses WHERE status IN ('queued', 'in_progress') AND {which}", values
    ).fetchall()
    for response_id, answer in rows:
        failed = orjson.loads(answer) | {"status": "failed", "error": {"code": "server_error", "message": message}}
        append_failure(connection, response_id, failed)
        connection.execute(
            "UPDATE responses SET status = 'failed', answer = ? WHERE id = ?", (orjson.dumps(failed), response_id)
        )
    return len(rows)


def _read(connection: sqlite3.Connection, response_id: str, oldest_s: float) -> StoredResponse | None:
    row = connection.execute(
        "SELECT answer, input, previous_id, process FROM responses WHERE id = ? AND created_s >= ?",
        (response_id, oldest_s),
    ).fetchone()
    return None if row is None else StoredResponse(orjson.loads(row[0]), orjson.loads(row[1]), *row[2:])
