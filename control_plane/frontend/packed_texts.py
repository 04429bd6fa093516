"""What a Session's next message says of requests of which only text and ids are wanted: columns, an entry a request.

Most tokens pass here. A token costs its request one call and the message nothing: the columns grow as tokens come, and
are handed to protobuf as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend.metrics import FrontendMetrics

Item = TypeVar("Item")

# A text is copied with each token that it grows by; one that waits long grows by parts of this length.
_PART_CHARS = 2048


class Columns:
    """One message's. Nothing in it changes any more once it was taken, at `taken_s`."""

    __slots__ = ("_parts", "num_tokens", "since_s", "tags", "taken_s", "texts", "token_ids")

    def __init__(self) -> None:
        self.tags: list[int] = []
        self.texts: list[str] = []
        self.num_tokens: list[int] = []
        # Empty where only text is wanted; else as many of each as it has tokens.
        self.token_ids: list[list[int]] = []
        # When text of the request was last taken; of a request of which none was, its arrival, negated.
        self.since_s: list[float] = []
        self.taken_s = 0.0
        # Place -> what comes before its text.
        self._parts: dict[int, list[str]] = {}

    def grow(self, place: int, text: str, num_tokens: int) -> None:
        """Append to a request's entry."""
        self.num_tokens[place] += num_tokens
        texts = self.texts
        texts[place] += text
        if len(texts[place]) > _PART_CHARS:
            self._parts.setdefault(place, []).append(texts[place])
            texts[place] = ""

    def join(self) -> None:
        """Make each text one."""
        for place, parts in self._parts.items():
            self.texts[place] = "".join(parts) + self.texts[place]
        self._parts.clear()

    def kept(self) -> Columns:
        """Without what was withdrawn."""
        places = [place for place, count in enumerate(self.num_tokens) if count]
        kept = Columns()
        kept.tags, kept.texts = _at(self.tags, places), _at(self.texts, places)
        kept.num_tokens, kept.since_s = _at(self.num_tokens, places), _at(self.since_s, places)
        kept.token_ids = _at(self.token_ids, places) if self.token_ids else []
        return kept


class PackedColumns:
    """The columns that fill now. `on_first` is called when they were empty and are no longer."""

    __slots__ = ("_has_holes", "_on_first", "columns", "is_wanted")

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.columns = Columns()
        # Whether the client asked for them.
        self.is_wanted = False
        self._on_first = on_first
        self._has_holes = False

    def add(self, tag: int, text: str, num_tokens: int, since_s: float) -> int:
        """A request's first text in this message; returns the place at which further text is appended."""
        columns = self.columns
        place = len(columns.tags)
        columns.tags.append(tag)
        columns.texts.append(text)
        columns.num_tokens.append(num_tokens)
        columns.since_s.append(since_s)
        if not place:
            self._on_first()
        return place

    def withdraw(self, place: int) -> tuple[str, int, float]:
        """Take a request's entry out, because more is to be said of it: (text, tokens, since)."""
        columns = self.columns
        columns.join()
        entry = columns.texts[place], columns.num_tokens[place], columns.since_s[place]
        columns.num_tokens[place] = 0
        self._has_holes = True
        return entry

    def take_columns(self, now_s: float) -> Columns:
        columns = self.columns
        self.columns = Columns()
        columns.taken_s = now_s
        columns.join()
        if self._has_holes:
            self._has_holes = False
            return columns.kept()
        return columns


class PackedTexts:
    """Both kinds of columns of one Session."""

    __slots__ = ("_metrics", "texts", "token_ids")

    def __init__(self, metrics: FrontendMetrics, on_first: Callable[[], None]) -> None:
        # Of requests of which only text is wanted, and of those whose ids are.
        self.texts = PackedColumns(on_first)
        self.token_ids = PackedColumns(on_first)
        self._metrics = metrics

    def has_any(self) -> bool:
        return bool(self.texts.columns.tags or self.token_ids.columns.tags)

    def take(self, message: pb.SessionResponse, now_s: float) -> None:
        """Move everything that has come into the message."""
        if self.texts.columns.tags:
            columns = self.texts.take_columns(now_s)
            _fill(message.texts, columns)
            self._observe(columns, now_s)
        if self.token_ids.columns.tags:
            columns = self.token_ids.take_columns(now_s)
            _fill(message.token_ids, columns)
            message.token_ids.token_ids.extend(chain.from_iterable(columns.token_ids))
            self._observe(columns, now_s)

    def _observe(self, columns: Columns, now_s: float) -> None:
        # Most were in the message before, with as many tokens: few values, each seen often.
        seen = Counter(zip(columns.since_s, columns.num_tokens, strict=True))
        for (since, count), num_seen in seen.items():
            if since > 0:
                self._metrics.inter_token_latency.observe((now_s - since) / count, count * num_seen)
            else:
                self._metrics.time_to_first_token.observe(now_s + since, num_seen)


def _fill(packed: pb.PackedTexts | pb.PackedTokenIds, columns: Columns) -> None:
    packed.tags.extend(columns.tags)
    packed.texts.extend(columns.texts)
    packed.num_tokens.extend(columns.num_tokens)


def _at(values: Sequence[Item], places: Sequence[int]) -> list[Item]:
    return [values[place] for place in places]
