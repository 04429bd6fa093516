"""Background responses that are streamed, and streams of them that are taken up again, with the official client.

Two gateway processes answer on one port: each operation comes over a new connection, which the kernel gives to either.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.system.conftest import LIMIT_S, Stack, wait_until
from tests.system.gateway_processes import gateways

NUM_PROCESSES = 2
NUM_TOKENS = 64
# With steps of 2 ms a minute.
ENDLESS = 30_000


@pytest.fixture(scope="module")
def several(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    data = tmp_path_factory.mktemp("data")
    flags = ["--gateway-processes", str(NUM_PROCESSES), "--data-dir", str(data)]
    worker_flags = ["--sim-step-ms", "2", "--sim-max-model-len", "32768"]
    with Stack(tiny_model, gateway_flags=flags, worker_flags=worker_flags) as running:
        wait_until(lambda: len(gateways(running)) == NUM_PROCESSES, LIMIT_S, running.logs, every_s=0.2)
        yield running


def store_of(stack: Stack) -> Path:
    return Path(stack.gateway_flags[list(stack.gateway_flags).index("--data-dir") + 1]) / "stepwire.sqlite"


def in_store(stack: Stack, query: str, *values: Any) -> Any:
    with contextlib.closing(sqlite3.connect(store_of(stack))) as connection:
        return connection.execute(query, values).fetchone()[0]


def process_of(stack: Stack, response_id: str) -> int | None:
    """Which of the processes generates it."""
    number: int | None = in_store(stack, "SELECT process FROM responses WHERE id = ?", response_id)
    return number


@contextlib.asynccontextmanager
async def anybody(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    """A client with a connection of its own."""
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0, timeout=120) as client:
        yield client


async def create(client: AsyncOpenAI, num_tokens: int = NUM_TOKENS, **fields: Any) -> Any:
    extra = {"seed": 7, "ignore_eos": True}
    return await client.responses.create(
        **{"model": "tiny", "input": "Hello", "max_output_tokens": num_tokens, "extra_body": extra, **fields}
    )


async def begin(client: AsyncOpenAI, num_tokens: int = NUM_TOKENS) -> tuple[Any, Any]:
    """A background response's stream, and the event that it begins with."""
    stream = await create(client, num_tokens, background=True, stream=True)
    return stream, await anext(aiter(stream))


async def events_after(stack: Stack, response_id: str, number: int | None = None) -> list[dict[str, Any]]:
    """By whichever process answers."""
    after = {} if number is None else {"starting_after": number}
    async with anybody(stack) as client:
        stream = await client.responses.retrieve(response_id, stream=True, **after)  # type: ignore[call-overload]
        return [event.to_dict() async for event in stream]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


async def test_a_stream_is_taken_up_after_any_event_while_it_runs_and_after_its_end(several: Stack) -> None:
    async with anybody(several) as client:
        whole = await create(client)
        stream = await create(client, background=True, stream=True)
        events = [event.to_dict() async for event in stream]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["response.created", "response.queued", "response.in_progress"]
    assert [event["response"]["status"] for event in events[:3]] == ["queued", "queued", "in_progress"]
    assert kinds[-1] == "response.incomplete" and text_of(events) == whole.output_text
    last = events[-1]["response"]
    assert last["background"] and last["usage"]["output_tokens"] == NUM_TOKENS
    # As it is stored, so it was told.
    async with anybody(several) as client:
        assert (await client.responses.retrieve(last["id"])).to_dict() == last
    assert await events_after(several, last["id"]) == events
    for number in range(len(events)):
        assert await events_after(several, last["id"], number) == events[number + 1 :]
    assert await events_after(several, last["id"], len(events) + 100) == []


