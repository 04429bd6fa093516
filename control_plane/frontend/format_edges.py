"""What a format may begin with, and whether it tells its own end: what may stand before what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend.grammar import GrammarError

MAX_DEPTH = 16
MAX_FORMATS = 512


class Edge(Enum):
    TEXT = 1
    # Any text at all: it ends where it is told to.
    FREE_TEXT = 2
    TOKEN = 3
    # One of nearly all tokens: where such a one may come, it is taken for that and for no text.
    FREE_TOKENS = 4


_NONE: frozenset[Edge] = frozenset()
_TOKENS = frozenset({Edge.TOKEN, Edge.FREE_TOKENS})
_FREE = frozenset({Edge.FREE_TEXT, Edge.FREE_TOKENS})


@dataclass(frozen=True)
class Edges:
    begins: frozenset[Edge]
    # What may follow when it could as well be over; part of `_FREE`.
    goes_on: frozenset[Edge] = _NONE
    may_be_empty: bool = False


def edges(layout: pb.TextFormat) -> Edges:
    """Where that cannot be known of a format, the one that allows less around it."""
    match layout.WhichOneof("format"):
        case "any_text":
            return Edges(frozenset({Edge.FREE_TEXT}), frozenset({Edge.FREE_TEXT}), may_be_empty=True)
        case "token":
            return Edges(frozenset({Edge.TOKEN}))
        case "any_token":
            return Edges(frozenset({Edge.FREE_TOKENS}))
        case "any_tokens":
            return Edges(frozenset({Edge.FREE_TOKENS}), frozenset({Edge.FREE_TOKENS}), may_be_empty=True)
        case "sequence":
            return _of_sequence(layout.sequence.formats)
        case "any_of":
            return _of_any(map(edges, layout.any_of.formats))
        case "tag":
            return _of_tag(layout.tag)
        case "triggered_tags":
            return _of_triggered(layout.triggered_tags, Edge.TEXT, Edge.FREE_TEXT)
        case "token_triggered_tags":
            return _of_triggered(layout.token_triggered_tags, Edge.TOKEN, Edge.FREE_TOKENS)
        case "separated_tags":
            return _of_separated(layout.separated_tags)
        case "repeat":
            return _of_repeat(layout.repeat)
        case "regex" | "grammar" | "qwen_parameters":
            return Edges(frozenset({Edge.TEXT}), may_be_empty=True)
        case _:
            return Edges(frozenset({Edge.TEXT}))


def check_ends(formats: Iterable[Edges]) -> None:
    """Raise `GrammarError` where something follows that would never be reached."""
    goes_on = _NONE
    for each in formats:
        _check_next(goes_on, each)
        goes_on = each.goes_on | (goes_on if each.may_be_empty else _NONE)


def check_repeated(content: Edges) -> None:
    """Raise `GrammarError` where one time is not told from the next."""
    _check_next(content.goes_on, content)


def check_before_more(content: Edges) -> None:
    """Raise `GrammarError` where something else that follows could not be told from it."""
    if content.goes_on:
        raise GrammarError(_no_end("free text has" if Edge.FREE_TEXT in content.goes_on else "free tokens have"))


def check_closed_by_text(content: Edges) -> None:
    """Raise `GrammarError` where a text that closes it would never be reached."""
    if Edge.FREE_TOKENS in content.goes_on:
        raise GrammarError("free tokens are ended by tokens, not by text: give the tag around them an end_token")


def check_size(layout: pb.TextFormat) -> None:
    """Raise `GrammarError` for more formats than are taken, or deeper ones."""
    num_formats = 0
    level = [layout]
    for _ in range(MAX_DEPTH):
        num_formats += len(level)
        if num_formats > MAX_FORMATS:
            break
        level = [inner for each in level for inner in _within(each)]
    if level:
        raise GrammarError(f"holds more than {MAX_FORMATS} formats, or {MAX_DEPTH} within each other")


def _check_next(goes_on: frozenset[Edge], following: Edges) -> None:
    if Edge.FREE_TEXT in goes_on:
        raise GrammarError(_no_end("free text has"))
    if Edge.FREE_TOKENS in goes_on and not following.begins <= _TOKENS:
        raise GrammarError("free tokens are ended by tokens, not by text: put them into a tag with an end_token")


def _no_end(kind: str) -> str:
    return f"{kind} no end before what follows: put what is free into a tag with an end"


def _of_sequence(formats: Iterable[pb.TextFormat]) -> Edges:
    begins = goes_on = _NONE
    may_be_empty = True
    for each in map(edges, formats):
        if may_be_empty:
            begins |= each.begins
        may_be_empty = may_be_empty and each.may_be_empty
        goes_on = each.goes_on | (goes_on if each.may_be_empty else _NONE)
    return Edges(begins, goes_on, may_be_empty)


def _of_any(choices: Iterable[Edges]) -> Edges:
    found = list(choices)
    return Edges(
        _NONE.union(*(each.begins for each in found)),
        _NONE.union(*(each.goes_on for each in found)),
        any(each.may_be_empty for each in found),
    )


def _of_tag(tag: pb.FormatTag) -> Edges:
    content = edges(tag.content)
    end = Edge.TOKEN if tag.HasField("end_token") else Edge.TEXT if tag.end else None
    goes_on = content.goes_on if end is None else _NONE
    if tag.HasField("begin_token"):
        return Edges(frozenset({Edge.TOKEN}), goes_on)
    if tag.begin:
        return Edges(frozenset({Edge.TEXT}), goes_on)
    if end is None or not content.may_be_empty:
        return Edges(content.begins, goes_on, content.may_be_empty)
    return Edges(content.begins | {end}, goes_on)


def _of_triggered(layout: pb.TriggeredTags | pb.TokenTriggeredTags, trigger: Edge, free: Edge) -> Edges:
    begins = frozenset({trigger}) if layout.at_least_one else frozenset({trigger, free})
    goes_on = _NONE if layout.at_least_one and layout.stop_after_first else frozenset({free})
    return Edges(begins, goes_on.union(*(_of_tag(tag).goes_on for tag in layout.tags)), not layout.at_least_one)


def _of_separated(layout: pb.SeparatedTags) -> Edges:
    tags = _of_any(map(_of_tag, layout.tags))
    goes_on = tags.goes_on
    if not (layout.at_least_one and layout.stop_after_first):
        goes_on |= tags.begins & {Edge.FREE_TOKENS}
    return Edges(tags.begins, goes_on, tags.may_be_empty or not layout.at_least_one)


def _of_repeat(layout: pb.RepeatedFormat) -> Edges:
    if layout.HasField("max") and layout.max == 0:
        return Edges(_NONE, may_be_empty=True)
    content = edges(layout.format)
    goes_on = content.goes_on
    if not layout.HasField("max") or layout.min != layout.max:
        # Another time, where it may also be over.
        goes_on |= content.begins & _FREE
    return Edges(content.begins, goes_on, content.may_be_empty or layout.min == 0)


def _within(layout: pb.TextFormat) -> Iterator[pb.TextFormat]:
    match layout.WhichOneof("format"):
        case "sequence":
            yield from layout.sequence.formats
        case "any_of":
            yield from layout.any_of.formats
        case "repeat":
            yield layout.repeat.format
        case "tag":
            yield layout.tag.content
        case "triggered_tags":
            yield from (tag.content for tag in layout.triggered_tags.tags)
        case "token_triggered_tags":
            yield from (tag.content for tag in layout.token_triggered_tags.tags)
        case "separated_tags":
            yield from (tag.content for tag in layout.separated_tags.tags)
