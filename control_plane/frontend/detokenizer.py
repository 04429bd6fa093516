"""Token ids back to text, a token at a time.

For every sequence of ids the joined deltas equal `tokenizer.decode(ids, skip_special_tokens=...)`, invalid UTF-8
included, and no delta ends inside a character. A token costs the same whether it is the first or the millionth: what a
token adds is read from a table, never by decoding a growing window again.

How tokens join is the tokenizer's `decoder` (tokenizer.json); three kinds are told apart:

* byte level (GPT-2 and its many heirs): a token is bytes, the text is UTF-8 of all bytes;
* SentencePiece style (Replace / Metaspace, ByteFallback, Fuse, Strip): a token is text, a run of `<0xNN>` is bytes;
* anything else (WordPiece, BPE with suffixes, none): a short window decoded by the tokenizer itself.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """State of one sequence."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; what may still change is held back."""
        ...

    def push_token(self, token_id: int) -> str:
        """`push` of one."""
        ...

    def finish(self) -> str:
        """What was held back; the sequence has ended."""
        ...


class Detokenization(Protocol):
    """How one tokenizer's ids become text; makes a `Detokenizer` for every sequence."""

    def start(self, *, skip_special_tokens: bool) -> Detokenizer: ...

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes, special tokens as their text; empty for ids that the tokenizer does not know."""
        ...


class _Pieces:
    """Token id -> the vocabulary's spelling of it, and which ids are special."""

    def __init__(self, tokenizer: Tokenizer, shown: frozenset[int] = frozenset()) -> None:
        self.tokenizer = tokenizer
        # Those in `shown` are text like any other.
        self.special_ids = (
            frozenset(token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
            - shown
        )

    def spelling(self, token_id: int, skip_special_tokens: bool) -> str | None:
        """None where `decode` passes the id over: not in the vocabulary, or special and to be skipped."""
        if skip_special_tokens and token_id in self.special_ids:
            return None
        spelling: str | None = self.tokenizer.id_to_token(token_id)
        return spelling


# --- byte level -----------------------------------------------------------------------------------------------------


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: each byte's printable stand-in; bytes that are not printable are moved to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    moved = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(0x100 + offset): byte for offset, byte in enumerate(moved)})
    return table


_BYTE_OF_CHARACTER = _byte_of_character()


def _bytes_of_spelling(spelling: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in spelling])
    except KeyError:  # an added token with characters outside the alphabet stands for itself, as a whole
        return spelling.encode("utf-8")


class _BytesTable(dict[int, bytes]):
    """Filled as tokens are met: start-up pays nothing for a vocabulary of 250 thousand."""

    def __init__(self, pieces: _Pieces, skip_special_tokens: bool) -> None:
        super().__init__()
        self._pieces = pieces
        self._skip = skip_special_tokens

    def __missing__(self, token_id: int) -> bytes:
        spelling = self._pieces.spelling(token_id, self._skip)
        value = b"" if spelling is None else _bytes_of_spelling(spelling)
        self[token_id] = value
        return value


class _WholeTextTable(dict[int, str | None]):
    """A token's text where its bytes are whole characters, else None."""

    def __init__(self, bytes_table: _BytesTable) -> None:
        super().__init__()
        self._bytes = bytes_table

    def __missing__(self, token_id: int) -> str | None:
        try:
            value: str | None = self._bytes[token_id].decode("utf-8")
        except UnicodeDecodeError:
            value = None
        self[token_id] = value
        return value


_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class _ByteLevelDetokenizer:
    __slots__ = ("_bytes", "_decoder", "_inside_character", "_whole")

    def __init__(self, whole: _WholeTextTable, bytes_table: _BytesTable) -> None:
        self._whole = whole
        self._bytes = bytes_table
        self._decoder: codecs.IncrementalDecoder | None = None
        self._inside_character = False

    def push(self, token_ids: Sequence[int]) -> str:
        return self._push_bytes(b"".join([self._bytes[token_id] for token_id in token_ids]))

    def push_token(self, token_id: int) -> str:
        if not self._inside_character:
            text = self._whole[token_id]
            if text is not None:
                return text
        return self._push_bytes(self._bytes[token_id])

    def _push_bytes(self, data: bytes) -> str:
        decoder = self._decoder
        if decoder is None:
            decoder = self._decoder = _Utf8Decoder("replace")
        text = decoder.decode(data)
        self._inside_character = bool(decoder.getstate()[0])
        return text

    def finish(self) -> str:
        if not self._inside_character or self._decoder is None:
            return ""
        self._inside_character = False
        return self._decoder.decode(b"", True)


