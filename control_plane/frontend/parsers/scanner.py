"""The incremental core that every format shares.

A format is written as if the whole text lay before it: a generator that takes what it wants from a `Scanner`. Wherever
the text ends too early for a decision the generator waits, so that what it says does not depend on how the text was
cut into pieces: no method here looks at where one piece ends and the next begins. At the end of the text the same
methods answer with what there is. Nothing raises, whatever a model writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
Parsing = Generator[None, None, T]
Emit = Callable[[str], None]

_BLANKS = " \t\r\n"


def discard(text: str) -> None:
    """For markup."""


@dataclass(slots=True)
class CallPiece:
    """What has come of one call; only its first piece has a name."""

    index: int
    name: str
    arguments: str
    complete: bool = False


@dataclass(slots=True)
class ParsedDelta:
    """What one piece of text amounts to."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallPiece] = field(default_factory=list)


class Scanner:
    """The text that was not taken yet, and what was made of the rest."""

    __slots__ = (
        "_arguments",
        "_buffer",
        "_is_ended",
        "_is_mute",
        "_num_calls",
        "_record",
        "delta",
        "is_reasoning",
        "silent",
    )

    def __init__(self, *, is_mute: bool = False) -> None:
        self.delta = ParsedDelta()
        # Nothing but calls was asked for: what is none, like the beginning of one that was cut off, is not text.
        self._is_mute = is_mute
        # Whether what comes next belongs to the reasoning, as far as is known.
        self.is_reasoning = False
        # Marks that are no part of what is said, wherever they stand in it.
        self.silent: tuple[str, ...] = ()
        self._buffer = ""
        self._is_ended = False
        self._num_calls = 0
        self._arguments: list[str] | None = None
        self._record: list[str] | None = None

    # ---- out ----

    def say(self, text: str) -> None:
        if not self._is_mute:
            self.delta.text += text

    def think(self, text: str) -> None:
        self.delta.reasoning += text

    def open_call(self, name: str) -> None:
        self.close_call()
        self.delta.calls.append(CallPiece(self._num_calls, name, ""))
        self._num_calls += 1
        self._arguments = []

    def argue(self, text: str) -> None:
        """More of the open call's arguments."""
        if self._arguments is None or not text:
            return
        self._arguments.append(text)
        calls = self.delta.calls
        if calls and calls[-1].index == self._num_calls - 1:
            calls[-1].arguments += text
        else:
            calls.append(CallPiece(self._num_calls - 1, "", text))

    def close_call(self) -> None:
        """The open call, if any, has ended; it is complete if its arguments are JSON."""
        if self._arguments is None:
            return
        complete = _is_json("".join(self._arguments))
        self._arguments = None
        if complete:
            calls = self.delta.calls
            if not calls or calls[-1].index != self._num_calls - 1:
                calls.append(CallPiece(self._num_calls - 1, "", ""))
            calls[-1].complete = True

    # ---- in ----

    def feed(self, text: str) -> None:
        self._buffer += text

    def end(self) -> None:
        self._is_ended = True

    @property
    def is_over(self) -> bool:
        """Nothing is left, and nothing comes."""
        return self._is_ended and not self._buffer

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        if self._record is not None:
            self._record.append(taken)
        return taken

    def start_record(self) -> None:
        """Remember what is taken from here on, so that it can be said after all."""
        self._record = []

    def take_record(self) -> str:
        record, self._record = self._record, None
        return "".join(record or ())

    def until(self, markers: Sequence[str], emit: Emit) -> Parsing[str | None]:
        """Emit the text before the first of the markers (the longest of several) and take it; None: the text ended."""
        silent = self.silent if emit == self.say else ()
        while True:
            start, marker = self._first((*markers, *silent))
            if start:
                emit(self._take(start))
            if marker:
                self._take(len(marker))
                if marker not in silent:
                    return marker
                continue
            if self._is_ended:
                if self._buffer:
                    emit(self._take(len(self._buffer)))
                return None
            yield

    def _first(self, markers: Sequence[str]) -> tuple[int, str]:
        """Where the first marker begins, or may begin once more text has come; the marker if it is there in full."""
        text, best, found = self._buffer, len(self._buffer), ""
        for marker in markers:
            at = text.find(marker)
            if at >= 0 and (at < best or (at == best and len(marker) > len(found))):
                best, found = at, marker
        if self._is_ended:
            return best, found
        for marker in markers:
            # A longer or an earlier marker whose end has not come yet.
            for start in range(max(0, len(text) - len(marker) + 1), min(best + 1, len(text))):
                if marker.startswith(text[start:]) and (start < best or len(marker) > len(found)):
                    best, found = start, ""
                    break
        return best, found

    def literal(self, text: str) -> Parsing[bool]:
        """Take this text if it comes next."""
        while len(self._buffer) < len(text) and text.startswith(self._buffer) and not self._is_ended:
            yield
        if not self._buffer.startswith(text):
            return False
        self._take(len(text))
        return True

    def blanks(self) -> Parsing[None]:
        while True:
            stripped = self._buffer.lstrip(_BLANKS)
            if len(stripped) < len(self._buffer):
                self._take(len(self._buffer) - len(stripped))
            if stripped or self._is_ended:
                return
            yield

    def blanks_then(self, text: str) -> Parsing[bool]:
        """Take blanks and this text if they come next, and nothing otherwise."""
        while True:
            rest = self._buffer.lstrip(_BLANKS)
            if rest.startswith(text):
                self._take(len(self._buffer) - len(rest) + len(text))
                return True
            if self._is_ended or not text.startswith(rest):
                return False
            yield

    def peek(self) -> Parsing[str]:
        """The next character; empty at the end."""
        while not self._buffer and not self._is_ended:
            yield
        return self._buffer[:1]

    def json_value(self, emit: Emit) -> Parsing[bool]:
        """Emit a JSON value as it stands; False if the text ends inside it. Only brackets and strings are looked at."""
        depth, in_string, escaped, begun, scalar = 0, False, False, False, False
        while True:
            text = self._buffer
            for position, character in enumerate(text):
                if in_string:
                    if escaped:
                        escaped = False
                    elif character == "\\":
                        escaped = True
                    elif character == '"':
                        in_string = False
                    if in_string or depth:
                        continue
                elif character == '"' and not scalar:
                    in_string = begun = True
                    continue
                elif character in "{[" and not scalar:
                    depth += 1
                    begun = True
                    continue
                elif character in "}]" and depth:
                    depth -= 1
                    if depth:
                        continue
                elif depth:
                    continue
                elif character in ",}]" or character in _BLANKS:
                    # The end of a number or a word; blanks before a value belong to nothing.
                    if begun or character in ",}]":
                        emit(self._take(position))
                        return begun
                    continue
                else:
                    begun = scalar = True
                    continue
                emit(self._take(position + 1))
                return True
            emit(self._take(len(text)))
            if self._is_ended:
                return scalar
            yield

    def python_value(self, emit: Emit) -> Parsing[bool]:
        """Emit a literal of Python as it stands, up to the comma or bracket after it; False if the text ends inside."""
        depth, quote, escaped = 0, "", False
        while True:
            for position, character in enumerate(self._buffer):
                if quote:
                    if escaped or character == "\\":
                        escaped = not escaped
                    elif character == quote:
                        quote = ""
                elif character in "\"'":
                    quote = character
                elif character in "([{":
                    depth += 1
                elif character in ",)]}":
                    if not depth:
                        emit(self._take(position))
                        return True
                    depth -= character != ","
            emit(self._take(len(self._buffer)))
            if self._is_ended:
                return False
            yield

    def word(self, more: str = "") -> Parsing[str]:
        """Take letters, digits, underscores and the characters `more`; empty where none comes next."""
        taken: list[str] = []
        while True:
            length = 0
            while length < len(self._buffer) and (self._buffer[length].isalnum() or self._buffer[length] in "_" + more):
                length += 1
            is_over = length < len(self._buffer)
            taken.append(self._take(length))
            if is_over or self._is_ended:
                return "".join(taken)
            yield


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class IncrementalParser:
    """One sequence's parse: `push` its text piece by piece, then `finish`."""

    __slots__ = ("_scanner", "_steps")

    def __init__(self, program: Callable[[Scanner], Parsing[None]], *, is_mute: bool = False) -> None:
        self._scanner = Scanner(is_mute=is_mute)
        self._steps = program(self._scanner)
        self._advance()

    @property
    def is_reasoning(self) -> bool:
        return self._scanner.is_reasoning

    def push(self, text: str) -> ParsedDelta:
        self._scanner.feed(text)
        return self._advance()

    def finish(self) -> ParsedDelta:
        """What was held back; the text has ended."""
        self._scanner.end()
        self._run()
        self._scanner.close_call()
        return self._take_delta()

    def _advance(self) -> ParsedDelta:
        self._run()
        return self._take_delta()

    def _run(self) -> None:
        # A program that has read all it knows of leaves the rest to the text.
        if next(self._steps, True):
            self._steps = _rest(self._scanner)
            next(self._steps, None)

    def _take_delta(self) -> ParsedDelta:
        delta, self._scanner.delta = self._scanner.delta, ParsedDelta()
        return delta


def _rest(scanner: Scanner) -> Parsing[None]:
    yield from scanner.until((), scanner.say)