async def test_who_leaves_comes_back_to_any_process_and_misses_nothing(several: Stack) -> None:
    """The response goes on without its client; another process's events are followed as well as one's own."""
    seen_processes = set()
    for _ in range(12):
        with several.paused():
            async with anybody(several) as client:
                stream, first = await begin(client)
                response_id = first.response.id
                await stream.close()
            following = [asyncio.create_task(events_after(several, response_id, 0)) for _ in range(6)]
        async with asyncio.timeout(LIMIT_S):
            followed = await asyncio.gather(*following)
        assert followed[0][-1]["type"] == "response.incomplete"
        assert followed[0][-1]["response"]["usage"]["output_tokens"] == NUM_TOKENS
        assert [event["sequence_number"] for event in followed[0]] == list(range(1, len(followed[0]) + 1))
        assert all(events == followed[0] for events in followed)
        seen_processes.add(process_of(several, response_id))
        if len(seen_processes) == NUM_PROCESSES:
            break
    assert len(seen_processes) == NUM_PROCESSES


async def test_the_clients_own_helpers_take_a_stream_up_again(several: Stack) -> None:
    """They put the response together from its events, from the first one on."""
    async with anybody(several) as client:
        chosen = {"structured_outputs": {"choice": ["left or right, as it is", "right or left, as it is"]}}
        async with client.responses.stream(model="tiny", input="Hello", background=True, extra_body=chosen) as stream:
            first = await anext(aiter(stream))
    assert first.type == "response.created"
    async with (
        anybody(several) as client,
        client.responses.stream(response_id=first.response.id, starting_after=0) as resumed,
    ):
        numbers = [event.sequence_number async for event in resumed]
        final = await resumed.get_final_response()
    assert numbers == list(range(1, len(numbers) + 1))
    assert final.status == "completed" and final.output_text in chosen["structured_outputs"]["choice"]


async def test_who_follows_is_told_as_it_goes_on(several: Stack) -> None:
    """Not only once it has ended."""
    async with anybody(several) as client:
        stream, first = await begin(client, ENDLESS)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
    number = event.sequence_number
    for _ in range(4):
        async with anybody(several) as client:
            resumed = await client.responses.retrieve(first.response.id, stream=True, starting_after=number)
            for _ in range(20):
                event = await anext(aiter(resumed))
                assert event.sequence_number == number + 1
                number = event.sequence_number
            await resumed.close()
    async with anybody(several) as client:
        assert (await client.responses.retrieve(first.response.id)).status == "in_progress"
        await client.responses.cancel(first.response.id)
    await asyncio.to_thread(several.wait_idle)


@pytest.mark.parametrize("deleting", [False, True])
async def test_what_is_cancelled_or_deleted_ends_for_all_who_follow(several: Stack, deleting: bool) -> None:
    async with anybody(several) as client:
        stream, first = await begin(client, ENDLESS)
        response_id = first.response.id
        following = [asyncio.create_task(events_after(several, response_id)) for _ in range(6)]
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await asyncio.to_thread(several.wait_streams, 1 + len(following))
        async with anybody(several) as another:
            await (another.responses.delete if deleting else another.responses.cancel)(response_id)
        async with asyncio.timeout(LIMIT_S):
            rest = [event.to_dict() async for event in stream]
            followed = await asyncio.gather(*following)
    await asyncio.to_thread(several.wait_idle)
    if deleting:
        for events in (rest, *followed):
            assert (events[-1]["type"], events[-1]["code"]) == ("error", "response_not_found")
            assert events[-1]["sequence_number"] == events[-2]["sequence_number"] + 1
        with pytest.raises(openai.NotFoundError):
            await events_after(several, response_id, 0)
        for table in ("response_events", "response_streams"):
            assert in_store(several, f"SELECT COUNT(*) FROM {table} WHERE id = ?", response_id) == 0
    else:
        # No event says so: OpenAI's has none. The response does.
        told = await events_after(several, response_id)
        assert {event["type"] for event in rest} <= {"response.output_text.delta"}
        assert all(events == told for events in followed) and told[len(told) - len(rest) :] == rest
        async with anybody(several) as client:
            assert (await client.responses.retrieve(response_id)).status == "cancelled"


