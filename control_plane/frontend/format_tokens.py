"""Tokens that a format names, and sets of tokens, as rules of one grammar.

llguidance reads a token as one terminal only, the first that holds it: `<[0-9]>* <[5]>` never comes to its end. So the
vocabulary is divided: what no set tells apart is one terminal, and every set is a choice of such terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend.grammar import GrammarError

MAX_NAMED_TOKENS = 256

# First and last id.
IdRange = tuple[int, int]


@dataclass(frozen=True)
class TokenVocabulary:
    """The tokens that one model can write."""

    # None where no token stands for exactly this text.
    id_of_text: Callable[[str], int | None]
    # In order, without overlaps.
    ranges: Sequence[IdRange]
    # They end a sequence, whatever the format.
    eos_token_ids: frozenset[int] = frozenset()

    def holds(self, token_id: int) -> bool:
        return any(first <= token_id <= last for first, last in self.ranges)


class TokenSets:
    """The sets of one grammar. `rules` is asked for once all of them are known."""

    def __init__(self, vocabulary: TokenVocabulary) -> None:
        self._vocabulary = vocabulary
        self._num_named = 0
        # (whether all tokens but these, these) -> the set's rule.
        self._names: dict[tuple[bool, frozenset[int]], str] = {}

    def named_id(self, token: pb.NamedToken) -> int:
        """Of a token that is to be written.

        Raises:
            GrammarError: the model has none such, or it ends the sequence.
        """
        token_id = self._find(token)
        if token_id in self._vocabulary.eos_token_ids:
            raise GrammarError(f"names {_shown(token)}, which ends the sequence: it cannot stand in a format")
        return token_id

    def excluded_ids(self, tokens: Iterable[pb.NamedToken]) -> frozenset[int]:
        """Of tokens that are not to be written. Raises `GrammarError`: the model has none such."""
        return frozenset(map(self._find, tokens))

    def only(self, token_id: int) -> str:
        """The rule that holds one token."""
        return self._rule(False, frozenset([token_id]))

    def all_but(self, token_ids: Iterable[int]) -> str:
        """The rule that holds every token that neither is one of these nor ends the sequence."""
        return self._rule(True, frozenset(token_ids) - self._vocabulary.eos_token_ids)

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
