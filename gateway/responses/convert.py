"""Items of the Responses API to a chat body, and back to items: pure functions that raise `ApiError`."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from gateway.errors import ApiError, made_a_chat
from gateway.field_names import RESPONSE
from gateway.json_types import type_name
from gateway.responses.schemas import ResponsesBody
from gateway.schemas import ChatCompletionBody, DecodingFields
from gateway.unsupported import check_response_fields

_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


def input_items(body: ResponsesBody) -> list[dict[str, Any]]:
    """What was given, as items with a type and an id each."""
    given = body.input
    if given is None:
        return []
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or (not given and body.previous_response_id is None):
        raise ApiError(400, "input: must be a string, or a list of items that is not empty.", param="input")
    return [_normalized(f"input[{index}]", item) for index, item in enumerate(given)]


def _normalized(param: str, item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ApiError(400, f"{param}: must be an object, not {type_name(item)}.", param=param)
    kind = item.get("type", "message" if "role" in item else None)
    if kind not in ("message", "reasoning", "function_call", "function_call_output"):
        shown = f"'{kind[:40]}'" if isinstance(kind, str) else type_name(kind)
        raise ApiError(400, f"{param}.type: {shown} is not an item that this server knows.", param=f"{param}.type")
    made = {**_LEFT_OUT[kind], "type": kind, **{name: value for name, value in item.items() if value is not None}}
    made["id"] = item.get("id") or f"{_ID_PREFIXES[kind]}_{uuid.uuid4().hex}"
    if kind == "message":
        role = made.get("role")
        made["content"] = _content(f"{param}.content", made.get("content"), role)
        made.setdefault("status", "completed")
    return made


# What clients may leave out of an item that they send, and find in one that they get.
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "message": {},
    "reasoning": {"summary": []},
    "function_call": {"status": "completed"},
    "function_call_output": {"status": "completed"},
}
_ID_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}


def _content(param: str, content: Any, role: Any) -> list[dict[str, Any]]:
    kind = "output_text" if role == "assistant" else "input_text"
    if isinstance(content, str):
        return [{"type": kind, "text": content, **({"annotations": []} if kind == "output_text" else {})}]
    if not isinstance(content, list):
        raise ApiError(400, f"{param}: must be a string or a list of parts, not {type_name(content)}.", param=param)
    for index, part in enumerate(content):
        _part_text(f"{param}[{index}]", part)
    return [{"annotations": [], **part} if part["type"] == "output_text" else part for part in content]


def _part_text(param: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS:
        shown = f"'{kind[:40]}'" if isinstance(kind, str) else type_name(kind)
        raise ApiError(400, f"{param}.type: {shown} is not supported; this server takes text.", param=f"{param}.type")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise ApiError(400, f"{param}.text: must be a string, not {type_name(text)}.", param=f"{param}.text")
    return text


def chat_messages(items: Iterable[dict[str, Any]], num_earlier: int = 0) -> list[dict[str, Any]]:
    """A conversation's items as chat messages: what an assistant thought, said and called becomes one message.

    `num_earlier` of the items were not given with this request.
    """
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None

    def assistant() -> dict[str, Any]:
        nonlocal turn
        if turn is None:
            turn = {"role": "assistant", "content": None}
            messages.append(turn)
        return turn

    for index, item in enumerate(items, -num_earlier):
        where = f"input[{index}]"
        kind = item["type"]
        if kind == "reasoning":
            if turn is not None and (turn["content"] is not None or "tool_calls" in turn):
                turn = None
            thoughts = [*(item.get("content") or ()), *(item.get("summary") or ())]
            assistant()["reasoning"] = "".join(str(part.get("text", "")) for part in thoughts if isinstance(part, dict))
        elif kind == "function_call":
            function = {"name": _field(where, item, "name"), "arguments": _arguments(where, item)}
            call = {"id": _field(where, item, "call_id"), "type": "function", "function": function}
            assistant().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            turn = None
            output = item.get("output")
            text = output if isinstance(output, str) else "\n".join(_texts(f"{where}.output", output))
            messages.append({"role": "tool", "tool_call_id": _field(where, item, "call_id"), "content": text})
        else:
            text = "\n".join(_texts(f"{where}.content", item["content"]))
            role = _field(where, item, "role")
            if role != "assistant":
                turn = None
                messages.append({"role": "system" if role == "developer" else role, "content": text})
            else:
                if turn is not None and (turn["content"] is not None or "tool_calls" in turn):
                    turn = None
                assistant()["content"] = text
    for message in messages:
        if message["role"] == "assistant" and message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
    return messages


def _texts(param: str, parts: Any) -> list[str]:
    if not isinstance(parts, list):
        raise ApiError(400, f"{param}: must be a string or a list of parts.", param=param)
    return [_part_text(f"{param}[{index}]", part) for index, part in enumerate(parts)]


def _field(param: str, item: dict[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ApiError(400, f"{param}.{name}: must be a string, not {type_name(value)}.", param=f"{param}.{name}")
    return value


def _arguments(param: str, item: dict[str, Any]) -> str:
    arguments = item.get("arguments") or "{}"
    with contextlib.suppress(orjson.JSONDecodeError):
        if isinstance(orjson.loads(arguments), dict):
            return str(arguments)
    raise ApiError(400, f"{param}.arguments: must be a JSON object as a string.", param=f"{param}.arguments")


def chat_body(
    body: ResponsesBody, items: Sequence[dict[str, Any]], history: Sequence[dict[str, Any]] = ()
) -> ChatCompletionBody:
    """The whole conversation: its earlier turns, and this one's input."""
    check_response_fields(body.model_extra, body.text.model_extra if body.text else None)
    messages = chat_messages([*history, *items], len(history))
    if body.instructions:
        messages.insert(0, {"role": "system", "content": body.instructions})
    if not messages:
        raise ApiError(400, "input: the conversation is empty.", param="input")
    fields: dict[str, Any] = {
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "tools": _tools(body),
        # Without tools `auto` asks for nothing here, where a chat refuses it.
        "tool_choice": None if body.tool_choice == "auto" and not body.tools else _tool_choice(body.tool_choice),
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "response_format": _response_format(body),
        "logprobs": True if body.wants_logprobs else None,
        "top_logprobs": body.top_logprobs if body.wants_logprobs else None,
    }
    for name in (*_SAME, *DecodingFields.model_fields):
        fields[name] = getattr(body, name)
    if body.truncation == "auto" and body.truncate_prompt_tokens is None:
        fields["truncate_prompt_tokens"] = -1
    with made_a_chat(RESPONSE):
        return ChatCompletionBody.model_validate({name: value for name, value in fields.items() if value is not None})


_SAME = ("model", "stream", "parallel_tool_calls", "stop", "chat_template_kwargs")


def _tools(body: ResponsesBody) -> list[dict[str, Any]] | None:
    if not body.tools:
        return None
    names = ("name", "description", "parameters", "strict")
    return [{"type": "function", "function": {name: getattr(tool, name) for name in names}} for tool in body.tools]


def _tool_choice(choice: Any) -> Any:
    """A function is named one level deeper in a chat."""
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        nested = [_tool_choice(tool) for tool in tools] if isinstance(tools, list) else tools
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": nested}}
    return choice


def _response_format(body: ResponsesBody) -> dict[str, Any] | None:
    text_format = body.text.format if body.text else None
    if text_format is None or text_format.type == "text":
        return None
    if body.structured_outputs is not None:
        raise ApiError(400, "structured_outputs: cannot be used together with text.format.", param="structured_outputs")
    if text_format.type == "json_object":
        return {"type": "json_object"}
    if text_format.json_schema is None:
        raise ApiError(400, "text.format.schema: needed when type is 'json_schema'.", param="text.format.schema")
    schema = {"name": text_format.name or "", "schema": text_format.json_schema, "strict": text_format.strict}
    return {"type": "json_schema", "json_schema": schema}
