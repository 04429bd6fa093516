"""Anthropic's messages to a chat body: pure functions that raise `ApiError` with the field named."""

from __future__ import annotations

from typing import Any

import orjson

from gateway.errors import ApiError, made_a_chat
from gateway.field_names import MESSAGE, Names
from gateway.json_types import type_name
from gateway.messages.schemas import (
    CountTokensBody,
    InputMessage,
    MessagesBody,
    MessageToolChoice,
    OutputConfig,
    OutputFormat,
)
from gateway.schemas import ChatCompletionBody, DecodingFields
from gateway.unsupported import check_anthropic_fields

_MODES = {"auto": "auto", "any": "required", "none": "none"}


def chat_body(body: CountTokensBody) -> ChatCompletionBody:
    """The same conversation as OpenAI writes it; of a `MessagesBody` the sampling parameters as well."""
    check_anthropic_fields(body.model_extra)
    messages: list[dict[str, Any]] = []
    system = block_texts("system", body.system) if body.system is not None else []
    if system:
        messages.append({"role": "system", "content": "\n".join(system)})
    for index, message in enumerate(body.messages):
        messages += _messages(f"messages[{index}]", message)
    fields: dict[str, Any] = {"model": body.model, "messages": messages}
    if messages[-1]["role"] == "assistant":
        # What the client has begun, the model goes on with.
        fields["continue_final_message"] = True
    if body.tools:
        fields["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                    "strict": tool.strict,
                },
            }
            for tool in body.tools
        ]
    if body.tool_choice is not None:
        fields |= _tool_choice(body.tool_choice)
    thinks = body.thinking is not None and body.thinking.type != "disabled"
    arguments = {} if body.thinking is None else {"enable_thinking": thinks}
    fields["include_reasoning"] = thinks and body.thinking is not None and body.thinking.display != "omitted"
    fields |= _output_fields(body.output_config, body.output_format)
    if isinstance(body, MessagesBody):
        if body.structured_outputs is not None and "response_format" in fields:
            raise ApiError(
                400,
                f"structured_outputs: cannot be used together with {names_of(body)['structured_output']}.",
                param="structured_outputs",
            )
        arguments |= body.chat_template_kwargs or {}
        fields |= {
            "max_completion_tokens": body.max_tokens,
            "stream": body.stream,
            "stop": body.stop_sequences,
            **{name: getattr(body, name) for name in DecodingFields.model_fields},
        }
    fields["chat_template_kwargs"] = arguments or None
    with made_a_chat(names_of(body)):
        return ChatCompletionBody.model_validate(fields)


def names_of(body: CountTokensBody) -> Names:
    """What this body calls the fields of a gRPC request."""
    if body.output_format is None:
        return MESSAGE
    return {**MESSAGE, "structured_output": "output_format", "structured_output.json_schema": "output_format.schema"}


def _output_fields(config: OutputConfig | None, older: OutputFormat | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"reasoning_effort": config.effort if config else None}
    output_format = config.format if config else None
    if output_format is not None and older is not None:
        raise ApiError(400, "output_format: cannot be used together with output_config.format.", param="output_format")
    if (asked := output_format or older) is not None:
        schema = {"schema": asked.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _tool_choice(choice: MessageToolChoice) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if choice.type == "tool":
        if not choice.name:
            raise ApiError(400, "tool_choice.name: needed when type is 'tool'.", param="tool_choice.name")
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        fields["tool_choice"] = _MODES[choice.type]
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields


def block_texts(param: str, content: Any) -> list[str]:
    """The texts of a string or of a list of text blocks."""
    if isinstance(content, str):
        return [content]
    texts = []
    for where, kind, block in _blocks(param, content):
        if kind != "text":
            raise _unsupported(where, kind)
        texts.append(_string(where, block, "text"))
    return texts


def _messages(param: str, message: InputMessage) -> list[dict[str, Any]]:
    """One of Anthropic's messages is several of OpenAI's where it holds results of tools."""
    content = message.content
    if isinstance(content, str):
        return [{"role": message.role, "content": content}]
    texts: list[str] = []
    results: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for where, kind, block in _blocks(f"{param}.content", content):
        if kind == "text":
            texts.append(_string(where, block, "text"))
        elif kind == "tool_result" and message.role == "user":
            results.append(_tool_result(where, block))
        elif kind == "tool_use" and message.role == "assistant":
            calls.append(_tool_use(where, block))
        elif kind == "thinking" and message.role == "assistant":
            thoughts.append(_string(where, block, "thinking"))
        elif kind != "redacted_thinking":
            raise _unsupported(where, kind)
    said: dict[str, Any] = {"role": message.role, "content": "\n".join(texts) if texts or not calls else None}
    if calls:
        said["tool_calls"] = calls
    if thoughts:
        said["reasoning"] = "\n".join(thoughts)
    return results if results and not texts else [*results, said]


def _tool_use(where: str, block: dict[str, Any]) -> dict[str, Any]:
    arguments = block.get("input", {})
    if not isinstance(arguments, dict):
        raise ApiError(400, f"{where}.input: must be an object, not {type_name(arguments)}.", param=f"{where}.input")
    function = {"name": _string(where, block, "name"), "arguments": orjson.dumps(arguments).decode()}
    return {"id": _string(where, block, "id"), "type": "function", "function": function}


def _tool_result(where: str, block: dict[str, Any]) -> dict[str, Any]:
    content = block.get("content")
    text = "" if content is None else "\n".join(block_texts(f"{where}.content", content))
    return {"role": "tool", "tool_call_id": _string(where, block, "tool_use_id"), "content": text}


def _blocks(param: str, content: Any) -> list[tuple[str, str, dict[str, Any]]]:
    """(where, type, block) of every block of a list."""
    if not isinstance(content, list):
        raise ApiError(400, f"{param}: must be a string or a list of blocks, not {type_name(content)}.", param=param)
    blocks = []
    for index, block in enumerate(content):
        where = f"{param}[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str):
            raise ApiError(400, f"{where}: must be an object with a type.", param=where)
        blocks.append((where, kind, block))
    return blocks


def _string(where: str, block: dict[str, Any], name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise ApiError(400, f"{where}.{name}: must be a string, not {type_name(value)}.", param=f"{where}.{name}")
    return value


def _unsupported(where: str, kind: str) -> ApiError:
    return ApiError(400, f"{where}.type: '{kind[:40]}' is not supported here.", param=f"{where}.type")
