"""Calls whose names stand before their arguments in JSON: DeepSeek, Kimi K2, GPT-OSS (harmony)."""

from __future__ import annotations

from control_plane.frontend.parsers.scanner import Parsing, Scanner

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


_KIMI_SECTION_BEGINS = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
_KIMI_SECTION_ENDS = ("<|tool_calls_section_end|>", "<|tool_call_section_end|>")
_KIMI_CALL, _KIMI_ARGUMENTS, _KIMI_CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


def kimi_k2(s: Scanner) -> Parsing[None]:
    """`<|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>JSON<|tool_call_end|>` in a section."""
    while (yield from s.until((*_KIMI_SECTION_BEGINS, _KIMI_CALL), s.say)) is not None:
        while True:
            before: list[str] = []
            mark = yield from s.until((_KIMI_ARGUMENTS, _KIMI_CALL, _KIMI_CALL_END, *_KIMI_SECTION_ENDS), before.append)
            if mark == _KIMI_ARGUMENTS:
                called = "".join(before).strip().removeprefix("functions.")
                name, colon, index = called.rpartition(":")
                s.open_call(name if colon and index.isdigit() else called)
                yield from s.blanks()
                yield from s.json_value(s.argue)
                s.close_call()
            elif mark is None or mark in _KIMI_SECTION_ENDS:
                break
        yield from s.blanks()


_HARMONY_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")


def harmony(s: Scanner) -> Parsing[None]:
    """GPT-OSS: messages of channels. `analysis` is reasoning, the rest text; what has a recipient, `to=functions.NAME`
    before or after the channel, is a call."""
    header: list[str] = []
    mark = yield from s.until(("<|channel|>", "<|message|>"), header.append)
    if mark is None:
        if not "".join(header).lstrip().startswith("to=functions."):
            s.say("".join(header))
        return
    while True:
        if mark == "<|channel|>":
            # The mark ends the recipient's name before it.
            header.append(" ")
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
