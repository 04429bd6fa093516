"""/v1/responses with the official client against the real stack."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.system.conftest import Stack

EXTRA = {"seed": 7}


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0, timeout=120) as opened:
        yield opened


async def create(client: AsyncOpenAI, **fields: Any) -> Any:
    return await client.responses.create(
        **{"model": "tiny", "input": "Hello", "max_output_tokens": 16, "extra_body": EXTRA, **fields}
    )


async def test_a_stream_is_well_formed_and_says_what_the_whole_response_says(client: AsyncOpenAI) -> None:
    whole = await create(client)
    assert whole.id.startswith("resp_") and whole.object == "response"
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 16
    assert whole.usage.total_tokens == whole.usage.input_tokens + 16

    events = [event async for event in await create(client, stream=True, include=["message.output_text.logprobs"])]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    text = "".join(delta.delta for delta in deltas)
    assert text == whole.output_text == events[-1].response.output_text == events[-4].text
    assert sum(len(delta.logprobs) for delta in deltas) == 16
    assert len({(delta.item_id, delta.output_index) for delta in deltas}) == 1
    # It was stored before its last event could be read.
    fetched = await client.responses.retrieve(events[-1].response.id)
    assert fetched.output_text == text and fetched.usage == events[-1].response.usage


async def test_conversations_are_a_tree(client: AsyncOpenAI) -> None:
    root = await create(client, input="My name is Ada.", instructions="Be brief.")
    left = await create(client, input="Left?", previous_response_id=root.id)
    right = await create(client, input="Right, a longer question?", previous_response_id=root.id)
    again = await create(client, input="Left?", previous_response_id=root.id)
    # The same history gives the same answer: the other child is not part of it.
    assert again.output_text == left.output_text and again.usage.input_tokens == left.usage.input_tokens
    # And it is the history that a client would send by itself, without the parent's instructions.
    by_hand = await create(
        client,
        input=[
            {"role": "user", "content": "My name is Ada."},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": root.output_text}]},
            {"role": "user", "content": [{"type": "input_text", "text": "Left?"}]},
        ],
    )
    assert by_hand.usage.input_tokens == left.usage.input_tokens and by_hand.output_text == left.output_text
    assert right.previous_response_id == root.id

    listed = await client.responses.input_items.list(left.id)
    assert [item.content[0].text for item in listed.data] == ["Left?"]  # type: ignore[union-attr]
    await client.responses.delete(root.id)
    for missing in (
        client.responses.retrieve(root.id),
        create(client, previous_response_id=root.id),
        create(client, previous_response_id=left.id),
        client.responses.delete(root.id),
    ):
        with pytest.raises(openai.NotFoundError, match="not found"):
            await missing


async def test_what_is_not_stored_is_not_found(client: AsyncOpenAI) -> None:
    answer = await create(client, store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(answer.id)


async def test_background_responses_end_or_are_cancelled(client: AsyncOpenAI, stack: Stack) -> None:
    started = await create(client, background=True)
    assert started.status == "queued" and started.output == []
    async with asyncio.timeout(120):
        while (ended := await client.responses.retrieve(started.id)).status in ("queued", "in_progress"):
            await asyncio.sleep(0.02)
    assert ended.status == "incomplete" and ended.output_text == (await create(client)).output_text

    with stack.paused():
        long = await create(client, background=True, max_output_tokens=3500, extra_body={"ignore_eos": True})
        cancelled = await client.responses.cancel(long.id)
        assert cancelled.status == "cancelled"
    stack.wait_idle()
    assert (await client.responses.retrieve(long.id)).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="background"):
        await client.responses.cancel((await create(client)).id)


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"background": True, "store": False}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
        ({"input": "x" * 5000}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format.schema"),
        ({"tools": [{"type": "function", "name": "two words"}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "instructions": "Be brief.",
                "input": [
                    {"role": "user", "content": "hi"},
                    {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"},
                ],
            },
            "input[1].arguments",
        ),
    ],
)
async def test_what_cannot_be_served_is_named(client: AsyncOpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await create(client, **fields)
    assert refused.value.param == param


async def test_items_of_this_request_are_counted_alone(client: AsyncOpenAI) -> None:
    root = await create(client)
    with pytest.raises(openai.BadRequestError) as refused:
        await create(client, previous_response_id=root.id, input=[{"type": "function_call_output", "output": "x"}])
    assert refused.value.param == "input[0].call_id"


async def test_what_a_chat_takes_beyond_openais_is_taken_here(client: AsyncOpenAI) -> None:
    text = (await create(client)).output_text
    cut = next(character for character in text[4:] if character != "�")
    stopped = await create(client, extra_body={**EXTRA, "stop": [cut], "include_stop_str_in_output": True})
    assert stopped.status == "completed" and stopped.output_text == text[: text.index(cut) + 1]
    chosen = await create(client, extra_body={"structured_outputs": {"choice": ["left", "right"]}})
    assert chosen.output_text in ("left", "right")
    # Frameworks send both whether there are tools or not.
    assert (await create(client, tools=[], tool_choice="auto", parallel_tool_calls=True)).output_text == text


async def test_responses_survive_a_restart_and_are_bounded(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--data-dir", str(tmp_path / "data"), "--responses-max", "3"]
    with Stack(tiny_model, gateway_flags=flags, worker_flags=["--sim-step-ms", "5"]) as stack:
        async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0, timeout=120) as client:
            made = [await create(client) for _ in range(3)]
            running = await create(client, background=True, max_output_tokens=3500, extra_body={"ignore_eos": True})
            stack.kill("gateway")
            stack.start("gateway")
            stack.wait_ready()
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(made[0].id)
            assert (await client.responses.retrieve(made[2].id)).output_text == made[2].output_text
            interrupted = await client.responses.retrieve(running.id)
            assert interrupted.status == "failed" and "restarted" in interrupted.error.message


async def test_what_its_process_has_lost_fails_when_it_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    """A response whose end could not be stored would be in progress for ever."""
    data = tmp_path / "data"
    with Stack(tiny_model, gateway_flags=["--data-dir", str(data)]) as stack:
        async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0, timeout=120) as client:
            stream = await create(client, background=True, stream=True)
            events = [event.to_dict() async for event in stream]
            response_id, last = events[-1]["response"]["id"], events[-1]["sequence_number"]
            with contextlib.closing(sqlite3.connect(data / "stepwire.sqlite")) as store, store:
                store.execute(
                    "UPDATE responses SET status = 'in_progress', answer = replace(answer, 'incomplete', ?)",
                    ("in_progress",),
                )
            following = await client.responses.retrieve(response_id, stream=True, starting_after=last)
            told = [event.to_dict() async for event in following]
            failed = await client.responses.retrieve(response_id)
    assert failed.status == "failed" and "failed to store" in failed.error.message
    assert [(event["type"], event["sequence_number"]) for event in told] == [("response.failed", last + 1)]


async def test_input_tokens_are_those_that_a_response_counts(client: AsyncOpenAI) -> None:
    tool: Any = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}
    first = await create(client)
    asked: list[dict[str, Any]] = [
        {"input": "Hello"},
        {"input": [{"role": "user", "content": "Hello"}], "instructions": "Be brief.", "tools": [tool]},
        {"input": "And now?", "previous_response_id": first.id},
    ]
    counts = []
    for fields in asked:
        counted = await client.responses.input_tokens.count(model="tiny", **fields)
        assert counted.object == "response.input_tokens"
        assert counted.input_tokens == (await create(client, **fields)).usage.input_tokens
        counts.append(counted.input_tokens)
    assert counts[0] < counts[2]
    with pytest.raises(openai.NotFoundError):
        await client.responses.input_tokens.count(model="tiny", input="x", previous_response_id="resp_none")
    with pytest.raises(openai.BadRequestError) as raised:
        await client.responses.input_tokens.count(model="tiny", input=[])
    assert raised.value.param == "input"
