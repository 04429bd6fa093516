"""Anthropic's bodies become chat bodies, and updates become Anthropic's events, however they are cut."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from stepwire.v1 import inference_pb2

from gateway.convert import plan_chat
from gateway.errors import ApiError
from gateway.field_names import MESSAGE
from gateway.mailbox import SequenceUpdate, ToolCallPiece, UsageTotals
from gateway.messages.answers import MessageEvents, whole_message
from gateway.messages.convert import chat_body
from gateway.messages.schemas import MessagesBody
from gateway.sse import StreamShape

SHAPE = StreamShape(id="msg-1", created=0, model="m", num_prompt_tokens=9)
EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)
USAGE = UsageTotals(num_prompt_tokens=9, num_completion_tokens=5, num_cached_tokens=4)
ARGUMENTS = '{"city": "Paris", "days": 3}'


ASKED = [{"role": "user", "content": "hi"}]


def converted(**fields: Any) -> dict[str, Any]:
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}], **fields}
    return chat_body(MessagesBody.model_validate(body)).model_dump(exclude_none=True)


def test_tools_results_and_thinking_become_a_chat() -> None:
    chat = converted(
        system=[{"type": "text", "text": "Be brief."}],
        messages=[
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I should look.", "signature": "x"},
                    {"type": "text", "text": "Looking."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]},
                    {"type": "text", "text": "So?"},
                ],
            },
        ],
        tools=[{"name": "weather", "input_schema": {"type": "object"}}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        stop_sequences=["END"],
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    roles = [message["role"] for message in chat["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "user"]
    assistant, tool = chat["messages"][2:4]
    assert assistant["reasoning"] == "I should look." and assistant["content"] == "Looking."
    assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == {"city": "Paris"}
    assert tool["tool_call_id"] == "t1" and tool["content"] == "sunny"
    assert chat["tool_choice"] == "required" and chat["parallel_tool_calls"] is False
    assert chat["stop"] == ["END"] and chat["max_completion_tokens"] == 5
    assert chat["include_reasoning"] is True and chat["chat_template_kwargs"] == {"enable_thinking": True}


def test_thinking_may_be_left_out_of_the_answer() -> None:
    thinking = {"type": "adaptive", "display": "omitted"}
    chat = chat_body(MessagesBody.model_validate({"messages": ASKED, "max_tokens": 9, "thinking": thinking}))
    assert chat.include_reasoning is False and chat.chat_template_kwargs == {"enable_thinking": True}


def test_the_older_name_of_a_format() -> None:
    body = {"messages": ASKED, "max_tokens": 9, "output_format": {"type": "json_schema", "schema": {"type": "object"}}}
    chat = chat_body(MessagesBody.model_validate(body))
    assert chat.response_format is not None and chat.response_format.json_schema is not None
    assert chat.response_format.json_schema.json_schema == {"type": "object"}
    with pytest.raises(ApiError) as raised:
        chat_body(MessagesBody.model_validate({**body, "output_config": {"format": body["output_format"]}}))
    assert raised.value.param == "output_format"


def test_a_begun_answer_is_continued() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well,"}]
    assert converted(messages=messages)["continue_final_message"] is True
    assert "continue_final_message" not in converted()


def test_a_format_and_an_effort_become_a_chats() -> None:
    schema = {"type": "object", "properties": {}}
    config = {"effort": "high", "format": {"type": "json_schema", "schema": schema}}
    body = MessagesBody.model_validate(
        {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}], "output_config": config}
    )
    (request,) = plan_chat(chat_body(body), "id", MESSAGE).requests
    assert json.loads(request.structured_output.json_schema) == schema
    assert request.chat.reasoning_effort == inference_pb2.REASONING_EFFORT_HIGH


@pytest.mark.parametrize(
    "content, param",
    [
        (3, "messages[0].content"),
        ([3], "messages[0].content[0]"),
        ([{"type": "image", "source": {}}], "messages[0].content[0].type"),
        ([{"type": "text"}], "messages[0].content[0].text"),
        ([{"type": "tool_use", "id": "a", "name": "b", "input": {}}], "messages[0].content[0].type"),
        ([{"type": "tool_result", "content": "x"}], "messages[0].content[0].tool_use_id"),
    ],
)
def test_wrong_blocks_are_named(content: Any, param: str) -> None:
    with pytest.raises(ApiError) as refused:
        converted(messages=[{"role": "user", "content": content}])
    assert refused.value.status == 400 and refused.value.param == param


def events_of(raw: bytes) -> list[dict[str, Any]]:
    events = []
    for block in raw.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = orjson.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        events.append(event)
    return events


def replay(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Blocks as a client puts them together; fails where the order is wrong."""
    assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
    assert events[-2]["type"] == "message_delta"
    blocks: list[dict[str, Any]] = []
    is_open = False
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(blocks)
            blocks.append(dict(event["content_block"], json=""))
            is_open = True
        elif event["type"] == "content_block_delta":
            assert is_open and event["index"] == len(blocks) - 1
            delta, block = event["delta"], blocks[-1]
            match delta["type"]:
                case "text_delta":
                    block["text"] += delta["text"]
                case "thinking_delta":
                    block["thinking"] += delta["thinking"]
                case "input_json_delta":
                    block["json"] += delta["partial_json"]
        else:
            assert event["type"] == "content_block_stop" and is_open
            is_open = False
    assert not is_open
    return blocks


@given(cuts=st.lists(st.integers(1, 7), min_size=1, max_size=40), is_merged=st.booleans())
def test_events_say_what_the_whole_answer_says(cuts: list[int], is_merged: bool) -> None:
    thinking, text = "Let me think about it.", "Looking it up for you."
    pieces = [("reasoning", thinking), ("text", text), ("call", ARGUMENTS)]
    updates: list[SequenceUpdate] = []
    for kind, whole in pieces:
        position, turn = 0, 0
        while position < len(whole):
            part = whole[position : position + cuts[turn % len(cuts)]]
            is_first, position, turn = position == 0, position + len(part), turn + 1
            update = updates[-1] if is_merged and updates and turn == 1 else SequenceUpdate(0)
            if not updates or update is not updates[-1]:
                updates.append(update)
            if kind == "reasoning":
                update.reasoning_parts.append(part)
            elif kind == "text":
                update.text_parts.append(part)
            else:
                complete = position >= len(whole)
                name = ("call_1", "weather") if is_first else ("", "")
                update.tool_calls.append(ToolCallPiece(0, *name, part, complete))
    updates[-1].finish_reason = "tool_calls"
    writer = MessageEvents(SHAPE)
    events = events_of(b"".join(writer.render([update]) for update in updates) + writer.end(USAGE))
    assert writer.num_events == len(events)
    blocks = replay(events)
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]
    assert (blocks[0]["thinking"], blocks[1]["text"], blocks[2]["json"]) == (thinking, text, ARGUMENTS)
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}

    whole = SequenceUpdate(0, text_parts=[text], reasoning_parts=[thinking], finish_reason="tool_calls")
    whole.tool_calls = [ToolCallPiece(0, "call_1", "weather", ARGUMENTS, True)]
    message = Message.model_validate_json(whole_message(SHAPE, whole, USAGE))
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == 9
