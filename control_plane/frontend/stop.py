"""Stop strings in text that arrives in pieces.

The first match is the one that is complete first (of those that end at the same character, the longest): the same for
every way of cutting the text into pieces. Until then only text is let out that can no longer be part of a match.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class StopStrings:
    """The stop strings of one request, shared by its sequences."""

    __slots__ = ("last_characters", "max_prefix", "prefixes", "strings")

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = tuple(dict.fromkeys(strings))
        if not all(self.strings):
            raise ValueError("a stop string is empty")
        # Every proper prefix: text that ends in one of them may become a match.
        self.prefixes = frozenset(string[:length] for string in self.strings for length in range(1, len(string)))
        self.last_characters = frozenset(prefix[-1] for prefix in self.prefixes)
        self.max_prefix = max((len(prefix) for prefix in self.prefixes), default=0)

    def first_match(self, text: str) -> tuple[int, str] | None:
        """(end, string) of the match that ends first, the longest of several."""
        best: tuple[int, int, str] | None = None
        for string in self.strings:
            start = text.find(string)
            if start >= 0:
                found = (start + len(string), -len(string), string)
                best = found if best is None or found < best else best
        return None if best is None else (best[0], best[2])

    def num_held_back(self, text: str) -> int:
        """Length of the longest suffix that may still become a match."""
        if not text or text[-1] not in self.last_characters:
            return 0
        for length in range(min(self.max_prefix, len(text)), 0, -1):
            if text[-length:] in self.prefixes:
                return length
        return 0


@dataclass(frozen=True, slots=True)
class StopMatch:
    # Text before the match, match included if so asked, that had not been let out yet.
    text: str
    stop_string: str


class StopMatcher:
    """One sequence's search: `push` text until it returns a match."""

    __slots__ = ("_held", "_include", "_stops")

    def __init__(self, stops: StopStrings, *, include_stop_string: bool = False) -> None:
        self._stops = stops
        self._include = include_stop_string
        self._held = ""

    def push(self, text: str) -> str | StopMatch:
        """The text that may be shown now, or the match that ends the sequence."""
        if not text:
            return ""
        text = self._held + text
        match = self._stops.first_match(text)
        if match is not None:
            end, string = match
            self._held = ""
            return StopMatch(text[: end if self._include else end - len(string)], string)
        num_held = self._stops.num_held_back(text)
        if num_held:
            self._held = text[-num_held:]
            return text[:-num_held]
        self._held = ""
        return text

    def finish(self) -> str:
        """What was held back: the text has ended and it did not become a match."""
        held, self._held = self._held, ""
        return held
