"""Calls as Gemma 3, Llama 3.2 and Llama 4 write them: `[name(key=value, ...), ...]`, or objects with a name."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from control_plane.frontend.parsers.json_calls import call_object
from control_plane.frontend.parsers.scanner import Parsing, Scanner

_FENCES = ("```json", "```tool_code", "```python", "```", "<|python_start|>")
_FENCE_ENDS = ("```", "<|python_end|>")
_MAX_VALUE_CHARS = 2**20


def pythonic(schemas: Mapping[str, Any]) -> Callable[[Scanner], Parsing[None]]:
    """Both forms, in a fence or not, for a whole text: what begins otherwise is text.

    A list is one of calls if its first name is a tool's. A call's arguments come one by one.
    """

    def program(s: Scanner) -> Parsing[None]:
        s.start_record()
        for fence in _FENCES:
            if (yield from s.blanks_then(fence)):
                break
        yield from s.blanks()
        first = yield from s.peek()
        before = s.take_record()
        if first == "{":
            is_call = yield from call_object(s, before)
            yield from s.blanks()
            while is_call and (yield from s.peek()) == "{":
                is_call = yield from call_object(s)
                yield from s.blanks()
        elif first == "[":
            is_call = yield from _call_list(s, schemas.keys(), before)
        else:
            s.say(before)
            return
        if is_call:
            for end in _FENCE_ENDS:
                if (yield from s.blanks_then(end)):
                    break

    return program


def _call_list(s: Scanner, names: Collection[str], before: str) -> Parsing[bool]:
    s.start_record()
    yield from s.literal("[")
    num_calls = 0
    while True:
        yield from s.blanks()
        name = yield from s.word(".-")
        if name not in names or not (yield from s.literal("(")):
            break
        s.take_record()
        s.open_call(name)
        num_calls += 1
        is_whole = yield from _keyword_arguments(s)
        s.close_call()
        if not is_whole:
            return True
        s.start_record()
        yield from s.blanks()
        if not (yield from s.literal(",")):
            yield from s.literal("]")
            return True
    s.say(before * (not num_calls) + s.take_record())
    return num_calls > 0


def _keyword_arguments(s: Scanner) -> Parsing[bool]:
    """Up to the closing bracket; False where something else than a keyword with a literal stands."""
    is_first = True
    while True:
        yield from s.blanks()
        if (yield from s.literal(")")):
            s.argue("{}" if is_first else "}")
            return True
        key = yield from s.word()
        yield from s.blanks()
        if not key or not (yield from s.literal("=")):
            return False
        raw: list[str] = []
        if not (yield from s.python_value(raw.append)):
            return False
        value = _as_json("".join(raw).strip())
        if value is None:
            return False
        s.argue(f"{'{' if is_first else ', '}{json.dumps(key, ensure_ascii=False)}: {value}")
        is_first = False
        yield from s.blanks()
        yield from s.literal(",")


def _as_json(text: str) -> str | None:
    """A literal of Python as JSON text; None for what is none."""
    if len(text) > _MAX_VALUE_CHARS:
        return None
    try:
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = json.loads(text)  # true, false, null
        else:
            if isinstance(value, int | float) and not isinstance(value, bool):
                json.loads(text)
                return text  # digits as they are, however many
        shown = json.dumps(value, ensure_ascii=False, allow_nan=False)
        shown.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return shown
