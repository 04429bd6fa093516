"""A stream of a background response's events, from the store and then as they come, in any process.

Only what is stored is sent: what a client has seen it can go on from, whatever has died since. Where the response is
generated in this process, its followers are handed what was written; of another process's they ask the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncGenerator

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway import errors, sse
from gateway.errors import ApiError
from gateway.metrics import GatewayMetrics
from gateway.responses.output import event_bytes
from gateway.responses.stored_events import EventPage, StoredEvents
from gateway.store import StoreGoneError, is_storage_error
from gateway.streaming import STREAM_HEADERS

_log = structlog.get_logger(__name__)

# How often the store is asked for events of other processes.
_POLL_S = 0.05


class _Follower:
    """What one stream was told since it last waited; whoever is told twice reads the store instead."""

    def __init__(self) -> None:
        self._told = asyncio.Event()
        self._page: EventPage | None = None

    def tell(self, page: EventPage | None) -> None:
        self._page = None if self._told.is_set() else page
        self._told.set()

    async def wait(self, limit_s: float | None) -> EventPage | None:
        """Raises `TimeoutError`."""
        await asyncio.wait_for(self._told.wait(), limit_s)
        self._told.clear()
        page, self._page = self._page, None
        return page


class Followers:
    """Who follows which response in this process."""

    def __init__(self, events: StoredEvents) -> None:
        self._events = events
        self._by_id: dict[str, set[_Follower]] = {}
        # Those that this process generates.
        self._own: set[str] = set()
        self._polling: asyncio.Task[None] | None = None

    def begin(self, response_id: str) -> None:
        """This process generates it, and will tell."""
        self._own.add(response_id)

    def end(self, response_id: str) -> None:
        """Nothing more will be told of it."""
        self._own.discard(response_id)
        self.tell(response_id, None)

    def tell(self, response_id: str, page: EventPage | None) -> None:
        """What was written last; None: something has changed, look into the store."""
        for follower in self._by_id.get(response_id, ()):
            follower.tell(page)

    async def close(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._polling

    async def follow(self, response_id: str, after: int, pause_s: float | None) -> AsyncGenerator[EventPage | None]:
        """Events after number `after`, to the last one, and None whenever none has come for `pause_s`.

        Raises:
            ApiError: they have gone, and no event says so.
        """
        follower = _Follower()
        self._by_id.setdefault(response_id, set()).add(follower)
        try:
            next_number = after + 1
            while True:
                self._poll_where_needed()
                page = await self._events.read(response_id, next_number - 1)
                if page is None:
                    raise ApiError(
                        404, "The response was deleted, or its events were dropped.", code="response_not_found"
                    )
                if page.data:
                    yield page
                if page.is_last:
                    return
                next_number = page.next_number
                if page.data:
                    continue  # there may be more than is read at a time
                while True:
                    try:
                        told = await follower.wait(pause_s)
                    except TimeoutError:
                        yield None
                        continue
                    if told is None or told.first != next_number:
                        break
                    yield told
                    if told.is_last:
                        return
                    next_number = told.next_number
        finally:
            self._by_id[response_id].discard(follower)
            if not self._by_id[response_id]:
                del self._by_id[response_id]

    def _poll_where_needed(self) -> None:
        if self._polling is None and self._by_id.keys() - self._own:
            self._polling = asyncio.create_task(self._poll())

    async def _poll(self) -> None:
        """Ask for what other processes have written, while somebody follows them."""
        known: dict[str, tuple[int, bool] | None] = {}
        was_logged = False
        try:
            while others := self._by_id.keys() - self._own:
                try:
                    states = await self._events.states(others)
                except StoreGoneError:
                    # Each learns it by reading, and tells its client.
                    for each in others:
                        self.tell(each, None)
                except sqlite3.Error:
                    if not was_logged:
                        _log.exception("the stored events cannot be read")
                    was_logged = True
                else:
                    was_logged = False
                    for each in others:
                        if known.get(each, (0, False)) != states.get(each):
                            self.tell(each, None)
                    known = {each: states.get(each) for each in others}
                await asyncio.sleep(_POLL_S)
        finally:
            self._polling = None


class FollowingResponse(Response):
    """The events after number `after` as they are stored. The client may leave: the response goes on."""

    def __init__(
        self, followers: Followers, response_id: str, after: int, metrics: GatewayMetrics, keepalive_s: float
    ) -> None:
        super().__init__()
        self._followers = followers
        self._response_id = response_id
        self._next_number = after + 1
        self._metrics = metrics
        self._pause_s = keepalive_s or None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.open_streams.inc()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            sending = asyncio.create_task(self._send_all(send))
            leaving = asyncio.create_task(_disconnect(receive))
            try:
                await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (sending, leaving):
                    task.cancel()
                await asyncio.wait((sending, leaving))
            if not sending.cancelled():
                sending.result()
        finally:
            self._metrics.open_streams.dec()

    async def _send_all(self, send: Send) -> None:
        try:
            following = self._followers.follow(self._response_id, self._next_number - 1, self._pause_s)
            async with contextlib.aclosing(following) as pages:
                async for page in pages:
                    if page is None:
                        await self._send(send, sse.KEEP_ALIVE, 0)
                        continue
                    self._next_number = page.next_number
                    await self._send(send, page.data, page.next_number - page.first)
        except ApiError as error:
            await self._send(send, self._error(error), 1)
        except (OSError, sqlite3.Error) as error:
            if not is_storage_error(error):
                raise
            _log.error("stored events cannot be read", response_id=self._response_id, error=str(error))
            await self._send(send, self._error(errors.storage_unusable()), 1)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _error(self, error: ApiError) -> bytes:
        return event_bytes("error", self._next_number, code=error.code, message=error.message, param=None)

    async def _send(self, send: Send, data: bytes, num_events: int) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._metrics.count_streamed(num_events, len(data), 1)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
