"""Calls whose names stand outside of the arguments: DeepSeek, Qwen3-Coder, GPT-OSS (harmony)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from control_plane.frontend.parsers.json_calls import call_array
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

    Values are bare text: the tool's schema says which of them are strings.
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
        s.say("".join(called))
        return
    name = "".join(called).strip()
    properties = schemas.get(name, {}).get("properties")
    properties = properties if isinstance(properties, dict) else {}
    s.open_call(name)
    num_parameters = 0
    while (yield from s.until(("<parameter=", "</function>"), discard)) == "<parameter=":
        key: list[str] = []
        yield from s.until((">",), key.append)
        value: list[str] = []
        if (yield from s.until(("</parameter>",), value.append)) is None:
            return  # cut off: the call is never complete
        text = "".join(value).removeprefix("\n").removesuffix("\n")
        own_key = "".join(key).strip()
        pair = f"{json.dumps(own_key, ensure_ascii=False)}: {_as_json(text, properties.get(own_key))}"
        s.argue((", " if num_parameters else "{") + pair)
        num_parameters += 1
    s.argue("}" if num_parameters else "{}")
    s.close_call()


def _as_json(text: str, schema: Any) -> str:
    """A bare value by its schema: a string stays one even where it looks like a number."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string" or (isinstance(kind, list) and "string" in kind and text != "null"):
        return json.dumps(text, ensure_ascii=False)
    if kind == "boolean" and text.strip().lower() in ("true", "false"):
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
