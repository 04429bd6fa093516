"""Text to token ids, off the event loop.

`encode()` of the tokenizers library holds the interpreter's lock all the while and would stop every stream;
`encode_batch_fast` lets it go, so that is the only call made here, in a small pool of threads. Prompts are encoded
piece by piece (`piecewise_encoding.py`).
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from control_plane.core.request import TokenIdArray
from control_plane.frontend.chat_template import ChatTemplate, Message
from control_plane.frontend.detokenizer import Detokenization, create_detokenization
from control_plane.frontend.model_files import ModelFilesError
from control_plane.frontend.piecewise_encoding import PiecewiseEncoder
from control_plane.frontend.special_text import SpecialTextGuard

Result = TypeVar("Result")

_END_CHARS = 256
_BYTE_LEVEL = ByteLevel(add_prefix_space=False, use_regex=False)


class TextTokenizer:
    """The model's tokenizer, read once. The coroutines may be awaited by any number of requests at a time."""

    def __init__(self, tokenizer: Tokenizer, *, num_threads: int = 2) -> None:
        # Settings for training batches that a tokenizer.json may carry along.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._encoder = PiecewiseEncoder(tokenizer)
        self._guard = SpecialTextGuard(tokenizer)
        self._special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._added_around = self._find_added()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.detokenization: Detokenization = create_detokenization(tokenizer)

    @classmethod
    def from_file(cls, path: Path, *, num_threads: int = 2) -> TextTokenizer:
        """Read a tokenizer.json.

        Raises:
            ModelFilesError: the file is damaged, or written by a newer version of the library.
        """
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelFilesError(f"{path}: cannot be read as a tokenizer: {error}") from error
        return cls(tokenizer, num_threads=num_threads)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def token_id(self, token: str) -> int | None:
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    async def encode_text(self, text: str, *, add_special_tokens: bool, salt: str = "") -> TokenIdArray:
        """Ids of a raw prompt; the text of special tokens in it stands for those tokens.

        `salt`: what was encoded with another one is not used again.

        Returns:
            ids  # [num_tokens], uint32
        """

        def encode() -> TokenIdArray:
            if not add_special_tokens:
                return self._encoder.encode(text, salt)
            if self._added_around is None:
                return _as_array(self._encode(text, add_special_tokens=True))
            before, after = self._added_around
            return np.concatenate([before, self._encoder.encode(text, salt), after])  # [num_tokens]

        return await self._in_pool(encode)

    async def encode_pooled(
        self, text: str, second: str | None = None, *, max_tokens: int | None = None
    ) -> tuple[TokenIdArray, int]:
        """Ids of a text, or of a pair, as models for whole texts read them.

        Longer than `max_tokens`, it loses what stands before its closing special tokens.

        Returns:
            ids  # [num_tokens], uint32
            Where the second text begins, for tokenizers that mark it; 0 otherwise.
        """

        def encode() -> tuple[TokenIdArray, int]:
            given = text if second is None else (text, second)
            encoding = self._tokenizer.encode_batch_fast([given], add_special_tokens=True)[0]
            ids, kinds = list(encoding.ids), list(encoding.type_ids)
            if max_tokens is not None and len(ids) > max_tokens:
                num_closing = next((n for n, flag in enumerate(reversed(encoding.special_tokens_mask)) if not flag), 0)
                num_closing = min(num_closing, max_tokens - 1)
                cut = slice(max_tokens - num_closing, len(ids) - num_closing)
                del ids[cut], kinds[cut]
            return _as_array(ids), kinds.index(1) if 1 in kinds else 0

        return await self._in_pool(encode)

    async def encode_chat(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        *,
        max_chars: int,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        salt: str = "",
    ) -> tuple[TokenIdArray, str]:
        """Ids of a rendered conversation; the text of special tokens inside a message stays text.

        `salt`: what was encoded with another one is not used again.

        Returns:
            ids  # [num_tokens], uint32
            The rendered text's last characters, to see how the answer begins.
        """

        def encode() -> tuple[TokenIdArray, str]:
            given = [list(messages), list(tools or ()), dict(arguments or {})]
            masked = self._masked(given)
            text = template.render(
                masked[0],
                max_chars=max_chars,
                continue_final_message=continue_final_message,
                add_generation_prompt=add_generation_prompt,
                tools=masked[1],
                arguments=masked[2],
            )
            if self._guard.always or masked != given:
                return self._guard.encode(text, salt), text[-_END_CHARS:]
            return self._encoder.encode(text, salt), text[-_END_CHARS:]

        return await self._in_pool(encode)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Text of whole sequences, special tokens shown."""

        def decode() -> str:
            text: str = self._tokenizer.decode_batch([list(token_ids)], skip_special_tokens=False)[0]
            return text

        return await self._in_pool(decode)

    def _masked(self, value: Any) -> Any:
        """A JSON value with every text in it masked, keys included."""
        if isinstance(value, str):
            return self._guard.mask(value)
        if isinstance(value, list | tuple):
            return [self._masked(each) for each in value]
        if isinstance(value, dict):
            return {self._guard.mask(str(key)): self._masked(each) for key, each in value.items()}
        return value

    def to_json(self) -> str:
        """The tokenizer as tokenizer.json has it."""
        return str(self._tokenizer.to_str())

    def to_plain_json(self) -> str:
        """Likewise, but the text of a special token is text like any other, where that is possible."""
        return self._guard.renamed_json() or self.to_json()

    @functools.cached_property
    def special_texts(self) -> dict[str, int]:
        """The special tokens' ids by their texts."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special and token.content}

    def special_id(self, text: str) -> int | None:
        """The id of a special token by its text; None where the text is none."""
        token_id = self.token_id(text)
        return token_id if token_id in self._special_ids else None

    def id_of_text(self, text: str) -> int | None:
        """The lowest id of a token that stands for exactly this text; None where none does."""
        data = text.encode()
        byte_level = "".join(piece for piece, _ in _BYTE_LEVEL.pre_tokenize_str(text))
        spellings = (text, byte_level, text.replace(" ", "\N{LOWER ONE EIGHTH BLOCK}"), f"<0x{data[:1].hex().upper()}>")
        ids = {token_id for spelling in spellings if (token_id := self.token_id(spelling)) is not None}
        return min((each for each in ids if data and self.detokenization.token_bytes(each) == data), default=None)

    def text_of_id(self, token_id: int) -> str | None:
        """A token's own text, if it is no special token; what is part of a character is replaced."""
        if token_id in self._special_ids:
            return None
        return self.detokenization.token_bytes(token_id).decode("utf-8", "replace")

    @functools.cached_property
    def id_ranges(self) -> tuple[tuple[int, int], ...]:
        """The ids of its tokens, in order: first and last of each run without a gap."""
        ids = np.sort(np.fromiter(self._tokenizer.get_vocab(with_added_tokens=True).values(), np.int64))  # [num_tokens]
        runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
        return tuple((int(run[0]), int(run[-1])) for run in runs if len(run))

    def show(self, texts: Sequence[str]) -> Detokenization:
        """A detokenization in which these special tokens are text."""
        shown = frozenset(token_id for text in texts if (token_id := self.special_id(text)) is not None)
        return create_detokenization(self._tokenizer, shown) if shown else self.detokenization

    async def spellings(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of each word, with and without a blank before it."""

        def encode() -> list[tuple[int, ...]]:
            found: dict[tuple[int, ...], None] = {}
            for word in words:
                for spelled in (word, " " + word.lstrip()):
                    found[tuple(self._encode(spelled, add_special_tokens=False))] = None
            return list(found)

        return await self._in_pool(encode)

    def _find_added(self) -> tuple[TokenIdArray, TokenIdArray] | None:
        """The special tokens that the tokenizer puts around any text; None where that cannot be seen."""
        with_them, bare = (self._encode("a", add_special_tokens=wanted) for wanted in (True, False))
        starts = [start for start in range(len(with_them)) if bare and with_them[start : start + len(bare)] == bare]
        if len(starts) != 1:
            return None
        return _as_array(with_them[: starts[0]]), _as_array(with_them[starts[0] + len(bare) :])

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    async def _in_pool(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)


def _as_array(ids: list[int]) -> TokenIdArray:
    return np.array(ids, dtype=np.uint32)  # [num_tokens]
