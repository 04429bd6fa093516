"""Calls whose arguments stand in tags of their own: Qwen3-Coder, Seed-OSS, MiniMax-M2, GLM-4.5, DeepSeek-V3.2."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from control_plane.frontend.parsers.argument_types import Written, properties_of, top_level, written_as
from control_plane.frontend.parsers.json_calls import call_array, unless_cut_off
from control_plane.frontend.parsers.scanner import Parsing, Scanner, discard

Schemas = Mapping[str, Mapping[str, Any]]
# Of a name, where the text ends.
_BEGUN_END = re.compile(r'("|</?\w*)$')
Program = Callable[[Scanner], Parsing[None]]


@dataclass(frozen=True, slots=True)
class Tags:
    """What stands around a call's name, its arguments' names and their values.

    Values are bare text: the tool's schema says which of them are strings, or the tag does.
    """

    before_name: str
    # What may follow a name; the beginning of an argument, or the end of the call, among them where nothing else does.
    name_ends: tuple[str, ...]
    before_key: str
    after_key: str
    end_value: str
    end_call: str
    # Around one or several calls; the newest model's first.
    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    # After the key, of a value that is a string and of any other.
    string_keys: tuple[str, str] | None = None
    # A line break on both sides of a value is not its own.
    on_lines: bool = False


QWEN3_CODER = Tags(
    "<function=", (">",), "<parameter=", ">", "</parameter>", "</function>", ("<tool_call>",), ("</tool_call>",),
    on_lines=True,
)  # fmt: skip
SEED_OSS = Tags(
    "<function=", (">",), "<parameter=", ">", "</parameter>", "</function>",
    ("<seed:tool_call>",), ("</seed:tool_call>",),
)  # fmt: skip
MINIMAX_M2 = Tags(
    '<invoke name="', ('">',), '<parameter name="', '">', "</parameter>", "</invoke>",
    ("<minimax:tool_call>",), ("</minimax:tool_call>",),
)  # fmt: skip
# 4.5 and 4.6 write a line break after the name, 4.7 none.
GLM45 = Tags(
    "<tool_call>", ("\n", "<arg_key>", "</tool_call>"), "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>",
    "</tool_call>",
)  # fmt: skip
# V4 names the section after tools.
DEEPSEEK_V32 = Tags(
    '<｜DSML｜invoke name="', ('">',), '<｜DSML｜parameter name="', '">', "</｜DSML｜parameter>", "</｜DSML｜invoke>",
    ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>"), ("</｜DSML｜function_calls>", "</｜DSML｜tool_calls>"),
    string_keys=('" string="true">', '" string="false">'),
)  # fmt: skip


def tagged_calls(tags: Tags) -> Callable[[Schemas], Program]:
    def with_schemas(schemas: Schemas) -> Program:
        def program(s: Scanner) -> Parsing[None]:
            while (mark := (yield from s.until((*tags.begins, tags.before_name), s.say))) is not None:
                if mark == tags.before_name or (yield from s.blanks_then(tags.before_name)):
                    yield from _call(s, tags, schemas)
                else:
                    # A model that knows Hermes' form better.
                    yield from call_array(s)
                while (yield from s.blanks_then(tags.before_name)):
                    yield from _call(s, tags, schemas)
                for end in tags.ends:
                    if (yield from s.blanks_then(end)):
                        break
                yield from s.blanks()

        return program

    return with_schemas


def _call(s: Scanner, tags: Tags, schemas: Schemas) -> Parsing[None]:
    if tags.end_call in tags.name_ends:
        # Nothing but a name tells such a call from one in JSON.
        yield from s.blanks()
        if (yield from s.peek()) in ("{", "["):
            yield from call_array(s)
            yield from s.blanks_then(tags.end_call)
            return
    called: list[str] = []
    mark = yield from s.until(tags.name_ends, called.append)
    if mark is None:
        s.say(unless_cut_off(_BEGUN_END.sub("", "".join(called))))
        return
    name = "".join(called).strip()
    root = schemas.get(name, {})
    properties = properties_of(top_level(root))
    s.open_call(name)
    is_first = True
    while True:
        if mark not in (tags.before_key, tags.end_call):
            mark = yield from s.until((tags.before_key, tags.end_call), discard)
        if mark is None:
            return  # cut off: the call is never complete
        if mark == tags.end_call:
            break
        key: list[str] = []
        end_of_key = yield from _key(s, tags, key.append)
        if end_of_key is None:
            return
        own_key = "".join(key).strip()
        s.argue(f"{'{' if is_first else ', '}{json.dumps(own_key, ensure_ascii=False)}: ")
        is_first = False
        if tags.on_lines:
            yield from s.literal("\n")
        if not (yield from _value(s, tags, _written(tags, end_of_key, properties.get(own_key), root))):
            return
        mark = ""
    s.argue("{}" if is_first else "}")
    s.close_call()


def _key(s: Scanner, tags: Tags, emit: Callable[[str], None]) -> Parsing[str | None]:
    """An argument's name up to where its value begins; what stood there, None if the text ends before."""
    first, line_break, second = tags.after_key.partition("\n")
    mark = yield from s.until((*(tags.string_keys or ()), first), emit)
    if mark is not None and line_break and not (yield from s.blanks_then(second)):
        # The value's tag is missing: what comes next is none.
        return (yield from s.until((second,), discard))
    return mark


def _written(tags: Tags, end_of_key: str, schema: Any, root: Mapping[str, Any]) -> Written:
    if tags.string_keys is not None and end_of_key in tags.string_keys:
        return Written.TEXT if end_of_key == tags.string_keys[0] else Written.JSON
    return written_as(schema, root)


def _value(s: Scanner, tags: Tags, written: Written) -> Parsing[bool]:
    """One value to its closing tag, as JSON; False if the text ends before. Strings come as they are written."""
    ends = (f"\n{tags.end_value}", tags.end_value) if tags.on_lines else (tags.end_value,)
    if written is Written.TEXT_OR_NULL:
        for end in ends:
            if (yield from s.literal(f"null{end}")):
                s.argue("null")
                return True
        written = Written.TEXT
    if written is Written.TEXT:
        s.argue('"')
        is_whole = (yield from s.until(ends, lambda text: s.argue(within_quotes(text)))) is not None
        s.argue('"' * is_whole)
        return is_whole
    value: list[str] = []
    yield from s.blanks()
    if (yield from s.peek()) in ("{", "[", '"'):
        # The tag may stand in one of its strings.
        yield from s.json_value(value.append)
    if (yield from s.until(ends, value.append)) is None:
        return False
    s.argue(bare_value("".join(value)))
    return True


def within_quotes(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def bare_value(text: str) -> str:
    """A bare value of a type that may be several, as JSON: what is none is a string."""
    if text.strip().lower() in ("true", "false"):
        return text.strip().lower()
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return text.strip()


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
