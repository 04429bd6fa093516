"""A ChatInput as chat templates know conversations: plain dicts, in the shape that models' templates agree on."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict
from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend.chat_template import ChatTemplate, Message
from control_plane.frontend.errors import RequestRefused, Violation
from control_plane.frontend.parsers.registry import HERMES, CallSyntax
from control_plane.frontend.template_traits import NUM_SHORT_ID_CHARS, CallIds, TemplateTraits, ToolsPlace, reasoning_of

_TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
_EFFORT_PREFIX = "REASONING_EFFORT_"
# For templates that have no place for tools: what Hermes' models were trained with, and Gemma's guide in its own words.
_TOOLS_PROMPT = """You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments{where}:
{example}"""


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: list[Message]
    tools: list[dict[str, Any]]
    # Further variables of the template.
    arguments: dict[str, Any]
    num_chars: int


def read_conversation(chat: pb.ChatInput, template: ChatTemplate, syntax: CallSyntax | None = None) -> Conversation:
    """The conversation as this template wants it.

    Texts of one message that came in several parts are joined by line breaks. syntax: how the model is asked to write
    calls where its template does not tell it; Hermes' if None. Raises `RequestRefused`.
    """
    if not chat.messages:
        raise RequestRefused.invalid(Violation("chat.messages", "is empty: give at least one message"))
    violations: list[Violation] = []
    messages = [_message(index, message, violations) for index, message in enumerate(chat.messages)]
    tools = _tools(chat, violations)
    if violations:
        raise RequestRefused.invalid(*violations)
    if "developer" not in template.source:
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
    _name_results(messages)
    if tools and template.traits.tools is ToolsPlace.NOWHERE:
        messages = _with_tools_prompt(messages, tools, syntax or HERMES, takes_system=template.traits.takes_system)
    else:
        _rename_calls(messages, template.traits.call_ids)
        if template.traits.single_calls:
            messages = _with_single_calls(messages)
        messages = [_as_wanted(message, template.traits, syntax or HERMES) for message in messages]
        if template.traits.results_with_calls:
            messages = _with_results(messages)
        if tools and template.traits.tools is ToolsPlace.SYSTEM_MESSAGE:
            if messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": ""})
            messages[0] = {**messages[0], "tools": json.dumps(tools, ensure_ascii=False)}
    arguments = _arguments(chat)
    num_chars = _num_chars(messages) + _num_chars(tools) + _num_chars(arguments)
    return Conversation(messages, tools, arguments, num_chars)


def _message(index: int, message: pb.ChatMessage, violations: list[Violation]) -> Message:
    where = f"chat.messages[{index}]"
    if not message.role:
        violations.append(Violation(f"{where}.role", "is missing"))
    for part_index, part in enumerate(message.content):
        if part.WhichOneof("part") is None:
            violations.append(Violation(f"{where}.content[{part_index}]", "is empty or of a kind not known here"))
    text: str | None = "\n".join(part.text for part in message.content)
    calls = [_tool_call(f"{where}.tool_calls[{at}]", call, violations) for at, call in enumerate(message.tool_calls)]
    if calls and not message.content:
        text = None
    rendered: Message = {"role": message.role, "content": text}
    if message.name:
        rendered["name"] = message.name
    if calls:
        rendered["tool_calls"] = calls
    if message.tool_call_id:
        rendered["tool_call_id"] = message.tool_call_id
    if message.reasoning:
        rendered |= reasoning_of(message.reasoning)
    return rendered


def _tool_call(where: str, call: pb.ToolCall, violations: list[Violation]) -> dict[str, Any]:
    """Templates take the arguments as an object, not as its text."""
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        violations.append(Violation(f"{where}.arguments", "must be a JSON object as text"))
    if not call.name:
        violations.append(Violation(f"{where}.name", "is missing"))
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _tools(chat: pb.ChatInput, violations: list[Violation]) -> list[dict[str, Any]]:
    """What the model is shown: nothing where it must not call anything."""
    tools = []
    names = set()
    for index, tool in enumerate(chat.tools):
        function = tool.function
        where = f"chat.tools[{index}].function"
        if not _TOOL_NAME.fullmatch(function.name):
            violations.append(
                Violation(f"{where}.name", "must be 1 to 128 letters, digits, underscores, hyphens or dots")
            )
        elif function.name in names:
            violations.append(Violation(f"{where}.name", f"{function.name!r} is the name of another tool already"))
        names.add(function.name)
        shown: dict[str, Any] = {"name": function.name, "description": function.description}
        try:
            parameters = json.loads(function.parameters) if function.parameters else {"type": "object"}
        except (ValueError, RecursionError):
            parameters = None
        if not isinstance(parameters, dict):
            violations.append(Violation(f"{where}.parameters", "must be a JSON Schema: an object as JSON text"))
        shown["parameters"] = parameters
        tools.append({"type": "function", "function": shown})
    choice = chat.tool_choice
    wanted = [choice.function_name] if choice.WhichOneof("choice") == "function_name" else []
    for name in (*wanted, *choice.allowed_function_names):
        if name not in names:
            violations.append(Violation("chat.tool_choice", f"{name[:128]!r} is not the name of one of the tools"))
    if choice.mode in (pb.TOOL_CHOICE_MODE_AUTO, pb.TOOL_CHOICE_MODE_REQUIRED) and not names:
        violations.append(Violation("chat.tool_choice", "is only allowed together with tools"))
    return [] if choice.mode == pb.TOOL_CHOICE_MODE_NONE else tools


def _name_results(messages: list[Message]) -> None:
    """The result of a call gets the name of what was called, if it came without."""
    called = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls", ())}
    for message in messages:
        name = called.get(message.get("tool_call_id", ""))
        if name and message["role"] == "tool":
            message.setdefault("name", name)


def _rename_calls(messages: list[Message], call_ids: CallIds) -> None:
    """Ids as the template takes them; a result keeps to its call, the last one that had its id."""
    renamed: dict[str, str] = {}
    num_calls = 0
    for message in messages:
        for call in message.get("tool_calls", ()):
            if call_ids is CallIds.NAMED:
                renamed[call["id"]] = f"functions.{call['function']['name']}:{num_calls}"
            elif call_ids is CallIds.SHORT:
                renamed[call["id"]] = _short_id(call["id"])
            call["id"] = renamed.get(call["id"], call["id"])
            num_calls += 1
        if "tool_call_id" in message:
            own = message["tool_call_id"]
            fallback = _short_id(own) if call_ids is CallIds.SHORT else own
            message["tool_call_id"] = renamed.get(own, fallback)


def _with_single_calls(messages: Sequence[Message]) -> list[Message]:
    """Calls of one message become messages of their own, each before its results."""
    made: list[Message] = []
    # Of the message that called last: (call's id, its own message and its results).
    turns: list[tuple[str, list[Message]]] = []
    for message in [*messages, None]:
        if message is not None and message["role"] == "tool" and turns:
            own = next((turn for call_id, turn in turns if call_id == message.get("tool_call_id")), turns[-1][1])
            own.append(message)
            continue
        made += itertools.chain.from_iterable(turn for _, turn in turns)
        turns = []
        if message is None:
            break
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            made.append(message)
            continue
        first = {**message, "tool_calls": [calls[0]]}
        others = [{"role": message["role"], "content": None, "tool_calls": [call]} for call in calls[1:]]
        turns = [(call["id"], [each]) for call, each in zip(calls, [first, *others], strict=True)]
    return made


def _as_wanted(message: Message, traits: TemplateTraits, syntax: CallSyntax) -> Message:
    made = dict(message)
    if "tool_calls" in message and not traits.shows_calls:
        made["content"] = _with_calls(message, syntax)
        return made
    if traits.text_or_reasoning and "tool_calls" in message and message["content"] and "thinking" in message:
        made |= reasoning_of(f"{message['thinking']}\n{message['content']}")
        made["content"] = None
    if made["content"] is None:
        made["content"] = traits.no_content
    if "tool_calls" in message:
        made["tool_calls"] = [_wanted_call(call, traits) for call in message["tool_calls"]]
    return made


def _wanted_call(call: Mapping[str, Any], traits: TemplateTraits) -> dict[str, Any]:
    made = dict(call)
    if traits.arguments_as_text:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        made["function"] = {**call["function"], "arguments": arguments}
    return made


def _with_results(messages: Sequence[Message]) -> list[Message]:
    """The results of calls as a part of the message that called."""
    made: list[Message] = []
    for message in messages:
        if message["role"] == "tool" and made and "tool_calls" in made[-1]:
            result = {"name": message.get("name", "unknown"), "response": message["content"]}
            made[-1].setdefault("tool_responses", []).append(result)
        else:
            made.append(message)
    return made


def _short_id(call_id: str) -> str:
    """As it is if it is short; otherwise the same nine letters and digits for the same id."""
    if len(call_id) == NUM_SHORT_ID_CHARS and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:NUM_SHORT_ID_CHARS]


def _with_tools_prompt(
    messages: list[Message], tools: Sequence[Mapping[str, Any]], syntax: CallSyntax, *, takes_system: bool
) -> list[Message]:
    """Such templates know neither calls nor their results: both become text, the results that of one user's message."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    is_tagged = syntax.trigger.startswith("<") and syntax.end.endswith(">")
    where = f" within {syntax.trigger}{syntax.end.strip('}').strip()} XML tags" if is_tagged else ", and nothing else"
    example = _written(syntax, [("<function-name>", "<args-json-object>")])
    prompt = _TOOLS_PROMPT.format(tools=listed, where=where, example=example)
    known: list[Message] = []
    for message in messages:
        content = message["content"] or ""
        if message["role"] == "tool":
            result = f"<tool_response>\n{content}\n</tool_response>"
            if known and known[-1].pop("is_result", False):
                result = f"{known[-1]['content']}\n{result}"
                known.pop()
            known.append({"role": "user", "content": result, "is_result": True})
        elif "tool_calls" in message:
            known.append({"role": message["role"], "content": _with_calls(message, syntax)})
        else:
            known.append(message)
    for message in known:
        message.pop("is_result", None)
    first = next((at for at, each in enumerate(known) if each["role"] == "user"), None)
    if known[0]["role"] == "system":
        known[0] = {"role": "system", "content": f"{known[0]['content']}\n\n{prompt}"}
    elif takes_system or first is None:
        known.insert(0, {"role": "system", "content": prompt})
    else:
        known[first] = {**known[first], "content": f"{prompt}\n\n{known[first]['content']}"}
    return known


