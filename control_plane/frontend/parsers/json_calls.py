"""Calls written as JSON objects with a name and arguments: Hermes, Qwen, Granite, Phi-4, Mistral, Llama 3, Gemma 3."""

from __future__ import annotations

import ast
import json
from typing import Any

from control_plane.frontend.parsers.scanner import Parsing, Scanner, discard

_NAME_KEYS = ("name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")
_MAX_PYTHON_CHARS = 64 * 1024


def call_object(s: Scanner) -> Parsing[bool]:
    """One `{"name": ..., "arguments": {...}}`, its keys in any order; what is none is said as text."""
    s.start_record()
    name, pending, is_open = "", "", False
    if (yield from s.literal("{")):
        while True:
            yield from s.blanks()
            if (yield from s.literal("}")):
                if name and not is_open:
                    s.take_record()
                    s.open_call(name)
                    s.argue(pending or "{}")
                    is_open = True
                break
            key = yield from _string(s)
            if key is None:
                break
            yield from s.blanks()
            if not (yield from s.literal(":")):
                break
            yield from s.blanks()
            if key in _ARGUMENT_KEYS and name and not is_open:
                s.take_record()
                s.open_call(name)
                is_open = True
                yield from _arguments(s)
            else:
                value: list[str] = []
                yield from s.json_value(value.append)
                if key in _NAME_KEYS:
                    name = name or _text_of("".join(value))
                elif key in _ARGUMENT_KEYS:
                    pending = _unwrapped("".join(value))
            yield from s.blanks()
            yield from s.literal(",")
    if is_open:
        s.close_call()
    else:
        s.say(s.take_record())
    return is_open


def _arguments(s: Scanner) -> Parsing[None]:
    """Arguments as they stand; some models put them into a string once more."""
    if (yield from s.peek()) != '"':
        yield from s.json_value(s.argue)
        return
    value: list[str] = []
    yield from s.json_value(value.append)
    s.argue(_unwrapped("".join(value)))


def _string(s: Scanner) -> Parsing[str | None]:
    if (yield from s.peek()) != '"':
        return None
    raw: list[str] = []
    yield from s.json_value(raw.append)
    return _text_of("".join(raw))


def _text_of(raw: str) -> str:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return ""
    return value if isinstance(value, str) else ""


def _unwrapped(raw: str) -> str:
    text = _text_of(raw)
    return text if text.lstrip().startswith("{") else raw


def call_array(s: Scanner) -> Parsing[None]:
    """`[{...}, {...}]`, or a single object."""
    yield from s.blanks()
    if not (yield from s.literal("[")):
        yield from call_object(s)
        return
    while True:
        yield from s.blanks()
        if (yield from s.literal("]")) or not (yield from call_object(s)):
            return
        yield from s.blanks()
        if not (yield from s.literal(",")):
            yield from s.literal("]")
            return


def tagged(s: Scanner, begins: tuple[str, ...], ends: tuple[str, ...]) -> Parsing[None]:
    """Text, and calls between a begin and an end mark."""
    while (yield from s.until(begins, s.say)) is not None:
        yield from call_array(s)
        if ends:
            yield from _skip_end(s, ends)
        yield from s.blanks()


def _skip_end(s: Scanner, ends: tuple[str, ...]) -> Parsing[None]:
    for end in ends:
        if (yield from s.blanks_then(end)):
            return


