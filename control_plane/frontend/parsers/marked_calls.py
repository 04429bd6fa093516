"""Calls whose names stand outside of the arguments: DeepSeek, Qwen3-Coder, GPT-OSS (harmony)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from control_plane.frontend.parsers.argument_types import Written, properties_of, top_level, written_as
from control_plane.frontend.parsers.json_calls import call_array, unless_cut_off
from control_plane.frontend.parsers.scanner import Parsing, Scanner, discard

_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL_BEGIN, _CALL_END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


def deepseek(s: Scanner) -> Parsing[None]:
    """V3 and R1 write `function<sep>NAME`, a line break and fenced JSON; V3.1 writes `NAME<sep>JSON`."""
    while (yield from s.until((_CALLS_BEGIN, _CALL_BEGIN), s.say)) is not None:
        while True:
            before: list[str] = []
            mark = yield from s.until((_SEPARATOR, _CALL_BEGIN, _CALL_END, _CALLS_END), before.append)
            if mark == _SEPARATOR:
                yield from _deepseek_call(s, "".join(before).strip())
            elif mark is None or mark == _CALLS_END:
                break
        yield from s.blanks()


def _deepseek_call(s: Scanner, name: str) -> Parsing[None]:
    if name == "function":
        called: list[str] = []
        yield from s.until(("\n",), called.append)
        name = "".join(called).strip()
        yield from s.blanks_then("```json")
    s.open_call(name)
    yield from s.blanks()
    yield from s.json_value(s.argue)
    s.close_call()


def qwen3_coder(schemas: Mapping[str, Mapping[str, Any]]) -> Callable[[Scanner], Parsing[None]]:
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>`.

    Values are bare text: the tool's schema says which of them are strings. Those are sent on as they are written.
    """

    def program(s: Scanner) -> Parsing[None]:
        while True:
            mark = yield from s.until(("<tool_call>", "<function="), s.say)
            if mark is None:
                return
            if mark == "<tool_call>":
                if (yield from s.blanks_then("<function=")):
                    yield from _xml_call(s, schemas)
                else:
                    yield from call_array(s)
                yield from s.blanks_then("</tool_call>")
            else:
                yield from _xml_call(s, schemas)
                yield from s.blanks_then("</tool_call>")
            yield from s.blanks()

    return program


def _xml_call(s: Scanner, schemas: Mapping[str, Mapping[str, Any]]) -> Parsing[None]:
    called: list[str] = []
    if (yield from s.until((">",), called.append)) is None:
        s.say(unless_cut_off("".join(called)))
        return
    name = "".join(called).strip()
    root = schemas.get(name, {})
    properties = properties_of(top_level(root))
    s.open_call(name)
    is_first = True
    while True:
        mark = yield from s.until(("<parameter=", "</function>"), discard)
        if mark is None:
            return  # cut off: the call is never complete
        if mark == "</function>":
            break
        key: list[str] = []
        if (yield from s.until((">",), key.append)) is None:
            return
        own_key = "".join(key).strip()
        s.argue(f"{'{' if is_first else ', '}{json.dumps(own_key, ensure_ascii=False)}: ")
        is_first = False
        yield from s.literal("\n")
        if not (yield from _xml_value(s, written_as(properties.get(own_key), root))):
            return
    s.argue("{}" if is_first else "}")
    s.close_call()


_PARAMETER_ENDS = ("\n</parameter>", "</parameter>")


def _xml_value(s: Scanner, written: Written) -> Parsing[bool]:
    """One value to its closing mark, as JSON; False if the text ends before. Strings come as they are written."""
    if written is Written.TEXT_OR_NULL:
        for end in _PARAMETER_ENDS:
            if (yield from s.literal(f"null{end}")):
                s.argue("null")
                return True
        written = Written.TEXT
    if written is Written.TEXT:
        s.argue('"')
        is_whole = (yield from s.until(_PARAMETER_ENDS, lambda text: s.argue(_within_quotes(text)))) is not None
        s.argue('"' * is_whole)
        return is_whole
    value: list[str] = []
    yield from s.blanks()
    if (yield from s.peek()) in ("{", "[", '"'):
        # The mark may stand in one of its strings.
        yield from s.json_value(value.append)
    if (yield from s.until(_PARAMETER_ENDS, value.append)) is None:
        return False
    s.argue(_as_json("".join(value)))
    return True


def _within_quotes(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _as_json(text: str) -> str:
    """A bare value of a type that may be several: what is no JSON is a string."""
    if text.strip().lower() in ("true", "false"):
        return text.strip().lower()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return text.strip()


_HARMONY_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")


def harmony(s: Scanner) -> Parsing[None]:
    """GPT-OSS: messages of channels. `analysis` is reasoning, `commentary to=functions.NAME` a call, the rest text."""
    header: list[str] = []
    mark = yield from s.until(("<|channel|>", "<|message|>"), header.append)
    if mark is None:
        s.say("".join(header))
        return
    while True:
        if mark == "<|channel|>":
            mark = yield from s.until(("<|message|>",), header.append)
        if mark is None:
            return
        mark = yield from _harmony_body(s, "".join(header))
        header = []
        if mark is None:
            return
        if mark != "<|channel|>":
            mark = yield from s.until(("<|channel|>", "<|message|>"), header.append)


def _harmony_body(s: Scanner, header: str) -> Parsing[str | None]:
    _, to, recipient = header.partition("to=")
    if to:
        s.open_call(recipient.split("<|")[0].split()[0].removeprefix("functions.") if recipient.split() else "")
        mark = yield from s.until(_HARMONY_ENDS, s.argue)
        s.close_call()
        return mark
    s.is_reasoning = "analysis" in header
    mark = yield from s.until(_HARMONY_ENDS, s.think if s.is_reasoning else s.say)
    s.is_reasoning = False
    return mark