class ByteLevelDetokenization:
    def __init__(self, pieces: _Pieces) -> None:
        self._bytes = {skip: _BytesTable(pieces, skip) for skip in (False, True)}
        self._whole = {skip: _WholeTextTable(self._bytes[skip]) for skip in (False, True)}

    def start(self, *, skip_special_tokens: bool) -> Detokenizer:
        return _ByteLevelDetokenizer(self._whole[skip_special_tokens], self._bytes[skip_special_tokens])

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[False][token_id]


# --- SentencePiece style --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _SentencePieceRules:
    """What the decoder chain does, in its order: replace in each token, join byte runs, strip the text's start."""

    replacements: tuple[tuple[str, str], ...] = ()
    # Metaspace: the mark that is a space; `drops_first` leaves it out of the first token.
    metaspace: str = ""
    metaspace_drops_first: bool = False
    byte_fallback: bool = False
    strip_character: str = ""
    strip_count: int = 0

    def text(self, spelling: str, *, first: bool) -> str:
        for old, new in self.replacements:
            spelling = spelling.replace(old, new)
        if self.metaspace:
            spelling = spelling.replace(self.metaspace, "" if first and self.metaspace_drops_first else " ")
        return spelling


_FALLBACK_BYTE = re.compile("<0x([0-9a-fA-F]{2})>")


def _fallback_byte(spelling: str) -> int | None:
    """`<0xNN>` -> NN."""
    match = _FALLBACK_BYTE.fullmatch(spelling)
    return int(match[1], 16) if match else None


class _PiecesTable(dict[int, "str | int | None"]):
    """A token's text, or the byte it stands for, or None where it is passed over."""

    def __init__(self, pieces: _Pieces, rules: _SentencePieceRules, skip_special_tokens: bool) -> None:
        super().__init__()
        self.pieces = pieces
        self.rules = rules
        self.skip = skip_special_tokens

    def __missing__(self, token_id: int) -> str | int | None:
        value = self[token_id] = self.piece(token_id, first=False)
        return value

    def piece(self, token_id: int, *, first: bool) -> str | int | None:
        spelling = self.pieces.spelling(token_id, self.skip)
        if spelling is None:
            return None
        text = self.rules.text(spelling, first=first)
        byte = _fallback_byte(text) if self.rules.byte_fallback else None
        return text if byte is None else byte


class _SentencePieceDetokenizer:
    __slots__ = ("_byte_run", "_first", "_num_to_strip", "_table")

    def __init__(self, table: _PiecesTable) -> None:
        self._table = table
        self._byte_run = bytearray()
        self._first = True
        self._num_to_strip = table.rules.strip_count

    def push(self, token_ids: Sequence[int]) -> str:
        text = ""
        for token_id in token_ids:
            piece = self._table[token_id]
            if piece is None:
                continue
            if self._first:
                piece = self._table.piece(token_id, first=True)
                self._first = False
            if isinstance(piece, int):
                # One bad byte turns the whole run into replacement characters, so the run is known only at its end.
                self._byte_run.append(piece)
                continue
            text += self._end_byte_run() + piece if self._byte_run else piece  # type: ignore[operator]
        return self._strip(text) if self._num_to_strip else text

    def push_token(self, token_id: int) -> str:
        return self.push((token_id,))

    def finish(self) -> str:
        return self._strip(self._end_byte_run())

    def _end_byte_run(self) -> str:
        run = bytes(self._byte_run)
        self._byte_run.clear()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _strip(self, text: str) -> str:
        while self._num_to_strip and text:
            if text[0] != self._table.rules.strip_character:
                self._num_to_strip = 0
                break
            text = text[1:]
            self._num_to_strip -= 1
        return text


