"""Responses that are generated in the background, whether anybody waits for them or not.

What has come of a response is written to the store in turns: one transaction for all responses of this process, and the
next one a moment later with all that has come meanwhile. So the disk is not asked for every token, the tokens of a turn
are one event, and a store that is slow or full delays writing and nothing else. Where it cannot be written, the same is
tried again until it can.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from typing import Any

import structlog

from gateway.client import Generation
from gateway.errors import internal
from gateway.responses.following import Followers
from gateway.responses.output import ResponseOutput
from gateway.responses.store import ResponseStore, StoredResponse
from gateway.responses.stored_events import RUNNING, EventPage, EventPiece, StoredEvents
from gateway.store import StoreGoneError, is_storage_error

_log = structlog.get_logger(__name__)

# At least so long between two transactions: fifty a second are nothing to the disk, and look like a stream to a reader.
_TURN_S = 0.02
_RETRY_S = 0.5
# How soon a process notices that another one has cancelled or deleted a response of its own.
_FOLLOW_S = 0.25
# What those that were just cut off may take to be stored as failed.
_CUT_OFF_S = 1.0


class EventTurns:
    """Writes what all responses of the process have to write, in turns."""

    def __init__(self, events: StoredEvents) -> None:
        self._events = events
        self._waiting: list[tuple[EventPiece, asyncio.Future[bool]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def write(self, piece: EventPiece) -> bool:
        """Return once it is stored, or has been refused (False): somebody has ended the response.

        Raises whatever trying again would not help against.
        """
        written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((piece, written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all())
        return await written

    async def close(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._writing

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                turn, self._waiting = self._waiting, []
                outcome = await self._write_turn([piece for piece, _ in turn])
                for index, (_, written) in enumerate(turn):
                    if written.done():
                        continue  # its response was given up
                    if isinstance(outcome, Exception):
                        written.set_exception(outcome)
                    else:
                        written.set_result(outcome[index])
                await asyncio.sleep(_TURN_S)
        finally:
            self._writing = None

    async def _write_turn(self, pieces: list[EventPiece]) -> list[bool] | Exception:
        was_told = False
        while True:
            try:
                return await self._events.write(pieces)
            except Exception as error:
                # No waiting brings a directory back.
                if not is_storage_error(error) or isinstance(error, StoreGoneError):
                    return error
                if not was_told:
                    _log.error("background responses wait until they can be stored", error=str(error))
                was_told = True
                await asyncio.sleep(_RETRY_S)


class BackgroundResponses:
    """Those of this process. `is_one_of_several`: other processes may be told to end them."""

    def __init__(self, store: ResponseStore, events: StoredEvents, *, is_one_of_several: bool) -> None:
        self.followers = Followers(events)
        self._store = store
        self._events = events
        self._turns = EventTurns(events)
        self._is_one_of_several = is_one_of_several
        # Response id -> its generation; None while it is being stored for the first time.
        self._running: dict[str, Generation | None] = {}
        self._generating: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._is_one_of_several:
            self._watching = asyncio.create_task(self._stop_what_others_have_ended())

    @property
    def num_running(self) -> int:
        return len(self._generating)

    async def wait_idle(self) -> None:
        """Until none is generated: what was begun here nobody else goes on with."""
        while self._generating:
            await asyncio.wait(self._generating)

    async def close(self) -> None:
        if self._generating:
            await asyncio.wait(self._generating, timeout=_CUT_OFF_S)
        for generation in self._running.values():
            if generation is not None:
                generation.cancel()
        for task in (*self._generating, *((self._watching,) if self._watching else ())):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._turns.close()
        await self.followers.close()

    def has_lost(self, stored: StoredResponse) -> bool:
        """Whether a response that was read is this process's and will not end, because its end could not be stored."""
        answer = stored.answer
        is_mine = stored.process == self._store.process
        return answer["status"] in RUNNING and is_mine and answer["id"] not in self._running

    async def has_events(self, response_id: str) -> bool:
        return bool(await self._events.states((response_id,)))

    async def begin(
        self, generation: Generation, output: ResponseOutput, stored: StoredResponse, *, keeps_events: bool
    ) -> None:
        """Store an accepted one as queued, with its first events, and have it generated. Raises what storing raises."""
        response_id = output.answer["id"]
        background = _Background(generation, output, self._turns, self.followers, keeps_events)
        self._running[response_id] = None
        try:
            await self._store.put(stored, background.first_piece())
        except BaseException:
            del self._running[response_id]
            raise
        self._running[response_id] = generation
        self.followers.begin(response_id)
        task = asyncio.create_task(self._run(background, generation, response_id))
        self._generating.add(task)
        task.add_done_callback(self._generating.discard)

    async def _run(self, background: _Background, generation: Generation, response_id: str) -> None:
        try:
            await background.generate()
        except StoreGoneError as error:
            _log.error("a background response is lost", response_id=response_id, error=str(error))
        except Exception:
            _log.exception("a background response failed", response_id=response_id)
            await self._store.fail(response_id, internal().message)
        finally:
            generation.cancel()
            self._running.pop(response_id, None)
            self.followers.end(response_id)

    def stop(self, response_id: str) -> None:
        """The store says that it has ended, or is gone."""
        generation = self._running.get(response_id)
        if generation is not None:
            generation.disconnect()
        self.followers.tell(response_id, None)

    async def _stop_what_others_have_ended(self) -> None:
        while True:
            await asyncio.sleep(_FOLLOW_S)
            mine = [response_id for response_id, generation in self._running.items() if generation is not None]
            if not mine:
                continue
            try:
                still_running = await self._store.still_running(mine)
            except sqlite3.Error:
                _log.exception("the stored responses cannot be read")
                continue
            for response_id in set(mine) - still_running:
                self.stop(response_id)


