"""Formats made of formats (`TextFormat`), written as one grammar.

Their form is that of xgrammar's structural tags (https://xgrammar.mlc.ai/docs/tutorials/structural_tag.html). What
stands in a tag is written together with the tag's end: free text is one lazy terminal up to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend import grammar
from control_plane.frontend.argument_forms import tagged_arguments
from control_plane.frontend.grammar import GrammarError, regex_literal
from control_plane.frontend.parsers.tagged_calls import QWEN3_CODER

MAX_DEPTH = 16
MAX_FORMATS = 512
_ANY_TEXT = "/(.|\\n)*/"


def text_format_grammar(
    layout: pb.TextFormat,
    *,
    literal: Callable[[str], str],
    special_id: Callable[[str], int | None],
    compact: bool = False,
) -> str:
    """A grammar's source.

    literal: a text as an expression of Lark. special_id: the id of a special token by its text.

    Raises:
        GrammarError: it cannot be enforced.
    """
    if layout.ByteSize() > grammar.MAX_GRAMMAR_CHARS:
        raise GrammarError(f"has {layout.ByteSize()} bytes; at most {grammar.MAX_GRAMMAR_CHARS} are taken")
    writer = _Writer(literal, special_id, compact=compact)
    start = writer.expression(layout, "", 1)
    source = grammar.lark_grammar("\n".join([f"start: {start}", *writer.rules]))
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


class _Writer:
    def __init__(
        self, literal: Callable[[str], str], special_id: Callable[[str], int | None], *, compact: bool
    ) -> None:
        self._literal = literal
        self._special_id = special_id
        self._compact = compact
        self._num_formats = 0
        self.rules: list[str] = []
        # Of formats that have a grammar of their own, by the names that the rules call them.
        self.grammars: list[dict[str, Any]] = []

    def expression(self, layout: pb.TextFormat, end: str, depth: int) -> str:
        """The format, and the text that closes it; `end` is empty where nothing does."""
        self._num_formats += 1
        if depth > MAX_DEPTH or self._num_formats > MAX_FORMATS:
            raise GrammarError(f"holds more than {MAX_FORMATS} formats, or {MAX_DEPTH} within each other")
        match layout.WhichOneof("format"):
            case "const_string":
                if not layout.const_string:
                    raise GrammarError("holds a constant text that is empty")
                written = self._literal(layout.const_string)
            case "json_schema":
                written = self._rule(grammar.json_rule(layout.json_schema, compact=self._compact))
            case "regex":
                written = self._own(grammar.regex_grammar(layout.regex))
            case "grammar":
                written = self._own(grammar.context_free_grammar(layout.grammar.text, syntax_of(layout.grammar)))
            case "qwen_parameters":
                name = f"parameters_{len(self.rules)}"
                arguments = tagged_arguments(QWEN3_CODER, layout.qwen_parameters, name, self._literal)
                written = self._rule(arguments)
            case "separated_tags":
                written = self._separated(layout.separated_tags, depth)
            case "any_text":
                return self._text(layout.any_text.excluded, end)
            case "sequence":
                return self._sequence(layout.sequence.formats, end, depth)
            case "any_of":
                return _one_of(self.expression(each, end, depth + 1) for each in _some(layout.any_of.formats))
            case "tag":
                return self._tag(layout.tag, layout.tag.begin, end, depth)
            case "triggered_tags":
                return self._triggered(layout.triggered_tags, end, depth)
            case _:
                raise GrammarError("holds a format that is empty")
        return _joined(written, self._literal(end))

    def _sequence(self, formats: Sequence[pb.TextFormat], end: str, depth: int) -> str:
        *before, last = _some(formats)
        _check_ends(before)
        return _joined(
            *(self.expression(each, "", depth + 1) for each in before), self.expression(last, end, depth + 1)
        )

    def _tag(self, tag: pb.FormatTag, begin: str, end: str, depth: int) -> str:
        """begin: what is left to write of the tag's own. end: of what the tag stands in."""
        content = self.expression(tag.content, tag.end or end, depth + 1)
        return _joined(self._literal(begin), content, self._literal(end) if tag.end else "")

    def _separated(self, layout: pb.SeparatedTags, depth: int) -> str:
        tags = self._rule(_one_of(self._tag(tag, tag.begin, "", depth) for tag in _some(layout.tags)))
        _check_ends(pb.TextFormat(tag=tag) for tag in layout.tags)
        more = "" if layout.stop_after_first else f"({_joined(self._literal(layout.separator), tags)})*"
        return _joined(tags, more) if layout.at_least_one else f"({_joined(tags, more)})?"

    def _triggered(self, layout: pb.TriggeredTags, end: str, depth: int) -> str:
        bodies: dict[str, list[str]] = {}
        own_end = end if layout.stop_after_first else ""
        for index, tag in enumerate(_some(layout.tags)):
            trigger = next((each for each in layout.triggers if each and tag.begin.startswith(each)), tag.begin)
            if not tag.begin or (layout.triggers and trigger not in layout.triggers):
                raise GrammarError(f"tag {index} begins with none of the triggers")
            bodies.setdefault(trigger, []).append(self._tag(tag, tag.begin[len(trigger) :], own_end, depth))
        if not layout.stop_after_first:
            _check_ends(pb.TextFormat(tag=tag) for tag in layout.tags)
        starts = {trigger: self._rule(_one_of(rests)) for trigger, rests in bodies.items()}
        later = _one_of(_joined(self._text(layout.excluded, trigger), rest) for trigger, rest in starts.items())
        first = _one_of(_joined(self._literal(trigger), rest) for trigger, rest in starts.items())
        if layout.stop_after_first:
            return first if layout.at_least_one else _one_of([later, self._text(layout.excluded, end)])
        return _joined(first if layout.at_least_one else "", f"({later})*", self._text(layout.excluded, end))

    def _text(self, excluded: Sequence[str], end: str) -> str:
        """Free text up to and with `end`; up to wherever the model ends it, if that is empty."""
        if not all(excluded):
            raise GrammarError("excludes a text that is empty")
        without = "|".join(map(regex_literal, excluded))
        text = f"TEXT_{len(self.rules)}"
        self.rules.append(f"{text}: {_ANY_TEXT}" + (f" & ~/(.|\\n)*({without})(.|\\n)*/" if without else ""))
        if not end:
            return text
        token_id = self._special_id(end)
        if token_id is not None:
            return f"{text} <[{token_id}]>"
        return self._rule(f"{text} {grammar.quoted(end)}", "[lazy]")

    def _rule(self, expression: str, attributes: str = "") -> str:
        name = f"rule_{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {expression}")
        return name

    def _own(self, source: str) -> str:
        name = f"own_{len(self.grammars)}"
        found = json.loads(source)["grammars"][0] if source.startswith('{"grammars"') else {"lark_grammar": source}
        self.grammars.append({**found, "name": name})
        return f"@{name}"


