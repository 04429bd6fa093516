"""What a format may begin with, and whether it tells its own end: what may stand before what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    # Once more something that begins with free text, or else what follows.
    FREE_TEXT_AGAIN = 3


@dataclass(frozen=True)
class Literal:
    """Exactly this text."""

    text: str


@dataclass(frozen=True)
class FreeTokens:
    """A token that is none of these. Where such a one may come, a token is taken for that, and for no text."""

    excluded_ids: frozenset[int]


# An int is the id of a token.
Begin = Edge | Literal | FreeTokens | int
_NONE: frozenset[Begin] = frozenset()


@dataclass(frozen=True)
class Edges:
    begins: frozenset[Begin]
    # What may follow when it could as well be over: what is free, and tokens that begin it once more.
    goes_on: frozenset[Begin] = _NONE
    may_be_empty: bool = False


def edges(layout: pb.TextFormat) -> Edges:
    """layout: its tokens are ids (`format_tokens.with_ids`).

    Where something cannot be known of a format, it is what allows less around it.
    """
    match layout.WhichOneof("format"):
        case "const_string":
            return Edges(frozenset({Literal(layout.const_string)}))
        case "any_text":
            return Edges(frozenset({Edge.FREE_TEXT}), frozenset({Edge.FREE_TEXT}), may_be_empty=True)
        case "token":
            return Edges(frozenset({layout.token.id}))
        case "any_token":
            return Edges(_free_tokens(layout.any_token.excluded))
        case "any_tokens":
            if layout.any_tokens.HasField("max_tokens") and layout.any_tokens.max_tokens == 0:
                return Edges(_NONE, may_be_empty=True)
            free = _free_tokens(layout.any_tokens.excluded)
            return Edges(free, free, may_be_empty=True)
        case "sequence":
            return _of_sequence(layout.sequence.formats)
        case "any_of":
            return _of_any(map(edges, layout.any_of.formats))
        case "tag":
            return _of_tag(layout.tag)
        case "triggered_tags":
            return _of_triggered(layout.triggered_tags, frozenset({Edge.FREE_TEXT}))
        case "token_triggered_tags":
            return _of_triggered(layout.token_triggered_tags, _free_tokens(layout.token_triggered_tags.excluded))
        case "separated_tags":
            return _of_separated(layout.separated_tags)
        case "repeat":
            return _of_repeat(layout.repeat)
        case "regex" | "grammar" | "qwen_parameters":
            return Edges(frozenset({Edge.TEXT}), may_be_empty=True)
        case _:
            return Edges(frozenset({Edge.TEXT}))


def check_ends(formats: Iterable[Edges], texts: Mapping[int, str]) -> None:
    """Raise `GrammarError` where something follows that would never be reached.

    texts: of the tokens that are named and not special.
    """
    goes_on = _NONE
    for each in formats:
        _check_next(goes_on, each.begins, texts)
        goes_on = each.goes_on | (goes_on if each.may_be_empty else _NONE)


def check_repeated(content: Edges) -> None:
    """Raise `GrammarError` where one time is not told from the next."""
    # A token that begins both does no harm: what follows them is the same.
    _check_next(frozenset(each for each in content.goes_on if not isinstance(each, int)), content.begins, {})


def check_before_more(content: Edges) -> None:
    """Raise `GrammarError` where free text, or free tokens, that follow could not be told from it."""
    if any(isinstance(each, Edge) for each in content.goes_on):
        raise GrammarError(_no_end("free text has"))
    if any(isinstance(each, FreeTokens) for each in content.goes_on):
        raise GrammarError(_no_end("free tokens have"))


def check_closed_by_text(content: Edges, ends: Iterable[str], texts: Mapping[int, str]) -> None:
    """Raise `GrammarError` where a text that closes it would never be reached; `texts` as in `check_ends`."""
    _check_tokens(content.goes_on, frozenset(map(Literal, ends)), texts)
    if Edge.FREE_TEXT_AGAIN in content.goes_on:
        raise GrammarError("repeats a format that begins with free text: nothing tells whether it comes once more")
    if any(isinstance(each, FreeTokens) for each in content.goes_on):
        raise GrammarError("free tokens are ended by tokens, not by text: give the tag around them a token as its end")


def check_closed_by_token(content: Edges, end: pb.NamedToken) -> None:
    """Raise `GrammarError` where a token that closes it could as well begin it once more."""
    _check_tokens(content.goes_on, frozenset({end.id}), {})


def check_size(layout: pb.TextFormat) -> None:
    """Raise `GrammarError` for more formats than are taken, or deeper ones."""
    num_formats = 0
    level = [layout]
    for _ in range(MAX_DEPTH):
        num_formats += len(level)
        if num_formats > MAX_FORMATS:
            break
        level = [
            inner for each in level for inner in (*formats_within(each), *(tag.content for tag in tags_within(each)))
        ]
    if level:
        raise GrammarError(f"holds more than {MAX_FORMATS} formats, or {MAX_DEPTH} within each other")


def _check_next(goes_on: frozenset[Begin], begins: frozenset[Begin], texts: Mapping[int, str]) -> None:
    _check_tokens(goes_on, begins, texts)
    if begins and not goes_on.isdisjoint({Edge.FREE_TEXT, Edge.FREE_TEXT_AGAIN}):
        raise GrammarError(_no_end("free text has"))
    for free in goes_on:
        if isinstance(free, FreeTokens) and not begins <= free.excluded_ids:
            raise GrammarError(
                "free tokens are followed by what could be one of them: let a token follow that they exclude, "
                "or put them into a tag with a token as its end"
            )


def _check_tokens(goes_on: frozenset[Begin], begins: frozenset[Begin], texts: Mapping[int, str]) -> None:
    """A token that is named is taken for that, wherever its text might follow as well."""
    for each in goes_on & begins:
        if isinstance(each, int):
            raise GrammarError(
                f"the token {each} begins what may come once more, and what follows: nothing tells one from the other"
            )
    for token_id in texts.keys() & goes_on:
        for each in begins:
            if each is Edge.TEXT or (isinstance(each, Literal) and each.text.startswith(texts[token_id])):
                raise GrammarError(
                    f"repeats what begins with the token {token_id}, a text like any other: "
                    f"nothing tells it from the text that follows"
                )


def _free_tokens(excluded: Iterable[pb.NamedToken]) -> frozenset[Begin]:
    return frozenset({FreeTokens(frozenset(token.id for token in excluded))})


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
    end = _mark([tag.end, *tag.other_ends], tag.end_token if tag.HasField("end_token") else None)
    begin = _mark([tag.begin], tag.begin_token if tag.HasField("begin_token") else None)
    goes_on = _NONE if end else content.goes_on
    if begin:
        return Edges(begin, goes_on)
    if not content.may_be_empty:
        return Edges(content.begins, goes_on)
    return Edges(content.begins | end, goes_on, may_be_empty=not end)


def _mark(texts: Iterable[str], token: pb.NamedToken | None) -> frozenset[Begin]:
    return frozenset(Literal(text) for text in texts if text) if token is None else frozenset({token.id})


def _of_triggered(layout: pb.TriggeredTags | pb.TokenTriggeredTags, free: frozenset[Begin]) -> Edges:
    tags = _of_any(map(_of_tag, layout.tags))
    begins = tags.begins if layout.at_least_one else tags.begins | free
    goes_on = _NONE if layout.at_least_one and layout.stop_after_first else free | _named_of(tags)
    return Edges(begins, goes_on | tags.goes_on, may_be_empty=not layout.at_least_one)


def _of_separated(layout: pb.SeparatedTags) -> Edges:
    tags = _of_any(map(_of_tag, layout.tags))
    goes_on = tags.goes_on
    if not layout.stop_after_first and not layout.separator:
        goes_on |= _again(tags) | _named_of(tags)
    elif not layout.at_least_one:
        goes_on |= _free_tokens_of(tags)
    return Edges(tags.begins, goes_on, tags.may_be_empty or not layout.at_least_one)


def _of_repeat(layout: pb.RepeatedFormat) -> Edges:
    limit = layout.max if layout.HasField("max") else None
    if limit == 0:
        return Edges(_NONE, may_be_empty=True)
    content = edges(layout.format)
    goes_on = content.goes_on
    if layout.min != limit:
        goes_on |= _free_tokens_of(content) if limit == 1 else _again(content)
    if limit is None:
        goes_on |= _named_of(content)
    return Edges(content.begins, goes_on, content.may_be_empty or layout.min == 0)


def _again(content: Edges) -> frozenset[Begin]:
    again = frozenset({Edge.FREE_TEXT_AGAIN}) if Edge.FREE_TEXT in content.begins else _NONE
    return again | _free_tokens_of(content)


def _named_of(content: Edges) -> frozenset[Begin]:
    return frozenset(each for each in content.begins if isinstance(each, int))


def _free_tokens_of(content: Edges) -> frozenset[Begin]:
    return frozenset(each for each in content.begins if isinstance(each, FreeTokens))


def tags_within(layout: pb.TextFormat) -> Sequence[pb.FormatTag]:
    """The tags that it is made of."""
    match layout.WhichOneof("format"):
        case "tag":
            return [layout.tag]
        case "triggered_tags":
            return layout.triggered_tags.tags
        case "token_triggered_tags":
            return layout.token_triggered_tags.tags
        case "separated_tags":
            return layout.separated_tags.tags
        case _:
            return []


def formats_within(layout: pb.TextFormat) -> Sequence[pb.TextFormat]:
    """The formats that it is made of, besides its tags."""
    match layout.WhichOneof("format"):
        case "sequence":
            return layout.sequence.formats
        case "any_of":
            return layout.any_of.formats
        case "repeat":
            return [layout.repeat.format]
        case _:
            return []
