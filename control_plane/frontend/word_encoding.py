"""Ids of texts from the ids of their words, for tokenizers whose texts may be cut between words.

A word that was met before costs a look into a dict, a tenth of what the library takes for it, and most of a new prompt
is such words.
"""

from __future__ import annotations

import re
import string
from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from control_plane.core.request import TokenIdArray

# With their ids about 10 MB.
MAX_WORDS = 2**16
# What is longer is seldom met twice.
MAX_WORD_CHARS = 32

# What may stand before the blank at which a text is cut; a letter stands behind it.
WORD_ENDS = string.ascii_letters + ",.;:!?"
# The blank comes first in the pattern: that is what is searched for fast.
BLANK_BETWEEN_WORDS = re.compile(f" (?<=[{WORD_ENDS}] )(?=[A-Za-z])")
_OTHER_BLANK = re.compile(f" (?:(?<![{WORD_ENDS}] )|(?![A-Za-z]))")
_BEGINS_WITH_BLANK = re.compile(" [A-Za-z]")


class WordEncoder:
    """Encodes without adding special tokens. Any thread may call it.

    Work on one text holds the interpreter's lock: texts are to be short.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_words: int = MAX_WORDS) -> None:
        self._tokenizer = tokenizer
        self._max_words = max_words
        self._begins_with_blank = _tokens_that_begin_with_blank(tokenizer)
        # Key -> ids, as the bytes of an array of uint32. A key is a word without the blank before it; that of a text's
        # first word, which has none before it, begins with a blank instead. All may be followed by another word.
        self._known: dict[str, bytes] = {}
        # Keys of words that are not known yet: most of what is met once is never met again.
        self._met: set[str] = set()

    @property
    def num_words(self) -> int:
        """Kept: known, or met once."""
        return len(self._known) + len(self._met - self._known.keys())

    def encode(self, texts: Sequence[str]) -> list[TokenIdArray]:
        """Ids of each text  # [num_tokens] each, uint32"""
        found = [self._known_ids(text) for text in texts]
        missing = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        learnt = iter(self._learn(missing) if missing else ())
        return [np.frombuffer(next(learnt) if ids is None else ids, dtype=np.uint32) for ids in found]

    def _known_ids(self, text: str) -> bytes | None:
        """None if it is not made of known words alone."""
        ids = list(map(self._known.get, _split(text)))
        return None if None in ids else b"".join(ids)  # type: ignore[arg-type]  # mypy does not know what `in` says

    def _learn(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of each text; words that are met a second time are known afterwards.

        A word alone takes the library twice as long as within its text: where half of a text is unknown, it is encoded
        as a whole, and the ids are dealt out to its words.
        """
        plans: list[tuple[list[str], list[bytes | None]]] = []  # a text's parts, and the ids of those that are known
        new: dict[str, list[str]] = {}  # what to encode -> the words that it is made of
        again: set[str] = set()
        for text in texts:
            keys = _keys(text)
            found = list(map(self._known.get, keys))
            unknown = [key for key, ids in zip(keys, found, strict=True) if ids is None]
            again |= self._met.intersection(unknown)
            self._met.update([key for key in unknown if len(key) <= MAX_WORD_CHARS])
            if sum(map(len, unknown)) * 2 > len(text):
                whole = _key(text)
                new[whole] = keys
                plans.append(([whole], [None]))
            else:
                new |= {key: [key] for key in unknown}
                plans.append((keys, found))
        if len(self._met) > self._max_words:
            self._met.clear()
        learnt = self._encode_new(new, again)
        return [
            b"".join([learnt[key] if ids is None else ids for key, ids in zip(keys, found, strict=True)])
            for keys, found in plans
        ]

    def _encode_new(self, new: Mapping[str, Sequence[str]], again: set[str]) -> dict[str, bytes]:
        """Ids of each key; of its words, those that are met again are known afterwards."""
        if not new:
            return {}
        encodings = self._tokenizer.encode_batch_fast([_text(key) for key in new], add_special_tokens=False)
        learnt: dict[str, bytes] = {}
        for (key, words), encoding in zip(new.items(), encodings, strict=True):
            ids = learnt[key] = array("I", encoding.ids).tobytes()
            if again and not again.isdisjoint(words):
                of_words = {key: ids} if words == [key] else self._ids_of_words(_text(key), words, ids)
                self._keep({word: of_words[word] for word in again.intersection(of_words)})
        return learnt

    def _ids_of_words(self, text: str, keys: Sequence[str], raw: bytes) -> dict[str, bytes]:
        """Of the words of a text; nothing where it cannot be told which token is whose.

        A token that begins with a blank holds at least one: where there are as many such tokens as blanks, each blank
        begins a token of its own, and they come in the same order.
        """
        ids = np.frombuffer(raw, dtype=np.uint32)  # [num_tokens]
        begins = np.flatnonzero(self._begins_with_blank[ids])  # [tokens that begin with a blank]
        if not text.isascii() and self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)  # which may make blanks of other characters
        if len(begins) != text.count(" "):
            return {}
        edges, blanks = [0], _text(keys[0]).count(" ")
        for key in keys[1:]:
            edges.append(int(begins[blanks]))
            blanks += 1 + key.count(" ")
        edges.append(len(ids))
        size = ids.itemsize
        return {key: raw[begin * size : end * size] for key, begin, end in zip(keys, edges, edges[1:], strict=False)}

    def _keep(self, learnt: Mapping[str, bytes]) -> None:
        words = {key: ids for key, ids in learnt.items() if key[-1] in WORD_ENDS}
        if len(self._known) + len(words) > self._max_words:
            self._known.clear()  # what is used is soon there again
        self._known.update(words)


def _tokens_that_begin_with_blank(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """By token id, added tokens with them, which count as none that do  # [largest id + 1]

    None does where the pre-tokenizer puts blanks of its own before a text and behind added tokens.
    """
    find = tokenizer.pre_tokenizer.pre_tokenize_str
    blank = find(" a")[0][0][0]
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    begins = np.zeros(max(tokenizer.get_vocab().values(), default=0) + 1, dtype=np.bool_)
    if blank != "a" and not find("a")[0][0].startswith(blank):  # "a": blanks are left out
        begins[[token_id for token, token_id in vocabulary.items() if token.startswith(blank)]] = True
    return begins


def _keys(text: str) -> list[str]:
    """Of a text that is cut between words."""
    # Of most texts every blank is such a cut: to see that takes a third of what cutting at a pattern does.
    every = not text.startswith(" ") or _BEGINS_WITH_BLANK.match(text)
    if every and _OTHER_BLANK.search(text, 1) is None:
        return _split(text)
    first, *keys = BLANK_BETWEEN_WORDS.split(text)
    return [_key(first), *keys]


def _split(text: str) -> list[str]:
    """Keys of a text whose blanks are all cuts, but for one that it begins with."""
    keys = text.split(" ")
    if keys[0]:
        keys[0] = f" {keys[0]}"
    else:
        del keys[0]
    return keys


def _key(text: str) -> str:
    """Of a text's beginning."""
    return text[1:] if _BEGINS_WITH_BLANK.match(text) else f" {text}"


def _text(key: str) -> str:
    return key[1:] if key.startswith(" ") else f" {key}"