def _is_open(layout: pb.TextFormat) -> bool:
    """Whether it may end in free text."""
    match layout.WhichOneof("format"):
        case "any_text":
            return True
        case "triggered_tags":
            tags = layout.triggered_tags
            return not (tags.at_least_one and tags.stop_after_first) or _has_open_tag(tags.tags)
        case "separated_tags":
            return _has_open_tag(layout.separated_tags.tags)
        case "tag":
            return _has_open_tag([layout.tag])
        case "sequence":
            return any(map(_is_open, layout.sequence.formats[-1:]))
        case "any_of":
            return any(map(_is_open, layout.any_of.formats))
        case _:
            return False


def _has_open_tag(tags: Iterable[pb.FormatTag]) -> bool:
    return any(not tag.end and _is_open(tag.content) for tag in tags)


def _check_ends(formats: Iterable[pb.TextFormat]) -> None:
    if any(map(_is_open, formats)):
        raise GrammarError("free text has no end before what follows it: put it into a tag with an end")


def _some(given: Sequence[Any]) -> Sequence[Any]:
    if not given:
        raise GrammarError("must hold at least one format or tag, wherever there is a list of them")
    return given


def _joined(*expressions: str) -> str:
    """One behind the other; nothing at all is the empty text."""
    return " ".join(filter(None, expressions)) or '""'


def _one_of(expressions: Iterable[str]) -> str:
    return "(" + " | ".join(expressions) + ")"
