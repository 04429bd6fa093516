"""Events of background responses, kept as they are generated, so that a stream of them can be taken up again.

A row holds the events of one write, as many as came since the write before, in the bytes in which they are sent. What
is written for a response that has ended, or that was deleted, is refused: its events end where its status says so, and
any process may cancel it. A response's events go with it; where all events together are more than they may be, those of
the oldest response that has ended go first.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.responses.output import event_bytes
from gateway.store import Store, transaction

RUNNING = ("queued", "in_progress")
_IS_RUNNING = "status IN ('queued', 'in_progress')"
# Rows that are read at a time.
_PAGE_ROWS = 256
# How much is written, at most, before all of it is counted again.
_MAX_UNCOUNTED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class EventPiece:
    """What is written of one response at a time: events from number `first` on (none: `data` is empty), and `answer`,
    where it has changed, in the same moment."""

    response_id: str
    first: int
    num_events: int
    data: bytes
    answer: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class EventPage:
    """Events number `first` to `next_number` (without it). `is_last`: no more will come."""

    first: int
    next_number: int
    data: bytes
    is_last: bool


class StoredEvents:
    """`max_bytes`: of all events together, but for those of responses that have not ended."""

    def __init__(self, store: Store, *, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._max_uncounted_bytes = min(_MAX_UNCOUNTED_BYTES, max_bytes // 16)
        # Of this process. The first write counts.
        self._uncounted_bytes = self._max_uncounted_bytes

    async def write(self, pieces: Sequence[EventPiece]) -> list[bool]:
        """Write all in one transaction; for each, whether it was: its response was there and had not ended."""

        def write(connection: sqlite3.Connection) -> list[bool]:
            with transaction(connection):
                written = [_write(connection, piece) for piece in pieces]
                self._uncounted_bytes += sum(len(piece.data) for piece in pieces)
                if self._uncounted_bytes > self._max_uncounted_bytes:
                    _drop_oldest(connection, self._max_bytes)
            if self._uncounted_bytes > self._max_uncounted_bytes:
                self._uncounted_bytes = 0
            return written

        return await self._store.run(write)

    async def read(self, response_id: str, after: int) -> EventPage | None:
        """The next events after number `after`, as many as are read at a time. None: there are none and never will be,
        because the response is gone, was made without a stream, or its events were dropped."""

        def read(connection: sqlite3.Connection) -> EventPage | None:
            # The state before the events: after the end none is added.
            state = _state(connection, response_id)
            if state is None:
                return None
            rows = connection.execute(
                "SELECT first, num_events, data FROM response_events WHERE id = ?1 AND first >= (SELECT COALESCE("
                "MAX(first), 0) FROM response_events WHERE id = ?1 AND first <= ?2) ORDER BY first LIMIT ?3",
                (response_id, after + 1, _PAGE_ROWS),
            ).fetchall()
            data = b"".join(_after(after, first, num_events, data) for first, num_events, data in rows)
            next_number = max(after, rows[-1][0] + rows[-1][1] - 1 if rows else -1) + 1
            return EventPage(after + 1, next_number, data, state.has_ended and next_number >= state.num_events)

        return await self._store.run(read)

    async def states(self, response_ids: Collection[str]) -> dict[str, tuple[int, bool]]:
        """Of those that are there: how many events there are, and whether the response has ended."""
        ids = tuple(response_ids)

        def read(connection: sqlite3.Connection) -> dict[str, tuple[int, bool]]:
            states = ((each, _state(connection, each)) for each in ids)
            return {each: (state.num_events, state.has_ended) for each, state in states if state is not None}

        return await self._store.run(read)


def append_events(connection: sqlite3.Connection, piece: EventPiece) -> None:
    """Within a transaction; nothing where there are none."""
    if not piece.num_events:
        return
    connection.execute(
        "INSERT INTO response_streams VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE "
        "SET num_events = num_events + excluded.num_events, num_bytes = num_bytes + excluded.num_bytes",
        (piece.response_id, time.time(), piece.num_events, len(piece.data)),
    )
    connection.execute(
        "INSERT INTO response_events VALUES (?, ?, ?, ?)",
        (piece.response_id, piece.first, piece.num_events, piece.data),
    )


def append_failure(connection: sqlite3.Connection, response_id: str, answer: dict[str, Any]) -> None:
    """The last event of a response that failed and whose generation can no longer say so; within a transaction."""
    state = _state(connection, response_id)
    if state is not None:
        data = event_bytes("response.failed", state.num_events, response=answer)
        append_events(connection, EventPiece(response_id, state.num_events, 1, data))


@dataclass(frozen=True, slots=True)
class _State:
    num_events: int
    has_ended: bool


def _state(connection: sqlite3.Connection, response_id: str) -> _State | None:
    row = connection.execute(
        f"SELECT response_streams.num_events, NOT {_IS_RUNNING} FROM response_streams JOIN responses USING (id) "
        "WHERE id = ? AND num_bytes > 0",
        (response_id,),
    ).fetchone()
    return None if row is None else _State(row[0], bool(row[1]))


def _write(connection: sqlite3.Connection, piece: EventPiece) -> bool:
    is_running = connection.execute(
        f"SELECT 1 FROM responses WHERE id = ? AND {_IS_RUNNING}", (piece.response_id,)
    ).fetchone()
    if is_running is None:
        return False
    append_events(connection, piece)
    if piece.answer is not None:
        connection.execute(
            "UPDATE responses SET answer = ?, status = ? WHERE id = ?",
            (orjson.dumps(piece.answer), piece.answer["status"], piece.response_id),
        )
    return True


def _after(after: int, first: int, num_events: int, data: bytes) -> bytes:
    """Of a row's events those with a higher number."""
    num_before = after + 1 - first
    if num_before <= 0:
        return data
    if num_before >= num_events:
        return b""
    return data.split(b"\n\n", num_before)[num_before]


def _drop_oldest(connection: sqlite3.Connection, max_bytes: int) -> None:
    total = connection.execute("SELECT COALESCE(SUM(num_bytes), 0) FROM response_streams").fetchone()[0]
    if total <= max_bytes:
        return
    ended = connection.execute(
        f"SELECT id, num_bytes FROM response_streams JOIN responses USING (id) WHERE num_bytes > 0 "
        f"AND NOT {_IS_RUNNING} ORDER BY response_streams.created_s"
    ).fetchall()
    for response_id, num_bytes in ended:
        if total <= max_bytes:
            break
        connection.execute("DELETE FROM response_events WHERE id = ?", (response_id,))
        # The row stays: it says that there were events.
        connection.execute("UPDATE response_streams SET num_bytes = 0 WHERE id = ?", (response_id,))
        total -= num_bytes
