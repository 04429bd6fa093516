"""Answers and events, field by field, by the official packages' own models taken strictly.

The clients build their objects without checking anything, so that a wrong shape can pass unseen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, MessageTokensCount, ModelInfo, RawMessageStreamEvent
from openai.types import Batch, Completion, FileDeleted, FileObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.system.conftest import Stack

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 4}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "of a city", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=120) as client:
        yield client


@cache
def adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def checked(model: Any, value: Any) -> Any:
    """The value, which is an instance of the model as it came over the wire."""
    adapter(model).validate_json(json.dumps(value), strict=True)
    return value


def answered(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def events_of(http: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    response = http.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    lines = (line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: "))
    return [json.loads(line) for line in lines if line != "[DONE]"]


CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs of two": {"logprobs": True, "top_logprobs": 2, "n": 2},
    "required call": {"tools": TOOLS, "tool_choice": "required", "max_tokens": 120},
    "named call": {"tools": TOOLS, "tool_choice": NAMED, "max_tokens": 120},
    "call that is cut off": {"tools": TOOLS, "tool_choice": "required", "max_tokens": 9},
    "schema": {"response_format": FORMAT, "max_tokens": 120},
    "ids": {"return_token_ids": True},
}


@pytest.mark.parametrize("fields", CHATS.values(), ids=CHATS)
def test_chat(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"messages": MESSAGES, "max_tokens": 8, "seed": 3, **fields}
    whole = checked(ChatCompletion, answered(http.post("/v1/chat/completions", json=body)))
    chunks = events_of(http, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    for chunk in chunks:
        checked(ChatCompletionChunk, chunk)
    message = whole["choices"][0]["message"]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == 0]
    assert "".join(delta.get("content") or "" for delta in deltas) == (message["content"] or "")
    pieces = [call for delta in deltas for call in delta.get("tool_calls", ())]
    if body["max_tokens"] == 9:
        # Of a call that was cut off nothing is text.
        assert not message["content"] and "tool_calls" not in message
        assert whole["choices"][0]["finish_reason"] == "length"
    elif "tools" in fields:
        assert message["content"] is None
        for index, call in enumerate(message["tool_calls"]):
            own = [piece["function"] for piece in pieces if piece["index"] == index]
            assert "".join(piece.get("arguments", "") for piece in own) == call["function"]["arguments"]
            assert set(json.loads(call["function"]["arguments"])) == {"city"}


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"prompt": ["a", "b"], "n": 2}], ids=str)
def test_completions(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"prompt": "The capital", "max_tokens": 4, **fields}
    checked(Completion, answered(http.post("/v1/completions", json=body)))
    for chunk in events_of(http, "/v1/completions", {**body, "stream_options": {"include_usage": True}}):
        # The package's model has no choice that goes on; OpenAI's own streams do.
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        checked(Completion, chunk)


RESPONSES: dict[str, dict[str, Any]] = {
    "plain": {"instructions": "Be brief.", "metadata": {"a": "b"}},
    "logprobs": {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "call": {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required", "max_output_tokens": 120},
    "schema": {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}, "max_output_tokens": 120},
    "effort": {"reasoning": {"effort": "low", "summary": "auto"}},
}


@pytest.mark.parametrize("fields", RESPONSES.values(), ids=RESPONSES)
def test_responses(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "input": "Hello", "max_output_tokens": 8, "seed": 3, **fields}
    made = checked(Response, answered(http.post("/v1/responses", json=body)))
    assert checked(Response, answered(http.get(f"/v1/responses/{made['id']}"))) == made
    for event in events_of(http, "/v1/responses", body):
        checked(ResponseStreamEvent, event)


def test_items_that_were_given_come_back_whole(http: httpx.Client) -> None:
    """Clients leave out ids, states and annotations, and read all of them."""
    given = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hi."}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "warm"},
    ]
    body = {"input": given, "max_output_tokens": 4}
    made = answered(http.post("/v1/responses", json=body))
    listed = answered(http.get(f"/v1/responses/{made['id']}/input_items", params={"order": "asc"}))
    assert [checked(ResponseItem, item)["type"] for item in listed["data"]] == [
        item.get("type", "message") for item in given
    ]
    first = answered(http.get(f"/v1/responses/{made['id']}/input_items", params={"order": "asc", "limit": 2}))
    rest = answered(
        http.get(
            f"/v1/responses/{made['id']}/input_items",
            params={"order": "asc", "limit": 100, "after": first["last_id"]},
        )
    )
    assert first["has_more"] and not rest["has_more"] and [*first["data"], *rest["data"]] == listed["data"]


def test_files_and_batches(http: httpx.Client) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    content = json.dumps({**line, "body": {"messages": MESSAGES, "max_tokens": 2}}).encode() + b"\n"
    file = checked(
        FileObject,
        answered(http.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"})),
    )
    body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = checked(Batch, answered(http.post("/v1/batches", json={**body, "metadata": {"a": "b"}})))
    deadline = time.monotonic() + 120
    while batch["status"] != "completed":
        assert time.monotonic() < deadline, batch
        batch = checked(Batch, answered(http.get(f"/v1/batches/{batch['id']}")))
    (done,) = http.get(f"/v1/files/{batch['output_file_id']}/content").text.splitlines()
    checked(ChatCompletion, json.loads(done)["response"]["body"])
    checked(FileDeleted, answered(http.delete(f"/v1/files/{file['id']}")))


MESSAGE_TOOLS = [{"name": "weather", "description": "of a city", "input_schema": SCHEMA}]
ASKED: dict[str, dict[str, Any]] = {
    "plain": {"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]},
    "a tool": {"tools": MESSAGE_TOOLS, "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 120},
    "any tool": {"tools": MESSAGE_TOOLS, "tool_choice": {"type": "any"}, "max_tokens": 120},
    "thinking": {"thinking": {"type": "enabled", "budget_tokens": 1024}, "metadata": {"user_id": "x"}},
}


@pytest.mark.parametrize("fields", ASKED.values(), ids=ASKED)
def test_messages(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "max_tokens": 8, "messages": MESSAGES, "seed": 3, **fields}
    whole = checked(Message, answered(http.post("/v1/messages", json=body)))
    if "tools" in fields:
        assert whole["stop_reason"] in ("tool_use", "max_tokens")
        assert {block["type"] for block in whole["content"]} <= {"tool_use"}
    for event in events_of(http, "/v1/messages", body):
        checked(RawMessageStreamEvent, event)


def test_anthropics_other_answers(http: httpx.Client, stack: Stack) -> None:
    counted = http.post("/v1/messages/count_tokens", json={"model": "tiny", "messages": MESSAGES})
    checked(MessageTokensCount, answered(counted))
    with anthropic.Anthropic(base_url=stack.url, api_key="any", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "alias/tiny"]
        found = client.models.retrieve("alias/tiny")
        ModelInfo.model_validate(found.model_dump(), strict=True)
        with pytest.raises(anthropic.BadRequestError) as refused:
            client.messages.create(model="tiny", max_tokens=4, messages=[])
        assert refused.value.request_id
    # OpenAI's clients, which ask without Anthropic's header, get theirs.
    checked(Model, answered(http.get("/v1/models/alias/tiny")))
