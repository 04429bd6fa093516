"""What a Session's next message says of requests of which only text is wanted: three columns, an entry a request.

Most tokens pass here. A token costs its request one call and the message nothing: the columns grow as tokens come, and
are handed to protobuf as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend.metrics import FrontendMetrics


class TextColumns:
    """One message's. Nothing in it changes any more once it was taken, at `taken_s`."""

    __slots__ = ("num_tokens", "since_s", "tags", "taken_s", "texts")

    def __init__(self) -> None:
        self.tags: list[int] = []
        self.texts: list[str] = []
        self.num_tokens: list[int] = []
        # When text of the request was last taken; of a request of which none was, its arrival, negated.
        self.since_s: list[float] = []
        self.taken_s = 0.0


class PackedTexts:
    """The columns that fill now. `on_first` is called when they were empty and are no longer."""

    __slots__ = ("_has_holes", "_metrics", "_on_first", "columns", "is_wanted")

    def __init__(self, metrics: FrontendMetrics, on_first: Callable[[], None]) -> None:
        self.columns = TextColumns()
        # Whether the client asked for them.
        self.is_wanted = False
        self._metrics = metrics
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
        """Take a request's entry out, because more than text is to be said of it: (text, tokens, since)."""
        columns = self.columns
        entry = columns.texts[place], columns.num_tokens[place], columns.since_s[place]
        columns.num_tokens[place] = 0
        self._has_holes = True
        return entry

    def take(self, message: pb.SessionResponse, now_s: float) -> None:
        """Move everything that has come into the message."""
        columns = self.columns
        if not columns.tags:
            return
        self.columns = TextColumns()
        columns.taken_s = now_s
        tags, texts, counts, since_s = columns.tags, columns.texts, columns.num_tokens, columns.since_s
        if self._has_holes:
            self._has_holes = False
            kept = [place for place, count in enumerate(counts) if count]
            tags, texts = [tags[place] for place in kept], [texts[place] for place in kept]
            counts, since_s = [counts[place] for place in kept], [since_s[place] for place in kept]
        packed = message.texts
        packed.tags.extend(tags)
        packed.texts.extend(texts)
        packed.num_tokens.extend(counts)
        # Most were in the message before, with as many tokens: few values, each seen often.
        for (since, count), num_seen in Counter(zip(since_s, counts, strict=True)).items():
            if since > 0:
                self._metrics.inter_token_latency.observe((now_s - since) / count, count * num_seen)
            else:
                self._metrics.time_to_first_token.observe(now_s + since, num_seen)
