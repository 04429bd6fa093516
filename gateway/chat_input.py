"""Messages, tools and tool_choice of a chat body to a ChatInput message."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.struct_pb2 import Struct
from stepwire.v1 import inference_pb2

from gateway.errors import ApiError
from gateway.json_types import type_name
from gateway.schemas import ChatCompletionBody, ChatMessage, MessageToolCall, ToolDefinition
from gateway.structural_tag import schema_text
from gateway.unsupported import check_message_fields

_MODES = {
    "auto": inference_pb2.TOOL_CHOICE_MODE_AUTO,
    "none": inference_pb2.TOOL_CHOICE_MODE_NONE,
    "required": inference_pb2.TOOL_CHOICE_MODE_REQUIRED,
}

_EFFORTS = {
    "none": inference_pb2.REASONING_EFFORT_NONE,
    "minimal": inference_pb2.REASONING_EFFORT_MINIMAL,
    "low": inference_pb2.REASONING_EFFORT_LOW,
    "medium": inference_pb2.REASONING_EFFORT_MEDIUM,
    "high": inference_pb2.REASONING_EFFORT_HIGH,
    "xhigh": inference_pb2.REASONING_EFFORT_XHIGH,
    "max": inference_pb2.REASONING_EFFORT_MAX,
}


def read_chat_input(body: ChatCompletionBody) -> inference_pb2.ChatInput:
    """Raises `ApiError` with the field named."""
    chat = inference_pb2.ChatInput(
        tools=[_tool(index, tool) for index, tool in enumerate(body.tools or ())],
        continue_final_message=bool(body.continue_final_message),
        no_generation_prompt=body.add_generation_prompt is False and not body.continue_final_message,
    )
    for index, message in enumerate(body.messages):
        _add_message(chat, index, message)
    choice = read_tool_choice(body.tool_choice, [tool.function.name for tool in body.tools or ()])
    if choice is not None:
        chat.tool_choice.CopyFrom(choice)
    if body.parallel_tool_calls is not None:
        chat.parallel_tool_calls = body.parallel_tool_calls
    if body.reasoning_effort is not None:
        chat.reasoning_effort = _EFFORTS[body.reasoning_effort]
    if body.chat_template_kwargs:
        chat.template_arguments.CopyFrom(_template_arguments(body.chat_template_kwargs))
    return chat


def read_tool_choice(choice: Any, names: list[str]) -> inference_pb2.ToolChoice | None:
    """`auto`, `none`, `required`, a named function, or OpenAI's `allowed_tools`; checked against the tools' names."""
    if choice is None:
        return None
    if choice == "none":
        return inference_pb2.ToolChoice(mode=_MODES["none"])
    if not names:
        raise ApiError(400, "tool_choice: only allowed together with tools.", param="tool_choice")
    if isinstance(choice, str):
        if choice not in _MODES:
            raise _bad_choice(f"'{choice[:40]}'")
        return inference_pb2.ToolChoice(mode=_MODES[choice])
    if not isinstance(choice, dict):
        raise _bad_choice(type_name(choice))
    if choice.get("type") == "function":
        return inference_pb2.ToolChoice(function_name=_chosen_name("tool_choice.function", choice, names))
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("allowed_tools"), dict):
        allowed = choice["allowed_tools"]
        mode, tools = allowed.get("mode"), allowed.get("tools")
        param = "tool_choice.allowed_tools"
        if mode not in ("auto", "required"):
            raise ApiError(400, f"{param}.mode: must be 'auto' or 'required'.", param=f"{param}.mode")
        if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
            raise ApiError(400, f"{param}.tools: must be a list of tools, not empty.", param=f"{param}.tools")
        chosen = [_chosen_name(f"{param}.tools[{index}]", tool, names) for index, tool in enumerate(tools)]
        return inference_pb2.ToolChoice(mode=_MODES[mode], allowed_function_names=chosen)
    raise _bad_choice("an object of another form")


def _bad_choice(shown: str) -> ApiError:
    return ApiError(
        400,
        "tool_choice: must be 'auto', 'none', 'required' or "
        f'{{"type": "function", "function": {{"name": ...}}}}, not {shown}.',
        param="tool_choice",
    )


def _chosen_name(param: str, choice: dict[str, Any], names: list[str]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise ApiError(400, f"{param}: must have a function with a name.", param="tool_choice")
    if name not in names:
        raise ApiError(400, f"{param}: '{name[:80]}' is not the name of one of the tools.", param="tool_choice")
    return name


def _tool(index: int, tool: ToolDefinition) -> inference_pb2.Tool:
    function = tool.function
    message = inference_pb2.FunctionTool(name=function.name, description=function.description or "")
    if function.parameters is not None:
        message.parameters = schema_text(f"tools[{index}].function.parameters", function.parameters)
    if function.strict is not None:
        message.strict = function.strict
    return inference_pb2.Tool(function=message)


def _template_arguments(arguments: dict[str, Any]) -> Struct:
    message = Struct()
    try:
        message.update(arguments)
    except (ValueError, TypeError, OverflowError) as error:
        raise ApiError(400, "chat_template_kwargs: must hold JSON values.", param="chat_template_kwargs") from error
    return message


def _add_message(chat: inference_pb2.ChatInput, index: int, message: ChatMessage) -> None:
    """In place: given to a constructor, a message with its text would be written out and read again."""
    check_message_fields(index, message.model_extra)
    added = chat.messages.add(
        role=message.role,
        name=message.name or "",
        tool_calls=[_tool_call(index, position, call) for position, call in enumerate(message.tool_calls or ())],
        tool_call_id=message.tool_call_id or "",
        reasoning=message.reasoning or message.reasoning_content or "",
    )
    for text in content_texts(index, message):
        added.content.add(text=text)


def _tool_call(index: int, position: int, call: MessageToolCall) -> inference_pb2.ToolCall:
    arguments = call.function.arguments
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if arguments is not None and not isinstance(arguments, str):
        param = f"messages[{index}].tool_calls[{position}].function.arguments"
        raise ApiError(400, f"{param}: must be a JSON object as a string.", param=param)
    return inference_pb2.ToolCall(id=call.id or "", name=call.function.name, arguments=arguments or "")


def content_texts(index: int, message: ChatMessage) -> list[str]:
    """The texts of a message's content, a string or a list of parts."""
    param, content = f"messages[{index}].content", message.content
    if content is None and message.role == "assistant" and message.refusal:
        return [message.refusal]
    if isinstance(content, str):
        return [content]
    if content is None:
        if message.role != "assistant":
            raise ApiError(400, f"{param}: needed in a message of role '{message.role}'.", param=param)
        return []
    if not isinstance(content, list):
        raise ApiError(400, f"{param}: must be a string or a list of parts, not {type_name(content)}.", param=param)
    return [_part_text(f"{param}[{position}]", part) for position, part in enumerate(content)]


def _part_text(param: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise ApiError(400, f"{param}: must be an object with a type, not {type_name(part)}.", param=param)
    part_type = part.get("type")
    # An assistant's earlier refusal is text like any other.
    field = "refusal" if part_type == "refusal" else "text"
    if part_type not in ("text", "refusal"):
        shown = f"'{part_type}'" if isinstance(part_type, str) else type_name(part_type)
        raise ApiError(
            400,
            f"{param}.type: {shown} is not supported; this server takes parts of type 'text'.",
            param=f"{param}.type",
        )
    text = part.get(field)
    if not isinstance(text, str):
        raise ApiError(400, f"{param}.{field}: must be a string, not {type_name(text)}.", param=f"{param}.{field}")
    return text
