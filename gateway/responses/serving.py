"""/v1/responses: create, whole, streamed, in the background; what was stored, fetched, followed, cancelled, deleted."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Coroutine, Iterable
from typing import Any

import orjson
import structlog
from starlette.requests import Request
from starlette.responses import Response
from stepwire.v1 import inference_pb2

from gateway.chat_input import read_chat_input
from gateway.convert import GenerationPlan, plan_chat, read_timeout
from gateway.errors import ApiError, made_a_chat
from gateway.field_names import RESPONSE
from gateway.mailbox import SequenceUpdate, UsageTotals
from gateway.middleware import CLIENT_CLOSED_REQUEST
from gateway.responses.background import BackgroundResponses
from gateway.responses.convert import chat_body, input_items
from gateway.responses.following import FollowingResponse
from gateway.responses.output import ResponseOutput, response_object
from gateway.responses.schemas import ResponsesBody
from gateway.responses.store import ResponseStore, StoredResponse
from gateway.responses.stored_events import RUNNING, StoredEvents
from gateway.serving import Serving, read_body
from gateway.store import is_storage_error

_log = structlog.get_logger(__name__)


class ResponsesServing:
    """`store` is None where responses are not kept: then everything that needs one is refused.

    `events` lie in the same store. `is_one_of_several`: other processes read and write it.
    """

    def __init__(
        self,
        serving: Serving,
        store: ResponseStore | None,
        events: StoredEvents,
        *,
        is_one_of_several: bool = False,
    ) -> None:
        self._serving = serving
        self._store = store
        self._background = (
            None if store is None else BackgroundResponses(store, events, is_one_of_several=is_one_of_several)
        )
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        if self._store is not None and (num_failed := await self._store.fail_interrupted()):
            _log.warning("responses of an earlier process will not end", num_responses=num_failed)
        if self._background is not None:
            self._background.start()

    @property
    def num_in_background(self) -> int:
        return 0 if self._background is None else self._background.num_running

    async def wait_idle(self) -> None:
        """Until no response is generated in the background."""
        if self._background is not None:
            await self._background.wait_idle()

    async def close(self) -> None:
        if self._background is not None:
            await self._background.close()
        for task in tuple(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def count_input_tokens(self, request: Request) -> Response:
        """What `create` would count for the same body, and nothing is generated."""
        body = await self._read(request)
        chat = chat_body(body, input_items(body), await self._history(body))
        with made_a_chat(RESPONSE):
            asked = inference_pb2.TokenizeRequest(model=body.model or "", chat=read_chat_input(chat))
        token_ids, _ = await self._serving.client.tokenize(asked, RESPONSE)
        return _json({"object": "response.input_tokens", "input_tokens": len(token_ids)})

    async def _read(self, request: Request) -> ResponsesBody:
        body = await read_body(request, ResponsesBody)
        if self._store is None and (body.background or body.previous_response_id):
            param = "background" if body.background else "previous_response_id"
            raise ApiError(400, f"{param}: this server keeps no responses (--responses-store).", param=param)
        return body

    async def create(self, request: Request) -> Response:
        body = await self._read(request)
        items = input_items(body)
        chat = chat_body(body, items, await self._history(body))
        plan = plan_chat(chat, request.state.request_id, RESPONSE)
        response_id = f"resp_{uuid.uuid4().hex}"
        if body.background and self._background is not None:
            return await self._create_in_background(request, body, plan, response_id, items, self._background)
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
        if chain[-1].answer["status"] in RUNNING:
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
        background: BackgroundResponses,
    ) -> Response:
        generation = self._serving.client.generate(
            plan.requests,
            num_samples=1,
            stream=plan.stream,
            timeout_s=read_timeout(request.headers.get("x-request-timeout")),
            names=plan.names,
        )
        try:
            # A request that is wrong is refused now.
            accepted = await generation.mailbox.accepted()
            answer = response_object(body, response_id, plan.model or accepted[0].model, "queued")
            output = ResponseOutput(dict(answer, output=[]), plan.num_top_logprobs)
            stored = StoredResponse(answer, items, body.previous_response_id)
            await background.begin(generation, output, stored, keeps_events=plan.stream)
        except BaseException:
            generation.cancel()
            raise
        return self._follow(background, response_id, -1) if plan.stream else _json(answer)

    def _follow(self, background: BackgroundResponses, response_id: str, after: int) -> Response:
        serving = self._serving
        return FollowingResponse(background.followers, response_id, after, serving.metrics, serving.sse_keepalive_s)

    # ---- what was stored ----

    async def get(self, response_id: str) -> Response:
        return _json((await self._stored(response_id)).answer)

    async def stream(self, response_id: str, after: int) -> Response:
        """The events of a background response after number `after`, the last one included, whenever it comes."""
        answer = (await self._stored(response_id)).answer
        if self._background is None or not answer["background"]:
            raise _not_streamable("it was not created with background")
        if not await self._background.has_events(response_id):
            raise _not_streamable("it was created without stream, or is so old that its events were dropped")
        return self._follow(self._background, response_id, after)

    async def delete(self, response_id: str) -> Response:
        await self._stored(response_id)
        if self._store is not None:
            await self._store.delete(response_id)
        if self._background is not None:
            self._background.stop(response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, response_id: str) -> Response:
        answer = (await self._stored(response_id)).answer
        if not answer["background"]:
            raise ApiError(400, "Only a response that was created with background can be cancelled.")
        if answer["status"] in RUNNING and self._store is not None:
            cancelled = {**answer, "status": "cancelled"}
            if not await self._store.update(cancelled):
                # It has ended meanwhile.
                return _json((await self._stored(response_id)).answer)
            answer = cancelled
            if self._background is not None:
                self._background.stop(response_id)
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
        store, background = self._store, self._background
        stored = None if store is None else await store.get(response_id)
        if store is not None and background is not None and stored is not None and background.has_lost(stored):
            await store.fail(response_id, "The server failed to store this response.")
            stored = await store.get(response_id)
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


def _not_streamable(why: str) -> ApiError:
    return ApiError(400, f"stream: this response cannot be streamed: {why}. Fetch it without stream.", param="stream")


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
