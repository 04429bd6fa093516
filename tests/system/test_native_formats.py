"""Calls and reasoning in a model's own marks, from its special tokens to the official client's objects.

The simulated worker draws tokens at random among those that are allowed; the marks are special tokens, as with models.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import jsonschema
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from tests.system.conftest import Stack, write_model_directory

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
# GLM 4.7's marks and their order, cut down.
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content or '' }}{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key>"
    "<arg_value>{{ value if value is string else value | tojson }}</arg_value>{% endfor %}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}{% endif %}"
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "x", "parameters": SCHEMA}}
    for name in ("weather", "forecast")
]
ASKED: Any = [{"role": "user", "content": "Where is it warm?"}]
SILENT = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = write_model_directory(tmp_path_factory.mktemp("models") / "marked", MARKS)
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": TEMPLATE}))
    with Stack(model, worker_flags=["--sim-step-ms", "1"]) as running:
        yield running


@pytest.fixture
async def client(marked: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{marked.url}/v1", api_key="any", max_retries=0, timeout=60) as opened:
        yield opened


async def ask(client: AsyncOpenAI, **fields: Any) -> Any:
    return await client.chat.completions.create(**{"model": "tiny", "messages": ASKED, "seed": 3, **fields})


def joined_calls(chunks: list[Any]) -> list[tuple[str, str]]:
    """(name, arguments) of each call of a stream; an id and a name come once."""
    calls: dict[int, list[str]] = {}
    ids: set[str] = set()
    for chunk in chunks:
        for piece in chunk.choices[0].delta.tool_calls or ():
            call = calls.setdefault(piece.index, ["", ""])
            if piece.id:
                assert piece.id not in ids and piece.function.name and not call[0]
                ids.add(piece.id)
                call[0] = piece.function.name
            call[1] += piece.function.arguments or ""
    assert list(calls) == list(range(len(calls))) and len(ids) == len(calls)
    return [(name, arguments) for name, arguments in calls.values()]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "forecast"}}], ids=["required", "named"]
)
async def test_a_stream_has_the_calls_of_the_whole_answer(client: AsyncOpenAI, choice: Any) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 400, "extra_body": SILENT}
    whole = (await ask(client, parallel_tool_calls=False, **fields)).choices[0]
    (call,) = whole.message.tool_calls
    assert not whole.message.content and whole.finish_reason == ("tool_calls" if choice == "required" else "stop")
    if choice != "required":
        assert call.function.name == "forecast"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    chunks = [each async for each in await ask(client, parallel_tool_calls=False, stream=True, **fields)]
    assert joined_calls(chunks) == [(call.function.name, call.function.arguments)]
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    # What was called and what came of it is taken back, with arguments of none as well.
    history = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "warm"},
    ]
    for arguments in (call.function.arguments, "", "{}"):
        history[1]["tool_calls"][0]["function"]["arguments"] = arguments
        assert (await ask(client, messages=history, tools=TOOLS, max_tokens=2)).choices


async def test_a_call_that_is_cut_off_is_none(client: AsyncOpenAI) -> None:
    cut = (await ask(client, tools=TOOLS, tool_choice="required", max_tokens=3, extra_body=SILENT)).choices[0]
    assert cut.finish_reason == "length" and cut.message.tool_calls is None and not cut.message.content


async def test_reasoning_is_apart_from_the_answer(client: AsyncOpenAI, marked: Stack) -> None:
    """Whole and streamed alike, under both of its names; drawn of two letters and the mark that ends it."""
    tokenizer = Tokenizer.from_file(str(marked.model / "tokenizer.json"))
    ids = [tokenizer.token_to_id(token) for token in ("a", "b", "</think>")]
    fields: dict[str, Any] = {"max_tokens": 40, "extra_body": {"allowed_token_ids": ids}}
    answer = await ask(client, **fields)
    message = answer.choices[0].message
    assert message.reasoning and message.reasoning == message.reasoning_content
    assert set(message.reasoning) <= {"a", "b"} and message.content
    details = answer.usage.completion_tokens_details
    assert 0 < details.reasoning_tokens < answer.usage.completion_tokens

    chunks = [each async for each in await ask(client, stream=True, **fields)]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == message.reasoning
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning
    assert "".join(delta.content or "" for delta in deltas) == message.content
    first = next(index for index, delta in enumerate(deltas) if delta.content)
    assert not any(getattr(delta, "reasoning", None) for delta in deltas[first + 1 :])

    unsaid = (
        await ask(client, max_tokens=40, extra_body={**fields["extra_body"], "include_reasoning": False})
    ).choices[0]
    assert not getattr(unsaid.message, "reasoning", None) and unsaid.message.content == message.content

    # An earlier turn may have it under either name: the prompt is the same.
    counts = []
    for name in ("reasoning", "reasoning_content"):
        turn = {"role": "assistant", "content": "Rome.", name: "It is the south."}
        counts.append((await ask(client, messages=[*ASKED, turn, *ASKED], max_tokens=1)).usage.prompt_tokens)
    without = await ask(client, messages=[*ASKED, {"role": "assistant", "content": "Rome."}, *ASKED], max_tokens=1)
    assert counts[0] == counts[1] > without.usage.prompt_tokens


async def test_responses_have_reasoning_as_an_item_of_its_own(client: AsyncOpenAI) -> None:
    fields: Any = {"model": "tiny", "input": "Where?", "max_output_tokens": 30, "extra_body": {"seed": 3}}
    whole = await client.responses.create(**fields)
    thought = whole.output[0]
    assert thought.type == "reasoning" and thought.content
    assert whole.usage is not None and 0 < whole.usage.output_tokens_details.reasoning_tokens <= 30
    events = [event async for event in await client.responses.create(stream=True, **fields)]
    deltas = [event for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(event.delta for event in deltas) == thought.content[0].text
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_anthropics_thinking_is_a_block_of_its_own(client: AsyncOpenAI, marked: Stack) -> None:
    async with AsyncAnthropic(base_url=marked.url, api_key="any", max_retries=0, timeout=60) as anthropic:
        fields: Any = {"model": "tiny", "messages": ASKED, "max_tokens": 30, "extra_body": {"seed": 3}}
        assert (await anthropic.messages.create(**fields)).content == [], "thoughts are sent to those who ask for them"
        fields["thinking"] = {"type": "enabled", "budget_tokens": 1024}
        whole = await anthropic.messages.create(**fields)
        assert whole.content[0].type == "thinking" and whole.stop_reason == "max_tokens"
        async with anthropic.messages.stream(**fields) as stream:
            last = await stream.get_final_message()
        assert last.content[0].type == "thinking" and last.content[0].thinking == whole.content[0].thinking
