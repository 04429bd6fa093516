"""Text to ids in pieces, cut where a text's ids are those of its pieces one after the other; pieces are kept.

A chat comes back whole with every turn, and many begin with the same instructions: only what is new is encoded. What is
new is cut as well, because the library encodes several texts side by side.

There are two kinds of place. The library looks for special tokens first and encodes what stands between them apart, so
a text may be cut where a special token begins (not behind it: some tokenizers mark the beginning of a text). And where
a tokenizer splits words without looking at what is around them, a text may be cut before a blank between two words:
`finds_words` says which tokenizers these are. There words are kept as well (`word_encoding.py`).
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models

from control_plane.core.request import TokenIdArray
from control_plane.frontend.word_encoding import BLANK_BETWEEN_WORDS, WORD_ENDS, WordEncoder

# About a million tokens; with the ids 20 MB at most where text is ASCII.
MAX_KEPT_CHARS = 4 * 2**20
# Shorter turns are not worth a piece of their own; longer pieces cost more a character.
MIN_TURN_CHARS = 64
MIN_WORDS_CHARS = 512

_NORMALIZERS_OF_CHARACTERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}
_NO_TOKENS: TokenIdArray = np.array([], dtype=np.uint32)


class PiecewiseEncoder:
    """Encodes without adding special tokens. Any thread may call it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_kept_chars: int = MAX_KEPT_CHARS,
        min_turn_chars: int = MIN_TURN_CHARS,
        min_words_chars: int = MIN_WORDS_CHARS,
    ) -> None:
        self._tokenizer = tokenizer
        self._min_turn_chars = max(1, min_turn_chars)
        self._min_words_chars = max(1, min_words_chars)
        added = list(tokenizer.get_added_tokens_decoder().values())
        # All that the library looks for in the same pass, the longest first as it does: one may hide another.
        names = sorted({token.content for token in added if token.content and not token.normalized}, key=len)
        self._names = re.compile("|".join(map(re.escape, reversed(names)))) if names else None
        self._cuts = frozenset(token.content for token in added if _may_be_cut_at(token))
        self._words = WordEncoder(tokenizer) if finds_words(tokenizer) else None
        self._lock = threading.Lock()
        # (salt, text) -> ids, what was used last at the end.
        self._kept: OrderedDict[tuple[str, str], TokenIdArray] = OrderedDict()
        self._num_kept_chars = 0
        self._max_kept_chars = max_kept_chars

    def encode(self, text: str, salt: str = "") -> TokenIdArray:
        """Ids of a text. Holds no lock of the interpreter while it encodes.

        `salt`: only pieces that came with the same one are used again, so that nobody else can tell by the time.

        Returns:
            ids  # [num_tokens], uint32
        """
        pieces = list(self.pieces(text))
        with self._lock:
            found = [self._find((salt, piece)) for piece in pieces]
        new = list(dict.fromkeys(piece for piece, ids in zip(pieces, found, strict=True) if ids is None))
        if new:
            encoded = dict(zip(new, self._encode_new(new, salt), strict=True))
            found = [encoded[piece] if ids is None else ids for piece, ids in zip(pieces, found, strict=True)]
            with self._lock:
                for piece, ids in encoded.items():
                    self._keep((salt, piece), ids)
        parts = [ids for ids in found if ids is not None]
        return np.concatenate(parts) if parts else _NO_TOKENS  # [num_tokens]

    def _encode_new(self, pieces: list[str], salt: str) -> list[TokenIdArray]:
        if self._words is not None and not salt:
            return self._words.encode(pieces)
        encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def pieces(self, text: str) -> Iterator[str]:
        """The text in order. Where a piece ends is found from its beginning: texts that begin alike are cut alike."""
        begin = 0
        for cut in self._turns(text):
            if cut - begin >= self._min_turn_chars or cut == len(text):
                yield from self._cut_between_words(text[begin:cut])
                begin = cut

    def _turns(self, text: str) -> Iterator[int]:
        """Where special tokens begin, and the end."""
        if self._names is not None:
            for match in self._names.finditer(text):
                if match[0] in self._cuts:
                    yield match.start()
        if text:
            yield len(text)

    def _cut_between_words(self, text: str) -> Iterator[str]:
        begin = 0
        while self._words is not None and len(text) - begin > self._min_words_chars:
            found = BLANK_BETWEEN_WORDS.search(text, begin + self._min_words_chars)
            if found is None:
                break
            yield text[begin : found.start()]
            begin = found.start()
        yield text[begin:]

    def _find(self, key: tuple[str, str]) -> TokenIdArray | None:
        ids = self._kept.get(key)
        if ids is not None:
            self._kept.move_to_end(key)
        return ids

    def _keep(self, key: tuple[str, str], ids: TokenIdArray) -> None:
        if key in self._kept:  # another thread was first
            return
        self._kept[key] = ids
        self._num_kept_chars += _num_chars(key)
        while self._num_kept_chars > self._max_kept_chars:
            oldest, _ = self._kept.popitem(last=False)
            self._num_kept_chars -= _num_chars(oldest)


