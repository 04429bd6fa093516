"""The official `anthropic` client against the real stack."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import AsyncAnthropic
from pydantic import BaseModel, ConfigDict

from tests.system.conftest import LIMIT_S, Stack

ASKED = [{"role": "user", "content": "What is the capital of France?"}]
EXTRA = {"seed": 7}


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=stack.url, api_key="any", max_retries=0, timeout=120) as opened:
        yield opened


async def test_a_stream_says_what_the_whole_message_says(client: AsyncAnthropic) -> None:
    fields = {"model": "tiny", "max_tokens": 24, "messages": ASKED, "system": "Be brief.", "extra_body": EXTRA}
    whole = await client.messages.create(**fields)
    assert whole.type == "message" and whole.role == "assistant" and whole.model == "tiny"
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 24
    async with client.messages.stream(**fields) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 24

    # A character that came, as a stop sequence: the text ends before it, and the message says which it was.
    cut = next(character for character in text[4:] if character != "�")
    stopped = await client.messages.create(**{**fields, "stop_sequences": [cut]})
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", cut)
    assert "".join(block.text for block in stopped.content) == text[: text.index(cut)]


async def test_counted_tokens_are_those_that_are_used(client: AsyncAnthropic) -> None:
    counted = await client.messages.count_tokens(model="tiny", messages=ASKED, system="Be brief.")
    answer = await client.messages.create(model="tiny", messages=ASKED, system="Be brief.", max_tokens=1)
    assert counted.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


async def test_errors_have_anthropics_shape(client: AsyncAnthropic, stack: Stack) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        await client.messages.create(model="nobody", messages=ASKED, max_tokens=1)
    assert unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError, match="at least 1"):
        await client.messages.create(model="tiny", messages=[], max_tokens=1)
    async with httpx.AsyncClient(base_url=stack.url, timeout=LIMIT_S) as raw:
        for answer in (
            await raw.post("/v1/messages", json={"max_tokens": 1}),
            await raw.post("/v1/messages", content=b"\xff", headers={"content-type": "application/json"}),
            await raw.get("/v1/messages"),
        ):
            body = answer.json()
            assert 400 <= answer.status_code < 500
            assert body["type"] == "error" and body["error"]["message"]
            assert body["request_id"] == answer.headers["x-request-id"]


class Sizes(BaseModel):
    model_config = ConfigDict(extra="forbid")
    is_large: bool
    is_heavy: bool


async def test_a_message_is_parsed_as_the_format_says(client: AsyncAnthropic) -> None:
    fields = {"model": "tiny", "max_tokens": 400, "messages": ASKED, "output_format": Sizes, "extra_body": EXTRA}
    whole = await client.messages.parse(**fields)
    assert whole.stop_reason == "end_turn" and isinstance(whole.parsed_output, Sizes)
    async with client.messages.stream(**fields) as stream:
        assert (await stream.get_final_message()).parsed_output == whole.parsed_output


TOOL = {"name": "two words", "input_schema": {"type": "object"}}
FORMAT = {"type": "json_schema", "schema": {"not": {}}}


@pytest.mark.parametrize(
    "fields, needle",
    [
        ({"max_tokens": 100_000}, "max_tokens: "),
        ({"stop_sequences": ["a", ""]}, "stop_sequences[1]: "),
        ({"tools": [TOOL]}, "tools[0].name: "),
        ({"output_config": {"format": FORMAT}}, "output_config.format.schema: "),
    ],
)
async def test_wrong_fields_are_named_as_they_were_sent(stack: Stack, fields: dict[str, Any], needle: str) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=LIMIT_S) as raw:
        answer = await raw.post("/v1/messages", json={"max_tokens": 4, "messages": ASKED, **fields})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(needle), answer.text


async def test_a_model_that_is_not_there(client: AsyncAnthropic, stack: Stack) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        await client.models.retrieve("nobody")
    assert unknown.value.body["type"] == "error" and unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index, call-overload]
    assert unknown.value.request_id
    # Others get OpenAI's shape on the same route.
    async with httpx.AsyncClient(base_url=stack.url, timeout=LIMIT_S) as raw:
        assert (await raw.get("/v1/models/nobody")).json()["error"]["code"] == "model_not_found"


async def test_a_client_that_leaves_frees_its_blocks(client: AsyncAnthropic, stack: Stack) -> None:
    async with client.messages.stream(
        model="tiny", max_tokens=3000, messages=ASKED, extra_body={"ignore_eos": True}
    ) as stream:
        async for _ in stream.text_stream:
            break
    stack.wait_idle()


async def test_the_key_may_come_as_anthropic_sends_it(tiny_model: Path) -> None:
    with Stack(tiny_model, api_key="right", control_plane_flags=["--api-key", "right"]) as closed:
        async with AsyncAnthropic(base_url=closed.url, api_key="right", max_retries=0) as client:
            await client.messages.create(model="tiny", messages=ASKED, max_tokens=1)
        async with AsyncAnthropic(base_url=closed.url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError) as refused:
                await client.messages.create(model="tiny", messages=ASKED, max_tokens=1)
            assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
