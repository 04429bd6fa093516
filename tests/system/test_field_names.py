"""What the control plane refuses is named as each API calls it, with the official clients against the real stack."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.system.conftest import Stack

ASKED: list[Any] = [{"role": "user", "content": "Hello"}]
TOO_MANY = 100_000
# Only the control plane knows that this is wrong.
TOOL_NAME = "two words"


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0, timeout=120) as opened:
        yield opened


async def refused(call: Any, param: str) -> str:
    with pytest.raises(openai.BadRequestError) as raised:
        await call
    assert raised.value.param == param
    message = raised.value.body["message"]  # type: ignore[index]
    assert message.startswith(f"{param}: ")
    return str(message)


async def test_chats_and_completions(client: AsyncOpenAI) -> None:
    def chat(**fields: Any) -> Any:
        return client.chat.completions.create(model="tiny", messages=ASKED, **fields)

    await refused(chat(max_completion_tokens=TOO_MANY), "max_completion_tokens")
    await refused(chat(max_tokens=TOO_MANY), "max_tokens")
    await refused(chat(stop=["a", ""]), "stop[1]")
    tool = {"type": "function", "function": {"name": TOOL_NAME}}
    await refused(chat(tools=[tool]), "tools[0].function.name")
    fewer = {"extra_body": {"min_tokens": 5}}
    for name in ("max_completion_tokens", "max_tokens"):
        assert f"more than {name}, which is 3" in await refused(chat(**{name: 3}, **fewer), "min_tokens")

    def complete(**fields: Any) -> Any:
        return client.completions.create(**{"model": "tiny", "prompt": "Hello", **fields})

    await refused(complete(max_tokens=TOO_MANY), "max_tokens")
    await refused(complete(prompt=["Hello", "x" * 9000]), "prompt[1]")
    await refused(complete(prompt=[[1], [1, TOO_MANY]]), "prompt[1][1]")
    assert "more than max_tokens, which is 3" in await refused(complete(max_tokens=3, **fewer), "min_tokens")


async def test_responses(client: AsyncOpenAI) -> None:
    def create(**fields: Any) -> Any:
        return client.responses.create(**{"model": "tiny", "input": "Hello", **fields})

    await refused(create(max_output_tokens=TOO_MANY), "max_output_tokens")
    await refused(create(tools=[{"type": "function", "name": TOOL_NAME}]), "tools[0].name")
    await refused(create(instructions="Be brief.", input=[{"role": "forbidden", "content": "x"}]), "input")
    await refused(create(input=[{"role": "", "content": "x"}]), "input")
    fewer = {"extra_body": {"min_tokens": 5}, "max_output_tokens": 3}
    assert "more than max_output_tokens, which is 3" in await refused(create(**fewer), "min_tokens")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"max_tokens": TOO_MANY}, ["max_tokens: "]),
        ({"stop_sequences": ["a", ""]}, ["stop_sequences[1]: "]),
        ({"extra_body": {"min_tokens": 20}}, ["min_tokens: ", "more than max_tokens, which is 8"]),
        ({"tools": [{"name": TOOL_NAME, "input_schema": {}}]}, ["tools[0].name: "]),
        ({"system": "Be brief.", "messages": [{"role": "user", "content": "x" * 9000}]}, ["messages: "]),
    ],
)
async def test_messages(stack: Stack, fields: dict[str, Any], names: list[str]) -> None:
    async with anthropic.AsyncAnthropic(base_url=stack.url, api_key="any", max_retries=0, timeout=120) as client:
        with pytest.raises(anthropic.BadRequestError) as raised:
            await client.messages.create(**{"model": "tiny", "messages": ASKED, "max_tokens": 8, **fields})
    message: str = raised.value.body["error"]["message"]  # type: ignore[index, call-overload]
    assert message.startswith(names[0]) and all(name in message for name in names)


async def test_counting_tokens(stack: Stack) -> None:
    tools = [{"name": TOOL_NAME, "input_schema": {}}]
    async with httpx.AsyncClient(base_url=stack.url, timeout=120) as client:
        counted = await client.post("/v1/messages/count_tokens", json={"messages": ASKED, "tools": tools})
        assert counted.json()["error"]["message"].startswith("tools[0].name: ")
        functions = [{"type": "function", "function": {"name": TOOL_NAME}}]
        tokenized = await client.post("/tokenize", json={"messages": ASKED, "tools": functions})
        assert tokenized.json()["error"]["param"] == "tools[0].function.name"
        detokenized = await client.post("/detokenize", json={"tokens": [1, TOO_MANY]})
        assert detokenized.json()["error"]["param"] == "tokens[1]"