def hermes(s: Scanner) -> Parsing[None]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes 2 Pro, Qwen 2.5 and 3, Granite 4."""
    yield from tagged(s, ("<tool_call>",), ("</tool_call>",))


def granite(s: Scanner) -> Parsing[None]:
    """`<|tool_call|>[{...}]` (Granite 3.0: a token; later: `<tool_call>[...]`)."""
    yield from tagged(s, ("<|tool_call|>", "<tool_call>"), ("</tool_call>",))


def phi4_mini(s: Scanner) -> Parsing[None]:
    """`<|tool_call|>[{...}]<|/tool_call|>`, and the older `functools[{...}]`."""
    yield from tagged(s, ("<|tool_call|>", "functools"), ("<|/tool_call|>",))


def mistral(s: Scanner) -> Parsing[None]:
    """`[TOOL_CALLS][{...}]`, and since v11 `[TOOL_CALLS]name[ARGS]{...}` or `[TOOL_CALLS]name{...}`."""
    while (yield from s.until(("[TOOL_CALLS]",), s.say)) is not None:
        yield from s.blanks()
        if (yield from s.peek()) in ("[", "{"):
            yield from call_array(s)
        else:
            yield from _named_call(s)
        yield from s.blanks()


def _named_call(s: Scanner) -> Parsing[None]:
    name: list[str] = []
    mark = yield from s.until(("[CALL_ID]", "[ARGS]", "{"), name.append)
    if mark == "[CALL_ID]":
        mark = yield from s.until(("[ARGS]",), discard)
    called = "".join(name).strip()
    if mark is None or not called:
        s.say("".join(name))
        return
    s.open_call(called)
    if mark == "{":
        s.argue("{")
        yield from _rest_of_object(s)
    else:
        yield from s.blanks()
        yield from s.json_value(s.argue)
    s.close_call()


def _rest_of_object(s: Scanner) -> Parsing[None]:
    """An object whose first bracket was taken."""
    while True:
        yield from s.blanks()
        if (yield from s.literal("}")):
            s.argue("}")
            return
        if (yield from s.literal(",")):
            s.argue(",")
        elif (yield from s.literal(":")):
            s.argue(":")
        elif not (yield from s.json_value(s.argue)):
            return


def llama3(s: Scanner) -> Parsing[None]:
    """`{"name": ..., "parameters": {...}}` for a text, several with `;` between, `<|python_tag|>` before or not."""
    yield from s.blanks_then("<|python_tag|>")
    yield from s.blanks()
    while (yield from s.peek()) == "{":
        if not (yield from call_object(s)):
            break
        yield from s.blanks()
        yield from s.literal(";")
        yield from s.blanks_then("<|python_tag|>")
        yield from s.blanks()
    while (yield from s.until(("<|python_tag|>",), s.say)) is not None:
        yield from s.blanks()
        yield from call_object(s)


def gemma3(s: Scanner) -> Parsing[None]:
    """The two forms that Gemma's guide asks for: `{"name": ..., "parameters": {...}}` and `[name(key=value), ...]`.

    Either may stand in a fence. The Python form is read once it is complete.
    """
    for fence in ("```json", "```tool_code", "```python", "```"):
        if (yield from s.blanks_then(fence)):
            yield from s.blanks()
            break
    first = yield from s.peek()
    if first == "{":
        while (yield from s.peek()) == "{" and (yield from call_object(s)):
            yield from s.blanks()
        yield from s.blanks_then("```")
    elif first == "[":
        yield from pythonic(s)


def pythonic(s: Scanner) -> Parsing[None]:
    """`[name(key=value, ...), ...]`: Llama 3.2 and 4, Gemma 3."""
    raw: list[str] = []
    yield from s.until((), raw.append)
    text = "".join(raw)
    body = text.strip().removesuffix("```").strip()
    calls = _python_calls(body) if len(body) <= _MAX_PYTHON_CHARS else None
    if calls is None:
        s.say(text)
        return
    for name, arguments in calls:
        s.open_call(name)
        s.argue(json.dumps(arguments, ensure_ascii=False))
        s.close_call()


def _python_calls(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """None for what is not a list of calls with literal keyword arguments."""
    try:
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        calls = []
        for call in tree.elts:
            if not isinstance(call, ast.Call) or call.args:
                return None
            arguments = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords if each.arg}
            json.dumps(arguments, allow_nan=False)
            calls.append((ast.unparse(call.func), arguments))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return calls
