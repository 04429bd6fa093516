"""Logprobs in OpenAI's two shapes: the chat list and the completions columns."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Sequence
from typing import Any

from gateway.mailbox import TokenLogprob, TopLogprob

# JSON has no -inf and no NaN; OpenAI's own floor.
FLOOR = -9999.0


def floored(logprob: float) -> float:
    return FLOOR if math.isnan(logprob) else max(logprob, FLOOR)


def token_text(token: bytes) -> str:
    """A token as a string: its text, or its bytes written out where they are not whole characters."""
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def chat_content(entries: Iterable[TokenLogprob], num_top: int) -> list[dict[str, Any]]:
    """`choices[].logprobs.content`: one entry a token, alternatives most likely first."""
    return [
        {
            **_chat_token(entry.token, entry.logprob),
            "top_logprobs": [_chat_token(top.token, top.logprob) for top in _most_likely(entry.top, num_top)],
        }
        for entry in entries
    ]


def _chat_token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_text(token), "logprob": floored(logprob), "bytes": list(token)}


def _most_likely(top: Iterable[TopLogprob], num_top: int) -> list[TopLogprob]:
    return sorted(top, key=lambda entry: -floored(entry.logprob))[:num_top]


def prompt_entries(entries: Sequence[TokenLogprob], num_top: int) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per prompt token its own logprob and the best ones, by token id; null for the first."""
    listed: list[dict[str, Any] | None] = []
    for entry in entries:
        if math.isnan(entry.logprob):
            listed.append(None)
            continue
        candidates = {str(entry.token_id): _ranked(entry.token, entry.logprob, entry.rank or None)}
        for rank, top in enumerate(_most_likely(entry.top, num_top), 1):
            candidates.setdefault(str(top.token_id), _ranked(top.token, top.logprob, rank))
        listed.append(candidates)
    return listed


def _ranked(token: bytes, logprob: float, rank: int | None) -> dict[str, Any]:
    return {"logprob": floored(logprob), "rank": rank, "decoded_token": token_text(token)}


class CompletionLogprobs:
    """The columns of one completions choice: `tokens`, `token_logprobs`, `top_logprobs`, `text_offset`.

    Keeps the offset from one chunk to the next. A token's offset is the number of whole characters before it, counted
    over the tokens themselves, so that it does not depend on how the text was cut into chunks. Of an echoed prompt the
    whole text is known: tokens that are not in it, like one that begins every prompt, take no room.
    """

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_chars = 0

    def echoed(self, entries: Iterable[TokenLogprob], prompt: str) -> dict[str, Any]:
        """Of the prompt's own tokens; what is generated comes after its text."""
        entries = list(entries)
        columns = self.columns(entries)
        columns["text_offset"] = _offsets_in(prompt, [entry.token for entry in entries])
        self._num_chars = len(prompt)
        self._decoder.reset()
        return columns

    def columns(self, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        text_offset: list[int] = []
        for entry in entries:
            text = token_text(entry.token)
            tokens.append(text)
            # Of an echoed prompt's first token nothing can be said.
            is_known = not math.isnan(entry.logprob)
            token_logprobs.append(floored(entry.logprob) if is_known else None)
            top_logprobs.append(self._top(text, entry) if is_known else None)
            text_offset.append(self._num_chars)
            self._num_chars += len(self._decoder.decode(entry.token))
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        }

    def _top(self, text: str, entry: TokenLogprob) -> dict[str, float]:
        """The best `num_top` and the token itself; tokens that are spelled alike keep the better logprob."""
        top: dict[str, float] = {}
        for candidate in _most_likely(entry.top, self._num_top):
            top.setdefault(token_text(candidate.token), floored(candidate.logprob))
        top.setdefault(text, floored(entry.logprob))
        return top


def _offsets_in(text: str, tokens: Sequence[bytes]) -> list[int]:
    """Where each token begins in the text, in characters."""
    encoded = text.encode()
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, decoded, offsets = 0, 0, []
    for token in tokens:
        offsets.append(decoded)
        # The blank before a text's first word is part of the token, and not of the text, in some vocabularies.
        found = next((each for each in (token, token.removeprefix(b" ")) if encoded.startswith(each, position)), b"")
        # A character counts once its last byte has come.
        decoded += len(decoder.decode(found))
        position += len(found)
    return offsets
