"""Words that must not be generated, as a mask: a word's last token is taken away once the others stand before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from control_plane.core.request import Grammar, TokenMatcher


class BadWords:
    """A `Grammar` that allows everything but some sequences of tokens, and what another grammar forbids."""

    def __init__(self, words: Sequence[tuple[int, ...]], other: Grammar | None = None) -> None:
        self._words = tuple(word for word in words if word)
        self._other = other

    def start(self) -> TokenMatcher:
        return _BadWordsMatcher(self._words, None if self._other is None else self._other.start())


class _BadWordsMatcher:
    __slots__ = ("_max_tokens", "_other", "_recent", "_words")

    def __init__(self, words: tuple[tuple[int, ...], ...], other: TokenMatcher | None) -> None:
        self._words = words
        self._other = other
        self._recent: tuple[int, ...] = ()
        self._max_tokens = max((len(word) - 1 for word in words), default=0)

    def accept(self, token_ids: Sequence[int]) -> None:
        if self._max_tokens:
            self._recent = (*self._recent, *token_ids)[-self._max_tokens :]
        if self._other is not None:
            self._other.accept(token_ids)

    def fill_mask(self, out: npt.NDArray[np.uint32]) -> None:
        if self._other is None:
            out.fill(0xFFFFFFFF)
        else:
            self._other.fill_mask(out)
        for word in self._words:
            before = word[:-1]
            if not before or self._recent[-len(before) :] == before:
                out[word[-1] >> 5] &= np.uint32(~(1 << (word[-1] & 31)) & 0xFFFFFFFF)

    @property
    def is_over(self) -> bool:
        return self._other is not None and self._other.is_over

    @property
    def error(self) -> str:
        return "" if self._other is None else self._other.error
