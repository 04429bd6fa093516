"""Tokens that a format names: their ids, and sets of tokens as rules of one grammar.

llguidance reads a token as one terminal only, the first that holds it: `<[0-9]>* <[5]>` never comes to its end. So the
vocabulary is divided: what no set tells apart is one terminal, and every set is a choice of such terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableSequence, Sequence
from dataclasses import dataclass

from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend.format_edges import formats_within, tags_within
from control_plane.frontend.grammar import GrammarError

MAX_NAMED_TOKENS = 128

# First and last id.
IdRange = tuple[int, int]


@dataclass(frozen=True)
class TokenVocabulary:
    """The tokens that one model can write."""

    # None where no token stands for exactly this text.
    id_of_text: Callable[[str], int | None]
    # None for special tokens.
    text_of_id: Callable[[int], str | None]
    # In order, without overlaps.
    ranges: Sequence[IdRange]
    # They end a sequence, whatever the format.
    eos_token_ids: frozenset[int] = frozenset()

    def holds(self, token_id: int) -> bool:
        return any(first <= token_id <= last for first, last in self.ranges)


def with_ids(layout: pb.TextFormat, vocabulary: TokenVocabulary) -> tuple[pb.TextFormat, dict[int, str]]:
    """(format, texts): the format with every token named by its id, and free tokens that exclude what ends them: the
    triggers of tags among them, and the ends of all tags around; and the texts of tokens to be written that have some.

    Raises:
        GrammarError: the model has no such token, or it ends the sequence and yet has to be written.
    """
    found = pb.TextFormat()
    found.CopyFrom(layout)
    namer = _Namer(vocabulary)
    namer.name(found, frozenset())
    return found, namer.texts


class _Namer:
    def __init__(self, vocabulary: TokenVocabulary) -> None:
        self._vocabulary = vocabulary
        self._num_named = 0
        self.texts: dict[int, str] = {}

    def name(self, layout: pb.TextFormat, end_ids: frozenset[int]) -> None:
        """end_ids: the tokens that end the tags around."""
        for tag in tags_within(layout):
            self._name_tag(tag, end_ids)
        for inner in formats_within(layout):
            self.name(inner, end_ids)
        match layout.WhichOneof("format"):
            case "token":
                self._write(layout.token)
            case "any_token":
                self._exclude(layout.any_token.excluded, end_ids)
            case "any_tokens":
                self._exclude(layout.any_tokens.excluded, end_ids)
            case "token_triggered_tags":
                tags = layout.token_triggered_tags
                triggers = {self._write(each) for each in tags.trigger_tokens}
                triggers |= {tag.begin_token.id for tag in tags.tags}
                self._exclude(tags.excluded, end_ids | triggers)

    def _name_tag(self, tag: pb.FormatTag, end_ids: frozenset[int]) -> None:
        if tag.HasField("begin_token"):
            self._write(tag.begin_token)
        if tag.HasField("end_token"):
            end_ids |= {self._write(tag.end_token)}
        self.name(tag.content, end_ids)

    def _write(self, token: pb.NamedToken) -> int:
        token_id = self._find(token)
        if token_id in self._vocabulary.eos_token_ids:
            raise GrammarError(f"names {_shown(token)}, which ends the sequence: it cannot stand in a format")
        token.id = token_id
        text = self._vocabulary.text_of_id(token_id)
        if text is not None:
            self.texts[token_id] = text
        return token_id

    def _exclude(self, tokens: MutableSequence[pb.NamedToken], more: frozenset[int]) -> None:
        ids = sorted({*map(self._find, tokens), *more})
        del tokens[:]
        tokens.extend(pb.NamedToken(id=each) for each in ids)

    def _find(self, token: pb.NamedToken) -> int:
        self._num_named += 1
        if self._num_named > MAX_NAMED_TOKENS:
            raise GrammarError(f"names more than {MAX_NAMED_TOKENS} tokens")
        kind = token.WhichOneof("token")
        if kind is None:
            raise GrammarError("names a token by neither its id nor its text")
        token_id = token.id if kind == "id" else self._vocabulary.id_of_text(token.text)
        if token_id is None or not self._vocabulary.holds(token_id):
            raise GrammarError(f"names {_shown(token)}, which is no token of this model")
        return token_id


class TokenSets:
    """The sets of one grammar. `rules` is asked for once all of them are known."""

    def __init__(self, vocabulary: TokenVocabulary) -> None:
        self._vocabulary = vocabulary
        # (whether all tokens but these, these) -> the set's rule.
        self._names: dict[tuple[bool, frozenset[int]], str] = {}

    def only(self, token: pb.NamedToken) -> str:
        """The rule that holds one token."""
        return self._rule(False, frozenset([token.id]))

    def all_but(self, tokens: Iterable[pb.NamedToken]) -> str:
        """The rule that holds every token that neither is one of these nor ends the sequence."""
        return self._rule(True, frozenset(token.id for token in tokens) - self._vocabulary.eos_token_ids)

    def rules(self) -> list[str]:
        """Raises `GrammarError`: a set holds no token at all."""
        if not self._names:
            return []
        named = sorted(frozenset().union(*(ids for _, ids in self._names)))
        rest = _without(self._vocabulary.ranges, sorted({*named, *self._vocabulary.eos_token_ids}))
        # By the sets that hold them.
        classes: dict[tuple[bool, ...], list[IdRange]] = {}
        if rest:
            classes[tuple(is_complement for is_complement, _ in self._names)] = list(rest)
        for token_id in named:
            held_by = tuple((token_id in ids) != is_complement for is_complement, ids in self._names)
            classes.setdefault(held_by, []).append((token_id, token_id))
        rules = [f"token_class_{index}: {_terminal(ranges)}" for index, ranges in enumerate(classes.values())]
        for number, name in enumerate(self._names.values()):
            held = [f"token_class_{index}" for index, held_by in enumerate(classes) if held_by[number]]
            if not held:
                raise GrammarError("excludes every token that the model has")
            rules.append(f"{name}: {' | '.join(held)}")
        return rules

    def _rule(self, is_complement: bool, token_ids: frozenset[int]) -> str:
        return self._names.setdefault((is_complement, token_ids), f"tokens_{len(self._names)}")


def _without(ranges: Sequence[IdRange], token_ids: Sequence[int]) -> list[IdRange]:
    """The ranges without these ids, which are in order."""
    left = []
    for first, last in ranges:
        for token_id in token_ids:
            if first <= token_id <= last:
                left.append((first, token_id - 1))
                first = token_id + 1
        left.append((first, last))
    return [(first, last) for first, last in left if first <= last]


def _terminal(ranges: Sequence[IdRange]) -> str:
    return "<[" + ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges) + "]>"


def _shown(token: pb.NamedToken) -> str:
    return f"the token {token.id}" if token.WhichOneof("token") == "id" else f"the token {token.text[:64]!r}"
