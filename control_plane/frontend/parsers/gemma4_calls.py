"""Calls as Gemma 4 writes them: `<|tool_call>call:NAME{key:<|"|>text<|"|>,key:3}<tool_call|>`."""

from __future__ import annotations

import json

from control_plane.frontend.parsers.scanner import Parsing, Scanner, discard
from control_plane.frontend.parsers.tagged_calls import bare_value, within_quotes

BEGIN, END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_MAX_DEPTH = 64


def gemma4(s: Scanner) -> Parsing[None]:
    while (yield from s.until((BEGIN,), s.say)) is not None:
        called: list[str] = []
        mark = yield from s.until(("{", END), called.append)
        name = "".join(called).strip().removeprefix("call:")
        if mark is None:
            return
        if mark == "{" and name:
            s.open_call(name)
            if (yield from _members(s, 1)):
                s.close_call()
                yield from s.blanks_then(END)
            else:
                yield from s.until((END,), discard)
        elif mark == "{":
            yield from s.until((END,), discard)
        yield from s.blanks()


def _members(s: Scanner, depth: int) -> Parsing[bool]:
    """An object behind its bracket, as JSON; False where it ends too early, or is none."""
    s.argue("{")
    is_first = True
    while True:
        yield from s.blanks()
        if (yield from s.literal("}")):
            s.argue("}")
            return True
        key: list[str] = []
        if (yield from s.literal(QUOTE)):
            yield from s.until((QUOTE,), key.append)
            is_key = yield from s.blanks_then(":")
        else:
            is_key = (yield from s.until((":",), key.append)) is not None
        if not is_key:
            return False
        own_key = "".join(key).strip().strip('"')
        s.argue(f"{'' if is_first else ', '}{json.dumps(own_key, ensure_ascii=False)}: ")
        is_first = False
        after = yield from _value(s, depth)
        if after == "}":
            s.argue("}")
            return True
        if after != ",":
            return False


def _items(s: Scanner, depth: int) -> Parsing[bool]:
    s.argue("[")
    is_first = True
    while True:
        yield from s.blanks()
        if (yield from s.literal("]")):
            s.argue("]")
            return True
        s.argue("" if is_first else ", ")
        is_first = False
        after = yield from _value(s, depth)
        if after == "]":
            s.argue("]")
            return True
        if after != ",":
            return False


def _value(s: Scanner, depth: int) -> Parsing[str]:
    """A value as JSON, and what follows it: a comma or a closing bracket, taken; empty where neither does."""
    yield from s.blanks()
    if (yield from s.literal(QUOTE)):
        s.argue('"')
        if (yield from s.until((QUOTE,), lambda text: s.argue(within_quotes(text)))) is None:
            return ""
        s.argue('"')
    elif (yield from s.peek()) in ("{", "["):
        if depth >= _MAX_DEPTH:
            return ""
        nested = _members if (yield from s.literal("{")) else _items
        if nested is _items:
            yield from s.literal("[")
        if not (yield from nested(s, depth + 1)):
            return ""
    elif (yield from s.peek()) == '"':
        raw: list[str] = []
        if not (yield from s.json_value(raw.append)):
            return ""
        s.argue(bare_value("".join(raw)))
    else:
        bare: list[str] = []
        mark = yield from s.until((",", "}", "]"), bare.append)
        if mark is None:
            return ""
        text = "".join(bare).strip()
        s.argue("null" if text.lower() in ("null", "none") else bare_value(text))
        return mark
    yield from s.blanks()
    for mark in (",", "}", "]"):
        if (yield from s.literal(mark)):
            return mark
    return ""