def _with_calls(message: Message, syntax: CallSyntax) -> str:
    """A message's text and, below it, its calls as text."""
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [(each["name"], json.dumps(each["arguments"], ensure_ascii=False)) for each in functions]
    return f"{message['content'] or ''}\n{_written(syntax, calls)}".strip()


def _written(syntax: CallSyntax, calls: Sequence[tuple[str, str]]) -> str:
    """Calls as the model is asked to write them: (name, JSON text of the arguments) each."""
    each = [
        f"{syntax.before_name}{name}{f':{number}' * syntax.is_numbered}{syntax.after_name}{arguments}{syntax.end}"
        for number, (name, arguments) in enumerate(calls)
    ]
    return f"{syntax.begin_section}{(syntax.separator or '').join(each)}{syntax.end_section}"


def _arguments(chat: pb.ChatInput) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if chat.HasField("template_arguments"):
        arguments = _whole_numbers(MessageToDict(chat.template_arguments))
    if chat.reasoning_effort:
        effort = pb.ReasoningEffort.Name(chat.reasoning_effort).removeprefix(_EFFORT_PREFIX).lower()
        arguments.setdefault("reasoning_effort", effort)
        if effort == "none":
            arguments.setdefault("enable_thinking", False)
            arguments.setdefault("thinking", False)
            arguments.setdefault("thinking_budget", 0)  # Seed-OSS
    return arguments


def _whole_numbers(value: Any) -> Any:
    """A Struct has no integers."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole_numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(each) for each in value]
    return value


def _num_chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(str(key)) + _num_chars(each) for key, each in value.items())
    if isinstance(value, list):
        return sum(map(_num_chars, value))
    return 8
