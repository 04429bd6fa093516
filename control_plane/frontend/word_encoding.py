"""Ids of texts from the ids of their words, for tokenizers whose texts may be cut between words.

A word that was met before costs a look into a dict, a tenth of what the library takes for it, and most of a new prompt
is such words.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer

from control_plane.core.request import TokenIdArray

# With their ids about 10 MB.
MAX_WORDS = 2**16
# What is longer is seldom met twice.
MAX_WORD_CHARS = 32
# Of one call: a new word costs twice as much alone as within its text.
MAX_NEW_WORDS = 64

# What may stand before the blank at which a text is cut; a letter stands behind it.
WORD_ENDS = string.ascii_letters + ",.;:!?"
# The blank comes first in the pattern: that is what is searched for fast.
BLANK_BETWEEN_WORDS = re.compile(f" (?<=[{WORD_ENDS}] )(?=[A-Za-z])")
_BEGINS_WITH_BLANK = re.compile(" [A-Za-z]")


class WordEncoder:
    """Encodes without adding special tokens. Any thread may call it.

    Work on one text holds the interpreter's lock: texts are to be short.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_words: int = MAX_WORDS) -> None:
        self._tokenizer = tokenizer
        self._max_words = max_words
        # Key -> ids, as the bytes of an array of uint32. A key is a word without the blank before it; that of a text's
        # first word, which has none before it, begins with a blank instead. All may be followed by another word.
        self._known: dict[str, bytes] = {}

    @property
    def num_words(self) -> int:
        return len(self._known)

    def encode(self, texts: Sequence[str]) -> list[TokenIdArray]:
        """Ids of each text  # [num_tokens] each, uint32"""
        found = [self._known_ids(text) for text in texts]
        missing = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        learnt = iter(self._learn(missing) if missing else ())
        return [np.frombuffer(next(learnt) if ids is None else ids, dtype=np.uint32) for ids in found]

    def _known_ids(self, text: str) -> bytes | None:
        """None if it is not made of known words alone."""
        keys = text.split(" ")
        if keys[0]:
            keys[0] = f" {keys[0]}"
        else:
            del keys[0]
        ids = list(map(self._known.get, keys))
        return None if None in ids else b"".join(ids)  # type: ignore[arg-type]  # mypy does not know what `in` says

    def _learn(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of each text; its words are known afterwards. Where too many are new, texts are encoded as a whole."""
        keys_of_texts: list[list[str]] = []
        ids: dict[str, bytes] = {}
        new: dict[str, None] = {}
        for text in texts:
            keys = _keys(text)
            ids |= {key: known for key in keys if (known := self._known.get(key)) is not None}
            unknown = {key: None for key in keys if key not in ids and key not in new}
            if len(new) + len(unknown) > MAX_NEW_WORDS:
                keys = [_key(text)]
                unknown = dict.fromkeys(keys)
            new |= unknown
            keys_of_texts.append(keys)
        if new:
            encodings = self._tokenizer.encode_batch_fast([_text(key) for key in new], add_special_tokens=False)
            learnt = {
                key: np.array(encoding.ids, dtype=np.uint32).tobytes()
                for key, encoding in zip(new, encodings, strict=True)
            }
            self._keep(learnt)
            ids |= learnt
        return [b"".join([ids[key] for key in keys]) for keys in keys_of_texts]

    def _keep(self, learnt: Mapping[str, bytes]) -> None:
        words = {key: ids for key, ids in learnt.items() if key[-1] in WORD_ENDS and len(key) <= MAX_WORD_CHARS}
        if len(self._known) + len(words) > self._max_words:
            self._known.clear()  # what is used is soon there again
        self._known.update(words)


def _keys(text: str) -> list[str]:
    """Of a text that is cut between words."""
    first, *keys = BLANK_BETWEEN_WORDS.split(text)
    return [_key(first), *keys]


def _key(text: str) -> str:
    """Of a text's beginning."""
    return text[1:] if _BEGINS_WITH_BLANK.match(text) else f" {text}"


def _text(key: str) -> str:
    return key[1:] if key.startswith(" ") else f" {key}"
