"""Items become chats and back; the events of a response say what the response says."""

from __future__ import annotations

from typing import Any

import orjson
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from gateway.mailbox import SequenceUpdate, ToolCallPiece, UsageTotals
from gateway.responses.convert import chat_body, chat_messages, input_items
from gateway.responses.output import ResponseOutput, response_object
from gateway.responses.schemas import ResponsesBody

EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


def items_of(given: Any) -> list[dict[str, Any]]:
    return input_items(ResponsesBody.model_validate({"input": given}))


def test_a_turn_with_reasoning_text_and_calls_is_one_message() -> None:
    messages = chat_messages(
        items_of(
            [
                {"role": "user", "content": "Weather in Paris and Rome?"},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Two calls."}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Looking."}]},
                {"type": "function_call", "call_id": "a", "name": "weather", "arguments": '{"city":"Paris"}'},
                {"type": "function_call", "call_id": "b", "name": "weather", "arguments": ""},
                {"type": "function_call_output", "call_id": "a", "output": "sunny"},
                {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "rain"}]},
                {"role": "assistant", "content": "Sunny and rain."},
                {"role": "developer", "content": "Now be brief."},
            ]
        )
    )
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant", "system"]
    turn = messages[1]
    assert turn["reasoning"] == "Two calls." and turn["content"] == "Looking."
    assert [call["id"] for call in turn["tool_calls"]] == ["a", "b"]
    assert turn["tool_calls"][1]["function"]["arguments"] == "{}"
    assert messages[3] == {"role": "tool", "tool_call_id": "b", "content": "rain"}


def test_tools_and_formats_are_nested_as_a_chat_has_them() -> None:
    body = ResponsesBody.model_validate(
        {
            "input": "hi",
            "instructions": "Be brief.",
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
            "tool_choice": {"type": "function", "name": "f"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
            "reasoning": {"effort": "low"},
            "truncation": "auto",
        }
    )
    chat = chat_body(body, input_items(body)).model_dump(exclude_none=True, by_alias=True)
    assert chat["messages"][0] == {"role": "system", "content": "Be brief."}
    assert chat["tools"][0]["function"]["name"] == "f"
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert chat["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert chat["reasoning_effort"] == "low" and chat["truncate_prompt_tokens"] == -1


def test_events_nest_and_end_in_the_whole_response() -> None:
    """Every event is one that the official client knows; items follow one another, each opened and closed."""
    updates = [
        SequenceUpdate(0, reasoning_parts=["Let me "]),
        SequenceUpdate(0, reasoning_parts=["look."], text_parts=["Look"]),
        SequenceUpdate(0, text_parts=["ing."], tool_calls=[ToolCallPiece(0, "c0", "f", '{"a"', False)]),
        SequenceUpdate(
            0,
            tool_calls=[ToolCallPiece(0, "", "", ": 1}", True), ToolCallPiece(1, "c1", "g", "{}", True)],
            finish_reason="tool_calls",
        ),
    ]
    answer = response_object(ResponsesBody.model_validate({"input": "hi"}), "resp_1", "m", "in_progress")
    output = ResponseOutput(answer, None)
    raw = b"".join(output.render([update]) for update in updates)
    raw += output.end(UsageTotals(num_prompt_tokens=3, num_completion_tokens=9, num_reasoning_tokens=2))
    events = []
    for block in raw.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(orjson.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        EVENT.validate_python(events[-1])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    open_items: list[int] = []
    for event in events:
        if event["type"] == "response.output_item.added":
            assert not open_items
            open_items.append(event["output_index"])
        elif event["type"] == "response.output_item.done":
            assert open_items == [event["output_index"]]
            open_items.clear()
        elif "output_index" in event:
            assert open_items == [event["output_index"]]
    final = Response.model_validate(events[-1]["response"])
    assert final.status == "completed" and final.output_text == "Looking."
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    joined = "".join(event["delta"] for event in events if event["type"].endswith("arguments.delta"))
    assert joined == '{"a": 1}{}'
    assert final.usage is not None and final.usage.output_tokens_details.reasoning_tokens == 2
    # What was answered can be sent back as the next input.
    assert [message["role"] for message in chat_messages(items_of(events[-1]["response"]["output"]))] == ["assistant"]
