"""Formats made of formats (`TextFormat`), written as one grammar.

Their form is that of xgrammar's structural tags (https://xgrammar.mlc.ai/docs/structural_tag/structural_tag.html). What
stands in a tag is written together with the tag's end: free text is one lazy terminal up to it. Free tokens leave out
the tokens that end any of the tags around them, where xgrammar has them leave out that of the nearest
(https://xgrammar.mlc.ai/docs/structural_tag/advanced_usage.html): what comes again and again could not be left else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend import grammar
from control_plane.frontend.argument_forms import tagged_arguments
from control_plane.frontend.format_edges import (
    check_before_more,
    check_closed_by_text,
    check_closed_by_token,
    check_ends,
    check_repeated,
    check_size,
    edges,
)
from control_plane.frontend.format_tokens import TokenSets, TokenVocabulary, with_ids
from control_plane.frontend.grammar import GrammarError, regex_literal
from control_plane.frontend.parsers.tagged_calls import QWEN3_CODER

MAX_REPEATS = 4096
MAX_FREE_TOKENS = 65_536
_ANY_TEXT = "/(.|\\n)*/"


def text_format_grammar(
    layout: pb.TextFormat,
    *,
    literal: Callable[[str], str],
    special_id: Callable[[str], int | None],
    vocabulary: TokenVocabulary,
    compact: bool = False,
) -> str:
    """A grammar's source.

    literal: a text as an expression of Lark. special_id: the id of a special token by its text. vocabulary: the tokens
    that may be named.

    Raises:
        GrammarError: it cannot be enforced.
    """
    if layout.ByteSize() > grammar.MAX_GRAMMAR_CHARS:
        raise GrammarError(f"has {layout.ByteSize()} bytes; at most {grammar.MAX_GRAMMAR_CHARS} are taken")
    check_size(layout)
    layout, texts = with_ids(layout, vocabulary)
    writer = _Writer(literal, special_id, TokenSets(vocabulary), texts, compact=compact)
    start = writer.expression(layout, _Place())
    source = grammar.unforced_grammar("\n".join([f"start: {start}", *writer.rules, *writer.tokens.rules()]))
    if not writer.grammars:
        return source
    return json.dumps({"grammars": [{"name": "format", "lark_grammar": source}, *writer.grammars]})


def from_structural_tags(tags: pb.StructuralTags) -> pb.TextFormat:
    """The older form: JSON in tags, and free text around them."""
    layout = pb.TextFormat()
    layout.triggered_tags.triggers.extend(tags.triggers)
    for tag in tags.tags:
        content = pb.TextFormat(json_schema=tag.json_schema or "{}")
        layout.triggered_tags.tags.add(begin=tag.begin, content=content, end=tag.end)
    return layout


def syntax_of(message: pb.Grammar) -> str:
    """ "lark" or "gbnf"."""
    if message.syntax == pb.GRAMMAR_SYNTAX_UNSPECIFIED:
        return "gbnf" if "::=" in message.text else "lark"
    return "gbnf" if message.syntax == pb.GRAMMAR_SYNTAX_GBNF else "lark"


@dataclass(frozen=True)
class _Place:
    """Where a format stands."""

    # What closes it: one of some texts, or a token's rule; neither where nothing does.
    ends: tuple[str, ...] = ()
    end_token: str = ""


_OPEN = _Place()


class _Writer:
    def __init__(
        self,
        literal: Callable[[str], str],
        special_id: Callable[[str], int | None],
        tokens: TokenSets,
        texts: Mapping[int, str],
        *,
        compact: bool,
    ) -> None:
        self._literal = literal
        self._special_id = special_id
        self._compact = compact
        self.tokens = tokens
        self._texts = texts
        self.rules: list[str] = []
        # Of formats that have a grammar of their own, by the names that the rules call them.
        self.grammars: list[dict[str, Any]] = []

    def expression(self, layout: pb.TextFormat, place: _Place) -> str:
        """The format, and what closes it."""
        match layout.WhichOneof("format"):
            case "any_text":
                return self._text(layout.any_text.excluded, place)
            case "sequence":
                return self._sequence(layout.sequence.formats, place)
            case "any_of":
                return _one_of(self.expression(each, place) for each in _some(layout.any_of.formats))
            case "tag":
                return self._tag(layout.tag, self._begin(layout.tag), place)
            case "repeat":
                return self._repeat(layout.repeat, place)
            case "triggered_tags":
                return self._triggered(layout.triggered_tags, place)
            case "token_triggered_tags":
                return self._token_triggered(layout.token_triggered_tags, place)
            case _:
                return _joined(self._alone(layout), self._closing(place))

    def _alone(self, layout: pb.TextFormat) -> str:
        """A format that is written in the same way whatever closes it."""
        match layout.WhichOneof("format"):
            case "const_string":
                if not layout.const_string:
                    raise GrammarError("holds a constant text that is empty")
                return self._literal(layout.const_string)
            case "json_schema":
                return self._rule(grammar.json_rule(layout.json_schema, compact=self._compact))
            case "regex":
                return self._own(grammar.regex_grammar(layout.regex))
            case "grammar":
                return self._own(grammar.context_free_grammar(layout.grammar.text, syntax_of(layout.grammar)))
            case "qwen_parameters":
                name = f"parameters_{len(self.rules)}"
                return self._rule(tagged_arguments(QWEN3_CODER, layout.qwen_parameters, name, self._literal))
            case "separated_tags":
                return self._separated(layout.separated_tags)
            case "token":
                return self.tokens.only(layout.token)
            case "any_token":
                return self.tokens.all_but(layout.any_token.excluded)
            case "any_tokens":
                return self._any_tokens(layout.any_tokens)
            case _:
                raise GrammarError("holds a format that is empty")

    def _closing(self, place: _Place) -> str:
        if len(place.ends) > 1:
            return _one_of(map(self._literal, place.ends))
        return place.end_token or "".join(map(self._literal, place.ends))

    def _sequence(self, formats: Sequence[pb.TextFormat], place: _Place) -> str:
        *before, last = _some(formats)
        check_ends(map(edges, formats), self._texts)
        return _joined(*(self.expression(each, _OPEN) for each in before), self.expression(last, place))

    def _repeat(self, layout: pb.RepeatedFormat, place: _Place) -> str:
        limit = layout.max if layout.HasField("max") else None
        if limit is not None and limit < layout.min:
            raise GrammarError(f"repeats a format at least {layout.min} and at most {limit} times")
        if max(layout.min, limit or 0) > MAX_REPEATS:
            raise GrammarError(f"repeats a format {max(layout.min, limit or 0)} times; at most {MAX_REPEATS} are taken")
        if limit == 1:
            # Free text in it ends with what closes the place.
            once = self.expression(layout.format, place)
            return once if layout.min else _one_of([once, self._closing(place) or '""'])
        check_repeated(edges(layout.format))
        times = _times(self._rule(self.expression(layout.format, _OPEN)), layout.min, limit)
        return _joined(times, self._closing(place))

    def _any_tokens(self, layout: pb.AnyTokens) -> str:
        limit = layout.max_tokens if layout.HasField("max_tokens") else None
        if (limit or 0) > MAX_FREE_TOKENS:
            raise GrammarError(f"has max_tokens {limit}; at most {MAX_FREE_TOKENS} are taken")
        return _times(self.tokens.all_but(layout.excluded), 0, limit)

    def _begin(self, tag: pb.FormatTag) -> str:
        if not tag.HasField("begin_token"):
            return self._literal(tag.begin)
        if tag.begin:
            raise GrammarError("holds a tag with both begin and begin_token")
        return self.tokens.only(tag.begin_token)

    def _tag(self, tag: pb.FormatTag, begin: str, place: _Place) -> str:
        """begin: what is left to write of the tag's own. place: that of the tag."""
        ends = (tag.end, *tag.other_ends)
        if any(ends) and tag.HasField("end_token"):
            raise GrammarError("holds a tag with both end and end_token")
        if tag.other_ends and not all(ends):
            raise GrammarError("holds a tag with several ends, one of which is empty")
        if tag.HasField("end_token"):
            check_closed_by_token(edges(tag.content), tag.end_token)
            inner = _Place(end_token=self.tokens.only(tag.end_token))
        elif tag.end:
            check_closed_by_text(edges(tag.content), ends, self._texts)
            inner = _Place(ends)
        else:
            return _joined(begin, self.expression(tag.content, place))
        return _joined(begin, self.expression(tag.content, inner), self._closing(place))

    def _separated(self, layout: pb.SeparatedTags) -> str:
        tags = self._rule(_one_of(self._tag(tag, self._begin(tag), _OPEN) for tag in _some(layout.tags)))
        _check_tags(layout.tags)
        more = "" if layout.stop_after_first else f"({_joined(self._literal(layout.separator), tags)})*"
        return _joined(tags, more) if layout.at_least_one else f"({_joined(tags, more)})?"

    def _triggered(self, layout: pb.TriggeredTags, place: _Place) -> str:
        bodies: dict[str, list[str]] = {}
        own_place = place if layout.stop_after_first else _OPEN
        for index, tag in enumerate(_some(layout.tags)):
            if tag.HasField("begin_token"):
                raise GrammarError(f"tag {index} begins with a token: triggers are texts, and its begin has to be one")
            trigger = next((each for each in layout.triggers if each and tag.begin.startswith(each)), tag.begin)
            if not tag.begin or (layout.triggers and trigger not in layout.triggers):
                raise GrammarError(f"tag {index} begins with none of the triggers")
            rest = self._literal(tag.begin[len(trigger) :])
            bodies.setdefault(trigger, []).append(self._tag(tag, rest, own_place))
        if not layout.stop_after_first:
            _check_tags(layout.tags)
        starts = {trigger: self._rule(_one_of(rests)) for trigger, rests in bodies.items()}
        later = _one_of(
            _joined(self._text(layout.excluded, _Place((trigger,))), rest) for trigger, rest in starts.items()
        )
        first = _one_of(_joined(self._literal(trigger), rest) for trigger, rest in starts.items())
        if layout.stop_after_first:
            return first if layout.at_least_one else _one_of([later, self._text(layout.excluded, place)])
        return _joined(first if layout.at_least_one else "", f"({later})*", self._text(layout.excluded, place))

    def _token_triggered(self, layout: pb.TokenTriggeredTags, place: _Place) -> str:
        triggers = {token.id for token in layout.trigger_tokens}
        bodies: list[str] = []
        own_place = place if layout.stop_after_first else _OPEN
        for index, tag in enumerate(_some(layout.tags)):
            if not tag.HasField("begin_token"):
                raise GrammarError(f"tag {index} begins with no token: trigger_tokens are tokens")
            if triggers and tag.begin_token.id not in triggers:
                raise GrammarError(f"tag {index} begins with none of the trigger_tokens")
            bodies.append(self._tag(tag, self._begin(tag), own_place))
        if not layout.stop_after_first:
            _check_tags(layout.tags)
        tags = self._rule(_one_of(bodies))
        free = self.tokens.all_but(layout.excluded)
        if not layout.stop_after_first:
            return _joined(tags if layout.at_least_one else "", f"({free} | {tags})*", self._closing(place))
        if layout.at_least_one:
            return tags
        return _joined(f"{free}*", _one_of([tags, self._closing(place) or '""']))

    def _text(self, excluded: Sequence[str], place: _Place) -> str:
        """Free text up to and with what closes it; up to wherever the model ends it, if nothing does."""
        if not all(excluded):
            raise GrammarError("excludes a text that is empty")
        without = "|".join(map(regex_literal, excluded))
        text = f"TEXT_{len(self.rules)}"
        self.rules.append(f"{text}: {_ANY_TEXT}" + (f" & ~/(.|\\n)*({without})(.|\\n)*/" if without else ""))
        if not place.ends:
            return _joined(text, place.end_token)
        by_token = {end: written for end in place.ends if (written := self._from_special(end))}
        ended = [f"{text} {written}" for written in by_token.values()]
        if spelled := [grammar.quoted(end) for end in place.ends if end not in by_token]:
            ended.append(self._rule(f"{text} {spelled[0] if len(spelled) == 1 else _one_of(spelled)}", "[lazy]"))
        return ended[0] if len(ended) == 1 else _one_of(ended)

    def _from_special(self, text: str) -> str:
        """A text that begins with a special token, which free text cannot hold: its end is where that token is drawn.
        Nothing for any other text."""
        token_id = self._special_id(text)
        if token_id is not None:
            return f"<[{token_id}]>"
        written = self._literal(text)
        return written if written.startswith("<[") else ""

    def _rule(self, expression: str, attributes: str = "") -> str:
        name = f"rule_{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {expression}")
        return name

    def _own(self, source: str) -> str:
        name = f"own_{len(self.grammars)}"
        found = json.loads(source)["grammars"][0] if source.startswith('{"grammars"') else {"lark_grammar": source}
        self.grammars.append({**found, "name": name})
        return f"@{name}"


def _check_tags(tags: Iterable[pb.FormatTag]) -> None:
    """Of tags that something follows."""
    for tag in tags:
        check_before_more(edges(pb.TextFormat(tag=tag)))


def _times(expression: str, least: int, most: int | None) -> str:
    """most: None for as often as it likes."""
    if most is None:
        return f"{expression}*" if least == 0 else f"{expression}{{{least},}}"
    return f"{expression}{{{least},{most}}}" if most else ""


def _some(given: Sequence[Any]) -> Sequence[Any]:
    if not given:
        raise GrammarError("must hold at least one format or tag, wherever there is a list of them")
    return given


def _joined(*expressions: str) -> str:
    """One behind the other; nothing at all is the empty text."""
    return " ".join(filter(None, expressions)) or '""'


def _one_of(expressions: Iterable[str]) -> str:
    return "(" + " | ".join(expressions) + ")"
