"""Calls written as JSON objects with a name and arguments: Hermes, Qwen, Granite, Phi-4, Mistral, Llama 3."""

from __future__ import annotations

import json
import re

from control_plane.frontend.parsers.scanner import Parsing, Scanner, discard

# At the end of a text; after it, marks between name and arguments may have begun.
_BEGUN_NAME = re.compile(r"\s*[\w.-]{0,128}\s*(\[[A-Z_]*)?")
_NAME_KEYS = ("name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")
_NO_ARGUMENTS = ("null", '""')


def call_object(s: Scanner, before: str = "", *, is_marked: bool = False) -> Parsing[bool]:
    """One `{"name": ..., "arguments": {...}}`, its keys in any order; what is none is said as text, after `before`.

    is_marked: a mark has told that it is one. Then the beginning of an object that was cut off is no text either.
    """
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
        text = s.take_record()
        if not (is_marked and s.is_over and text.startswith("{")):
            s.say(before + text)
    return is_open


def _arguments(s: Scanner) -> Parsing[None]:
    """Arguments as they stand; some models put them into a string once more, or write null where there are none."""
    if (yield from s.peek()) not in ('"', "n"):
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
    # Half of a surrogate pair is JSON, and no text.
    return value if isinstance(value, str) and _is_text(value) else ""


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _unwrapped(raw: str) -> str:
    if raw in _NO_ARGUMENTS:
        return "{}"
    text = _text_of(raw)
    return text if text.lstrip().startswith("{") else raw


def call_array(s: Scanner) -> Parsing[None]:
    """`[{...}, {...}]`, or a single object."""
    yield from s.blanks()
    if not (yield from s.literal("[")):
        yield from call_object(s, is_marked=True)
        return
    while True:
        yield from s.blanks()
        if (yield from s.literal("]")) or not (yield from call_object(s, is_marked=True)):
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


def hunyuan(s: Scanner) -> Parsing[None]:
    """`<tool_calls>[{...}]</tool_calls>`: Hunyuan A13B, Jamba."""
    yield from tagged(s, ("<tool_calls>",), ("</tool_calls>",))


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


def unless_cut_off(text: str) -> str:
    """The last of a text behind a mark: nothing if it is the beginning of a name, itself otherwise."""
    return "" if _BEGUN_NAME.fullmatch(text) else text


def _named_call(s: Scanner) -> Parsing[None]:
    name: list[str] = []
    mark = yield from s.until(("[CALL_ID]", "[ARGS]", "{"), name.append)
    if mark == "[CALL_ID]":
        mark = yield from s.until(("[ARGS]",), discard)
    called = "".join(name).strip()
    if mark is None or not called:
        s.say(unless_cut_off("".join(name)))
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
        yield from call_object(s, is_marked=True)
