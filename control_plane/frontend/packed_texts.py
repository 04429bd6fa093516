"""What a Session's next message says of requests of which only text and ids are wanted: columns, an entry a request.

Most tokens pass here. A token costs its request one call and the message nothing: the columns grow as tokens come, and
are handed to protobuf as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TypeVar

from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend.metrics import FrontendMetrics

Item = TypeVar("Item")

# A text is copied with each token that it grows by; one that waits long grows by parts of this length.
_PART_CHARS = 2048


class Columns:
    """One message's. Nothing in it changes any more once it was taken, at `taken_s`."""

    __slots__ = ("_later_ids", "_parts", "num_tokens", "since_s", "tags", "taken_s", "texts", "token_ids")

    def __init__(self) -> None:
        self.tags: list[int] = []
        self.texts: list[str] = []
        self.num_tokens: list[int] = []
        # The first of each; empty where only text is wanted.
        self.token_ids: list[int] = []
        # When text of the request was last taken; of a request of which none was, its arrival, negated.
        self.since_s: list[float] = []
        self.taken_s = 0.0
        # Place -> what comes before its text.
        self._parts: dict[int, list[str]] = {}
        # Place -> the ids after its first.
        self._later_ids: dict[int, list[int]] = {}

    def grow(self, place: int, text: str, num_tokens: int, token_id: int) -> None:
        """Append to a request's entry."""
        self.num_tokens[place] += num_tokens
        if self.token_ids:
            self._later_ids.setdefault(place, []).append(token_id)
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
        if self.token_ids:
            kept.token_ids = _at(self.token_ids, places)
            later = self._later_ids
            kept._later_ids = {new: later[old] for new, old in enumerate(places) if old in later}
        return kept

    def ids_at(self, place: int) -> list[int]:
        """All of a request's."""
        return [self.token_ids[place], *self._later_ids.get(place, ())] if self.token_ids else []

    def all_ids(self) -> Iterable[int]:
        """Request after request."""
        if not self._later_ids:
            return self.token_ids
        return chain.from_iterable(map(self.ids_at, range(len(self.token_ids))))


class PackedColumns:
    """The columns that fill now. `on_first` is called when they were empty and are no longer."""

    __slots__ = ("_has_holes", "_has_ids", "_on_first", "columns", "is_wanted")

    def __init__(self, on_first: Callable[[], None], *, has_ids: bool) -> None:
        self.columns = Columns()
        self._has_ids = has_ids
        # Whether the client asked for them.
        self.is_wanted = False
        self._on_first = on_first
        self._has_holes = False

    def add(self, tag: int, text: str, num_tokens: int, since_s: float, token_id: int) -> int:
        """A request's first token in this message; returns the place at which further ones are appended."""
        columns = self.columns
        place = len(columns.tags)
        columns.tags.append(tag)
        columns.texts.append(text)
        columns.num_tokens.append(num_tokens)
        columns.since_s.append(since_s)
        if self._has_ids:
            columns.token_ids.append(token_id)
        if not place:
            self._on_first()
        return place

    def withdraw(self, place: int) -> tuple[str, list[int], int, float]:
        """Take a request's entry out, because more is to be said of it: (text, ids, tokens, since)."""
        columns = self.columns
        columns.join()
        entry = columns.texts[place], columns.ids_at(place), columns.num_tokens[place], columns.since_s[place]
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
        self.texts = PackedColumns(on_first, has_ids=False)
        self.token_ids = PackedColumns(on_first, has_ids=True)
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
            message.token_ids.token_ids.extend(columns.all_ids())
            self._observe(columns, now_s)

    def _observe(self, columns: Columns, now_s: float) -> None:
        for since, count, num_seen in _counted(columns.since_s, columns.num_tokens):
            if since > 0:
                self._metrics.inter_token_latency.observe((now_s - since) / count, count * num_seen)
            else:
                self._metrics.time_to_first_token.observe(now_s + since, num_seen)


def _counted(since_s: list[float], num_tokens: list[int]) -> Iterable[tuple[float, int, int]]:
    """(since, tokens, how often). Most were in the message before, with as many tokens: few values, each seen often."""
    num_entries = len(since_s)
    if num_entries and since_s.count(since_s[0]) == num_tokens.count(num_tokens[0]) == num_entries:
        return ((since_s[0], num_tokens[0], num_entries),)
    seen = Counter(zip(since_s, num_tokens, strict=True))
    return ((since, count, num_seen) for (since, count), num_seen in seen.items())


def _fill(packed: pb.PackedTexts | pb.PackedTokenIds, columns: Columns) -> None:
    packed.tags.extend(columns.tags)
    packed.texts.extend(columns.texts)
    packed.num_tokens.extend(columns.num_tokens)


def _at(values: Sequence[Item], places: Sequence[int]) -> list[Item]:
    return [values[place] for place in places]