async def test_a_process_that_dies_ends_its_streams_with_a_failure(several: Stack) -> None:
    """What the client has seen is what it can go on from, to the event that says what has happened."""
    seen: list[dict[str, Any]] = []
    async with anybody(several) as client:
        stream, first = await begin(client, ENDLESS)
        response_id = first.response.id
        number = process_of(several, response_id)
        assert number is not None
        seen.append(first.to_dict())
        with pytest.raises(Exception, match=r"incomplete|closed|reset|Connection"):
            async for event in stream:
                seen.append(event.to_dict())
                if len(seen) == 40:
                    os.kill(gateways(several)[number].pid, signal.SIGKILL)
    await asyncio.to_thread(
        wait_until, lambda: len(gateways(several)) == NUM_PROCESSES, LIMIT_S, several.logs, every_s=0.2
    )
    async with asyncio.timeout(LIMIT_S):
        events = await events_after(several, response_id)
        rest = await events_after(several, response_id, len(seen) - 1)
    assert events == [*seen, *rest]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert rest[-1]["type"] == "response.failed" and "restarted" in rest[-1]["response"]["error"]["message"]
    await asyncio.to_thread(several.wait_idle)


async def test_what_cannot_be_streamed_is_refused(several: Stack) -> None:
    async with anybody(several) as client:
        whole = await create(client)
        unstreamed = await create(client, background=True)
        for response_id, why in ((whole.id, "not created with background"), (unstreamed.id, "without stream")):
            with pytest.raises(openai.BadRequestError, match=why) as refused:
                await client.responses.retrieve(response_id, stream=True)
            assert refused.value.param == "stream"
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve("resp_unknown", stream=True, starting_after=3)
        for query in ({"starting_after": 3}, {"starting_after": -1, "stream": True}):
            with pytest.raises(openai.BadRequestError) as refused:
                await client.responses.retrieve(whole.id, extra_query=query)
            assert refused.value.param == "starting_after"
        with pytest.raises(openai.BadRequestError) as refused:
            await create(client, background=True, stream=True, store=False)
        assert refused.value.param == "background"
        with pytest.raises(openai.BadRequestError) as refused:
            await create(client, 100_000, background=True, stream=True)
        assert refused.value.param == "max_output_tokens"


async def test_what_fails_says_so_in_its_last_event(several: Stack) -> None:
    async with anybody(several) as client:
        with several.paused():
            stream = await create(
                client, ENDLESS, background=True, stream=True, extra_headers={"x-request-timeout": "0.5"}
            )
        events = [event.to_dict() async for event in stream]
    failed = events[-1]
    assert failed["type"] == "response.failed" and failed["response"]["error"]["code"]
    assert await events_after(several, failed["response"]["id"], failed["sequence_number"] - 1) == [failed]


async def test_events_are_bounded_and_responses_stay(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--data-dir", str(tmp_path / "data"), "--responses-events-max-bytes", "40000", "--responses-max", "8"]
    with Stack(tiny_model, gateway_flags=flags, worker_flags=["--sim-step-ms", "1"]) as stack:
        ids = []
        for _ in range(12):
            async with anybody(stack) as client:
                stream = await create(client, background=True, stream=True)
                ids.append([event.to_dict() async for event in stream][-1]["response"]["id"])
        async with anybody(stack) as client:
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(ids[3])
            # Of those that are kept the older ones have lost their events.
            assert (await client.responses.retrieve(ids[4])).status == "incomplete"
            with pytest.raises(openai.BadRequestError, match="dropped"):
                await client.responses.retrieve(ids[4], stream=True)
        assert (await events_after(stack, ids[-1]))[-1]["type"] == "response.incomplete"
        size = in_store(stack, "SELECT SUM(LENGTH(data)) FROM response_events")
        assert 0 < size < 60_000
        assert in_store(stack, "SELECT SUM(num_bytes) FROM response_streams") == size
        assert in_store(stack, "SELECT COUNT(*) FROM response_streams") == 8
