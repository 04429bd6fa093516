"""Events in the store: what is read after any number, what is refused, what goes."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.responses.output import event_bytes
from gateway.responses.store import ResponseStore, StoredResponse
from gateway.responses.stored_events import EventPiece, StoredEvents
from gateway.store import Store


@contextmanager
def opened(max_bytes: int = 1 << 20) -> Iterator[tuple[ResponseStore, StoredEvents]]:
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        try:
            yield ResponseStore(store, max_responses=100, ttl_s=1e9), StoredEvents(store, max_bytes=max_bytes)
        finally:
            store.close()


def answer(response_id: str, status: str) -> dict[str, Any]:
    return {"id": response_id, "created_at": 2_000_000_000, "status": status, "output": []}


def piece(response_id: str, first: int, num_events: int, status: str | None = None) -> EventPiece:
    # A text may hold what looks like the end of an event; it is escaped there.
    data = b"".join(event_bytes("x", number, text="\n\n") for number in range(first, first + num_events))
    return EventPiece(response_id, first, num_events, data, None if status is None else answer(response_id, status))


def numbers_in(data: bytes) -> list[int]:
    return [int(number) for number in re.findall(rb'"sequence_number":(\d+)', data)]


async def numbers_after(events: StoredEvents, response_id: str, after: int) -> list[int]:
    found: list[int] = []
    while (page := await events.read(response_id, after)) is not None:
        assert page.first == after + 1
        found += numbers_in(page.data)
        if page.is_last or not page.data:
            break
        assert page.next_number == found[-1] + 1
        after = page.next_number - 1
    return found


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(-1, 70))
def test_what_is_read_after_a_number_is_what_was_written_after_it(sizes: list[int], after: int) -> None:
    async def run() -> None:
        with opened() as (responses, events):
            await responses.put(StoredResponse(answer("a", "queued"), [], None), piece("a", 0, sizes[0]))
            number = sizes[0]
            for size in sizes[1:]:
                assert await events.write([piece("a", number, size)]) == [True]
                number += size
            assert await numbers_after(events, "a", after) == list(range(after + 1, number))
            page = await events.read("a", number - 1)
            assert page is not None and not page.is_last and not page.data
            assert await events.write([piece("a", number, 0, "completed")]) == [True]
            page = await events.read("a", number - 1)
            assert page is not None and page.is_last

    asyncio.run(run())


async def test_more_than_is_read_at_a_time_is_read_in_turns() -> None:
    with opened() as (responses, events):
        await responses.put(StoredResponse(answer("a", "queued"), [], None), piece("a", 0, 2))
        await events.write([piece("a", first, 2) for first in range(2, 1400, 2)])
        await events.write([piece("a", 1400, 1, "completed")])
        first = await events.read("a", 2)
        assert first is not None and not first.is_last and first.next_number < 1400
        assert await numbers_after(events, "a", 2) == list(range(3, 1401))


async def test_what_has_ended_or_is_gone_takes_no_more() -> None:
    with opened() as (responses, events):
        for name in "abc":
            await responses.put(StoredResponse(answer(name, "queued"), [], None), piece(name, 0, 1))
        assert await responses.update(answer("a", "cancelled"))
        assert await responses.delete("b")
        late = [piece(name, 1, 1, "completed") for name in "abcd"]
        assert await events.write(late) == [False, False, True, False]
        assert await numbers_after(events, "a", -1) == [0] and await numbers_after(events, "c", -1) == [0, 1]
        assert await events.states("abcd") == {"a": (1, True), "c": (2, True)}
        stored = await responses.get("a")
        assert stored is not None and stored.answer["status"] == "cancelled"


async def test_who_fails_for_another_reason_has_an_event_for_it_where_it_has_events() -> None:
    with opened() as (responses, events):
        await responses.put(StoredResponse(answer("a", "queued"), [], None), piece("a", 0, 3))
        await responses.put(StoredResponse(answer("b", "in_progress"), [], None))
        assert await responses.fail_interrupted() == 2
        page = await events.read("a", 2)
        assert page is not None and page.is_last and page.data.startswith(b"event: response.failed")
        assert numbers_in(page.data) == [3]
        assert await events.read("b", -1) is None


async def test_the_oldest_that_have_ended_lose_their_events() -> None:
    with opened(max_bytes=1000) as (responses, events):
        for name in "abcd":
            await responses.put(StoredResponse(answer(name, "queued"), [], None), piece(name, 0, 5))
            await events.write([piece(name, 5, 1, "completed" if name in "bd" else "in_progress")])
        assert len(piece("a", 0, 6).data) * 3 > 1000
        assert set(await events.states("abcd")) == {"a", "c"}  # those that run keep theirs
        assert await numbers_after(events, "b", -1) == []
        assert (await responses.get("b")) is not None