class _Background:
    """From what comes of one generation to what is written and told."""

    def __init__(
        self,
        generation: Generation,
        output: ResponseOutput,
        turns: EventTurns,
        followers: Followers,
        keeps_events: bool,
    ) -> None:
        self._generation = generation
        self._output = output
        self._turns = turns
        self._followers = followers
        self._keeps_events = keeps_events
        # Of the events that were not written yet the first one's number.
        self._next_number = 0

    def first_piece(self) -> EventPiece:
        return self._piece(self._output.queue())

    async def generate(self) -> None:
        """To its end, or until it is ended by somebody else."""
        mailbox = self._generation.mailbox
        if not await self._write(self._output.begin(), has_changed=True):
            return
        news = asyncio.Event()
        news.set()
        mailbox.on_news = news.set
        while not mailbox.ended:
            await news.wait()
            news.clear()
            data = self._output.render(mailbox.take_updates())
            if data and not await self._write(data):
                return
        if mailbox.disconnected:
            return
        data = self._output.render(mailbox.take_updates())
        data += self._output.end(mailbox.usage) if mailbox.error is None else self._output.fail(mailbox.error)
        await self._write(data, has_changed=True, is_last=True)

    def _piece(self, data: bytes, answer: dict[str, Any] | None = None) -> EventPiece:
        first, self._next_number = self._next_number, self._output.num_events
        if not self._keeps_events:
            return EventPiece(self._output.answer["id"], 0, 0, b"", answer)
        return EventPiece(self._output.answer["id"], first, self._next_number - first, data, answer)

    async def _write(self, data: bytes, *, has_changed: bool = False, is_last: bool = False) -> bool:
        """False: somebody else has ended it. `has_changed`: other than by output, which only the end stores."""
        piece = self._piece(data, self._output.answer if has_changed else None)
        if not piece.num_events and not has_changed:
            return True
        if not await self._turns.write(piece):
            return False
        if piece.num_events:
            page = EventPage(piece.first, piece.first + piece.num_events, piece.data, is_last)
            self._followers.tell(piece.response_id, page)
        return True