def _num_chars(key: tuple[str, str]) -> int:
    return len(key[0]) + len(key[1]) + MIN_TURN_CHARS  # what an entry takes besides, so that short ones count too


def _may_be_cut_at(token: AddedToken) -> bool:
    """Whether it is found alike whatever stands before it, and leaves that as it is."""
    return bool(
        token.special
        and token.content
        and not (token.normalized or token.lstrip or token.single_word)
        # What must be a single word before it would be one at the end of a piece.
        and not (token.content[0].isalnum() or token.content[0] == "_")
    )


def finds_words(tokenizer: Tokenizer) -> bool:
    """Whether it always splits before a blank between two words, and neither side depends on the other.

    Before the blank stands an ASCII letter or one of a few marks, behind it an ASCII letter.

    So it is for normalizers that look at single characters and for pre-tokenizers that look for words from left to
    right, as those of GPT-2 and its successors do. Where words are found by what stands before them, or only after
    blanks were merged into a text (SentencePiece), it is not, or cannot be seen here.
    """
    without_vocabulary = Tokenizer(models.BPE())  # quick to write out
    if tokenizer.normalizer is not None:
        without_vocabulary.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        without_vocabulary.pre_tokenizer = tokenizer.pre_tokenizer
    spec: dict[str, Any] = json.loads(without_vocabulary.to_str())
    normalizers = _flat(spec["normalizer"], "normalizers")
    splitters = _flat(spec["pre_tokenizer"], "pretokenizers")
    return (
        all(each["type"] in _NORMALIZERS_OF_CHARACTERS for each in normalizers)
        and bool(splitters)
        and all(map(_looks_ahead_only, splitters))
        and not any(_may_lie_across(token) for token in tokenizer.get_added_tokens_decoder().values())
        and all(_splits(tokenizer, left, right) for left in _LEFT for right in _RIGHT)
    )


def _flat(spec: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    if spec is None:
        return []
    if spec["type"] != "Sequence":
        return [spec]
    return [each for member in spec[members] for each in _flat(member, members)]


def _looks_ahead_only(splitter: dict[str, Any]) -> bool:
    match splitter["type"]:
        case "ByteLevel" | "Digits" | "Punctuation":
            return True
        case "Split":
            if splitter["behavior"] not in ("Isolated", "Removed"):
                return False
            pattern = str(splitter["pattern"].get("Regex", ""))
            if not pattern or re.search(r"\\[AbBGKRXyYzZ]", pattern):
                return False
            # Of what looks beyond a word, only what asks for the very next character; none that looks back.
            outside_sets = re.sub(r"\[(?:\\.|[^\]\\])*\]", "", pattern.replace(r"(?!\S)", ""))
            return not any(mark in outside_sets for mark in ("^", "$", "(?<", "(?=", "(?!"))
    return False


def _may_lie_across(token: AddedToken) -> bool:
    name = token.content
    return bool(
        re.search(rf"[\w{WORD_ENDS}] (?:\w|$)", name)
        or (token.rstrip and re.search(rf"[\w{WORD_ENDS}]$", name))
        or (token.lstrip and re.search(r"^\w", name))
    )


# What may stand on both sides of such a blank.
_LEFT = (
    "a",
    "I'm",
    "x1y",
    "3rd",
    "(abc",
    "it's",
    "HTTPServer",
    "éa",
    "東京a",
    "  a",
    "\na",
    "\n\n ab",
    "a b",
    "#!a",
    ",a",
    "a,",
    "I'm.",
    "x1;",
    "(a):",
    "é!",
    "東京?",
    " ,",
    "\n.",
    "a...",
    "1,",
)
_RIGHT = (" b", " B", " the", " I'm", " a1", " x.y", " a  b", " a\n", " aé", " a東", " HTTPServer", " don't", " a 1")


def _splits(tokenizer: Tokenizer, left: str, right: str) -> bool:
    find = tokenizer.pre_tokenizer.pre_tokenize_str
    parts = [(part, start) for part, (start, _) in find(left)]
    parts += [(part, start + len(left)) for part, (start, _) in find(right)]
    return parts == [(part, start) for part, (start, _) in find(left + right)]
