"""/v1/responses: create, whole, streamed or in the background; what was stored, fetched, cancelled, deleted."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import uuid
from collections.abc import Coroutine, Iterable
from typing import Any

import orjson
import structlog
from starlette.requests import Request
from starlette.responses import Response

from gateway.client import Generation
from gateway.convert import GenerationPlan, plan_chat, read_timeout
from gateway.errors import ApiError, internal
from gateway.mailbox import SequenceUpdate, UsageTotals
from gateway.middleware import CLIENT_CLOSED_REQUEST
from gateway.responses.convert import chat_body, input_items, param_names
from gateway.responses.output import ResponseOutput, response_object
from gateway.responses.schemas import ResponsesBody
from gateway.responses.store import ResponseStore, StoredResponse
from gateway.serving import Serving, read_body
from gateway.store import is_storage_error

_log = structlog.get_logger(__name__)

_RUNNING = ("queued", "in_progress")
# How soon a process notices that another one has cancelled or deleted a response of its own.
_FOLLOW_S = 0.25


class ResponsesServing:
    """`store` is None where responses are not kept: then everything that needs one is refused.

    `is_one_of_several`: other processes read and write the same store.
    """

    def __init__(self, serving: Serving, store: ResponseStore | None, *, is_one_of_several: bool = False) -> None:
        self._serving = serving
        self._store = store
        self._is_one_of_several = is_one_of_several
        # Response id -> its generation, of those that run in the background.
        self._background: dict[str, Generation] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        if self._store is not None and (num_failed := await self._store.fail_interrupted()):
            _log.warning("responses of an earlier process will not end", num_responses=num_failed)
        if self._store is not None and self._is_one_of_several:
            self._spawn(self._follow(self._store))

    async def _follow(self, store: ResponseStore) -> None:
        """Stop what other processes were told to stop."""
        while True:
            await asyncio.sleep(_FOLLOW_S)
            if not self._background:
                continue
            mine = tuple(self._background)
            try:
                still_running = await store.still_running(mine)
            except sqlite3.Error:
                _log.exception("the stored responses cannot be read")
                continue
            for response_id in mine:
                generation = self._background.get(response_id)
                if generation is not None and response_id not in still_running:
                    del self._background[response_id]
                    generation.disconnect()

    async def close(self) -> None:
        for generation in self._background.values():
            generation.cancel()
        for task in tuple(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def create(self, request: Request) -> Response:
        body = await read_body(request, ResponsesBody)
        if self._store is None and (body.background or body.previous_response_id):
            param = "background" if body.background else "previous_response_id"
            raise ApiError(400, f"{param}: this server keeps no responses (--responses-store).", param=param)
        items = input_items(body)
        chat = chat_body(body, items, await self._history(body))
        plan = plan_chat(chat, request.state.request_id, param_names(body))
        response_id = f"resp_{uuid.uuid4().hex}"
        if body.background:
            return await self._create_in_background(request, body, plan, response_id, items)
        async with self._serving.generating(request, plan) as (generation, accepted):
            mailbox = generation.mailbox
            if mailbox.disconnected:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            answer = response_object(body, response_id, plan.model or accepted[0].model, "in_progress")
            output = ResponseOutput(answer, plan.num_top_logprobs)
            if plan.stream:
                return self._serving.stream(request, generation, _StoringEvents(output, self, body, items))
            updates = await mailbox.take_all()
            if mailbox.disconnected:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            output.feed(updates[0])
            output.finish(mailbox.usage)
            await self.keep(body, output.answer, items)
            return _json(output.answer)

    async def _history(self, body: ResponsesBody) -> list[dict[str, Any]]:
        """Inputs and outputs of the responses before, oldest first; their instructions are not carried over."""
        if body.previous_response_id is None or self._store is None:
            return []
        chain = await self._store.chain(body.previous_response_id)
        if chain is None:
            raise _not_found(body.previous_response_id, "previous_response_id")
        if chain[-1].answer["status"] in _RUNNING:
            raise ApiError(
                400,
                f"previous_response_id: {body.previous_response_id[:80]} has not ended yet.",
                param="previous_response_id",
            )
        return [item for stored in chain for item in (*stored.input, *stored.answer["output"])]

    async def keep(self, body: ResponsesBody, answer: dict[str, Any], items: list[dict[str, Any]]) -> None:
        if self._store is not None and body.store is not False:
            await self._store.put(StoredResponse(answer, items, body.previous_response_id))

    def keep_later(
        self, body: ResponsesBody, answer: dict[str, Any], items: list[dict[str, Any]]
    ) -> asyncio.Task[None]:
        """From where nothing can be awaited; done once whoever asks, any process, finds it."""
        return self._spawn(self.keep(body, answer, items))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)
        return task

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            trace = None if is_storage_error(error) else error
            _log.error("a response could not be stored", error=str(error), exc_info=trace)

    # ---- in the background ----

    async def _create_in_background(
        self,
        request: Request,
        body: ResponsesBody,
        plan: GenerationPlan,
        response_id: str,
        items: list[dict[str, Any]],
    ) -> Response:
        generation = self._serving.client.generate(
            plan.requests,
            num_samples=1,
            stream=False,
            timeout_s=read_timeout(request.headers.get("x-request-timeout")),
            renames=plan.renames,
        )
        try:
            # A request that is wrong is refused now.
            accepted = await generation.mailbox.accepted()
            answer = response_object(body, response_id, plan.model or accepted[0].model, "queued")
            await self.keep(body, answer, items)
        except BaseException:
            generation.cancel()
            raise
        self._background[response_id] = generation
        self._spawn(
            self._finish_in_background(generation, ResponseOutput(dict(answer, output=[]), plan.num_top_logprobs))
        )
        return _json(answer)

    async def _finish_in_background(self, generation: Generation, output: ResponseOutput) -> None:
        answer = output.answer
        store = self._store
        if store is None:
            return
        answer["status"] = "in_progress"
        try:
            await store.update(answer)
            updates = await generation.mailbox.take_all()
            if generation.mailbox.disconnected:
                return  # cancelled, and stored as that
            output.feed(updates[0])
            output.finish(generation.mailbox.usage)
        except ApiError as error:
            output.finish_failed(error)
        except Exception:
            _log.exception("a background response failed", response_id=answer["id"])
            output.finish_failed(internal())
        finally:
            self._background.pop(answer["id"], None)
            generation.cancel()
        await store.update(answer)

    # ---- what was stored ----

    async def get(self, response_id: str) -> Response:
        return _json((await self._stored(response_id)).answer)

    async def delete(self, response_id: str) -> Response:
        await self._stored(response_id)
        generation = self._background.pop(response_id, None)
        if generation is not None:
            generation.disconnect()
        if self._store is not None:
            await self._store.delete(response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, response_id: str) -> Response:
        answer = (await self._stored(response_id)).answer
        if not answer["background"]:
            raise ApiError(400, "Only a response that was created with background can be cancelled.")
        if answer["status"] in _RUNNING and self._store is not None:
            cancelled = {**answer, "status": "cancelled"}
            if not await self._store.update(cancelled):
                # It has ended meanwhile.
                return _json((await self._stored(response_id)).answer)
            answer = cancelled
            generation = self._background.pop(response_id, None)
            if generation is not None:
                generation.disconnect()
        return _json(answer)

    async def input_items(self, response_id: str, *, limit: int, order: str, after: str | None) -> Response:
        """A page of the items that were given for this response alone, newest first by default."""
        stored = await self._stored(response_id)
        items = stored.input if order == "asc" else stored.input[::-1]
        if after is not None:
            position = next((index for index, item in enumerate(items) if item["id"] == after), None)
            if position is None:
                raise ApiError(400, f"after: there is no item '{after[:80]}'.", param="after")
            items = items[position + 1 :]
        page = items[:limit]
        return _json(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(items) > limit,
            }
        )

    async def _stored(self, response_id: str) -> StoredResponse:
        stored = None if self._store is None else await self._store.get(response_id)
        if stored is None:
            raise _not_found(response_id, None)
        return stored


class _StoringEvents:
    """A stream's events; the response is stored when it ends, before its last event is sent."""

    def __init__(
        self, output: ResponseOutput, serving: ResponsesServing, body: ResponsesBody, items: list[dict[str, Any]]
    ) -> None:
        self._output = output
        self._serving = serving
        self._body = body
        self._items = items
        self._keeping: asyncio.Task[None] | None = None

    @property
    def num_events(self) -> int:
        return self._output.num_events

    def render(self, updates: Iterable[SequenceUpdate]) -> bytes:
        return self._output.render(updates)

    def end(self, usage: UsageTotals) -> bytes:
        events = self._output.end(usage)
        self._keeping = self._serving.keep_later(self._body, self._output.answer, self._items)
        return events

    def fail(self, error: ApiError) -> bytes:
        events = self._output.fail(error)
        self._keeping = self._serving.keep_later(self._body, self._output.answer, self._items)
        return events

    def render_text(self, text: str, num_tokens: int) -> bytes:
        return self._output.render((SequenceUpdate(0, [text], num_tokens),))

    async def settle(self) -> None:
        if self._keeping is not None:
            await asyncio.wait([self._keeping])


def _not_found(response_id: str, param: str | None) -> ApiError:
    return ApiError(404, f"Response with id '{response_id[:80]}' not found.", param=param, code="response_not_found")


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
