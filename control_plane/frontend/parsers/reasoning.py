"""What a model thinks before it answers, between two marks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from control_plane.frontend.parsers.scanner import Parsing, Scanner


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    begin: str
    end: str
    # The model thinks first, whether it writes the begin mark or not.
    always: bool = False
    # What the model writes behind the begin mark, before what it thinks.
    heading: str = ""
    # Around what it says then, on lines of their own.
    answer: tuple[str, str] | None = None


def with_reasoning(
    marks: ReasoningMarks, rest: Callable[[Scanner], Parsing[None]], *, is_begun: bool
) -> Callable[[Scanner], Parsing[None]]:
    """`is_begun`: the prompt ends with the begin mark."""

    def program(s: Scanner) -> Parsing[None]:
        s.is_reasoning = is_begun
        if (yield from s.blanks_then(marks.begin)) or is_begun:
            s.is_reasoning = True
            if marks.heading:
                yield from s.literal(marks.heading)
            yield from s.until((marks.end,), s.think)
            s.is_reasoning = False
            yield from s.blanks()
        if marks.answer is not None and (yield from s.blanks_then(marks.answer[0])):
            yield from s.literal("\n")
            s.silent = (f"\n{marks.answer[1]}", marks.answer[1])
        yield from rest(s)

    return program


def only_text(s: Scanner) -> Parsing[None]:
    yield from s.until((), s.say)