class SentencePieceDetokenization:
    def __init__(self, pieces: _Pieces, rules: _SentencePieceRules) -> None:
        self._tables = {skip: _PiecesTable(pieces, rules, skip) for skip in (False, True)}

    def start(self, *, skip_special_tokens: bool) -> Detokenizer:
        return _SentencePieceDetokenizer(self._tables[skip_special_tokens])

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._tables[False][token_id]
        if piece is None:
            return b""
        return bytes([piece]) if isinstance(piece, int) else piece.encode("utf-8")


# --- any other decoder ----------------------------------------------------------------------------------------------

# Tokens that a window may hold back before it lets go; no known decoder changes text further back.
_MAX_HELD_TOKENS = 16


class _WindowDetokenizer:
    """Decodes the tokens not yet shown together with the last ones shown, whose text it leaves out."""

    __slots__ = ("_num_shown", "_pieces", "_skip", "_window")

    def __init__(self, pieces: _Pieces, skip_special_tokens: bool) -> None:
        self._pieces = pieces
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._num_shown = 0

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self.push_token(token_id) for token_id in token_ids])

    def push_token(self, token_id: int) -> str:
        if self._pieces.spelling(token_id, self._skip) is None:
            return ""
        self._window.append(token_id)
        text = self._new_text()
        may_change = not text or text.endswith(REPLACEMENT)
        if may_change and len(self._window) - self._num_shown < _MAX_HELD_TOKENS:
            return ""
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return text

    def _new_text(self) -> str:
        decode = self._pieces.tokenizer.decode
        shown = decode(self._window[: self._num_shown], skip_special_tokens=False)
        text: str = decode(self._window, skip_special_tokens=False)
        return text[len(shown) :] if text.startswith(shown) else ""

    def finish(self) -> str:
        text = self._new_text()
        self._num_shown = len(self._window)
        return text


class WindowDetokenization:
    def __init__(self, pieces: _Pieces) -> None:
        self._pieces = pieces

    def start(self, *, skip_special_tokens: bool) -> Detokenizer:
        return _WindowDetokenizer(self._pieces, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        return str(self._pieces.tokenizer.decode([token_id], skip_special_tokens=False)).encode("utf-8")


# --- which one ------------------------------------------------------------------------------------------------------


def create_detokenization(tokenizer: Tokenizer, shown: frozenset[int] = frozenset()) -> Detokenization:
    """Pick the kind by the tokenizer's `decoder`. `shown`: special tokens that are never skipped."""
    pieces = _Pieces(tokenizer, shown)
    decoder = tokenizer.decoder
    if decoder is None:
        return WindowDetokenization(pieces)
    chain = _flatten(json.loads(decoder.__getstate__()))
    if [step["type"] for step in chain] == ["ByteLevel"]:
        return ByteLevelDetokenization(pieces)
    rules = _sentence_piece_rules(chain)
    return WindowDetokenization(pieces) if rules is None else SentencePieceDetokenization(pieces, rules)


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]


def _sentence_piece_rules(chain: list[dict[str, Any]]) -> _SentencePieceRules | None:
    """The chain as rules, or None where it does something else or in another order."""
    replacements: list[tuple[str, str]] = []
    rules: dict[str, Any] = {}
    fused = False
    for step in chain:
        kind = step["type"]
        if kind == "Replace" and "String" in step["pattern"] and not rules and not fused:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace" and not rules and not fused:
            rules["metaspace"] = step["replacement"]
            rules["metaspace_drops_first"] = step.get("prepend_scheme", "always") != "never"
        elif kind == "ByteFallback" and "byte_fallback" not in rules and not fused:
            rules["byte_fallback"] = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and step["stop"] == 0 and "strip_count" not in rules:
            rules["strip_character"] = step["content"]
            rules["strip_count"] = step["start"]
        else:
            return None
    return _SentencePieceRules(replacements=tuple(replacements), **rules)
