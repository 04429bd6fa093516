"""Keeps the text of a special token apart from the token.

A person may type `<|im_end|>`. In a rendered conversation that text must not end the turn, while the same characters
written by the template must. So before a template runs, each place in a person's text where a special token begins gets
a stand-in for its first character; what still reads as a special token in the rendered text is the template's own.
That is then renamed to something that nobody can type and encoded by a twin of the tokenizer that knows special tokens
by those names only.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from tokenizers import AddedToken, Tokenizer

from control_plane.core.request import TokenIdArray
from control_plane.frontend.piecewise_encoding import PiecewiseEncoder

# Stand-ins come from a private use plane, from a place that is chosen anew by each process.
_PRIVATE_USE_PLANE = 0x100000
_PRIVATE_USE_SIZE = 0xFFFD


class SpecialTextGuard:
    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        special: dict[int, AddedToken] = {token_id: token for token_id, token in added.items() if token.special}
        names = sorted((token.content for token in special.values() if token.content), key=len, reverse=True)
        self._prefixes = frozenset(name[:length] for name in names for length in range(1, len(name)))
        self._max_prefix = max((len(prefix) for prefix in self._prefixes), default=0)
        first = sorted({name[0] for name in names})
        start = _PRIVATE_USE_PLANE + secrets.randbelow(_PRIVATE_USE_SIZE - len(first))
        self._stand_in = {character: chr(start + offset) for offset, character in enumerate(first)}
        self._back = str.maketrans({stand_in: character for character, stand_in in self._stand_in.items()})
        # Look-ahead, so that overlapping names are each found where they begin.
        begins = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
        self._begins = re.compile(begins) if names else None

        nonce = secrets.token_hex(8)
        self._alias = {name: f"\ue000{nonce}.{number}\ue001" for number, name in enumerate(names)}
        self._names = re.compile("|".join(map(re.escape, names))) if names else None
        self._twin = _renamed_twin(tokenizer, self._alias) if names else tokenizer
        self._encoder = PiecewiseEncoder(self._twin)
        self._id_of_twin_id = {
            twin_id: token_id
            for token_id, token in special.items()
            if (twin_id := self._twin.token_to_id(self._alias.get(token.content, token.content))) != token_id
        }
        # Where names are matched in normalized text, other spellings of them count too: then every text needs care.
        self.always = tokenizer.normalizer is not None and any(token.normalized for token in special.values())

    def renamed_json(self) -> str | None:
        """The tokenizer as tokenizer.json has it, to which no text that anybody can write is a special token; None
        where a token would have another id."""
        return None if self._id_of_twin_id else str(self._twin.to_str())

    def mask(self, text: str) -> str:
        """A person's text in which no special token begins, not even one that other text beside it would complete."""
        if self._begins is None:
            return text
        text = self._begins.sub(lambda match: self._stand_in[match[0]], text)
        if self._stand_in.keys().isdisjoint(text[-self._max_prefix :]):
            return text
        for length in range(1, min(self._max_prefix, len(text)) + 1):
            if text[-length:] in self._prefixes:
                text = f"{text[:-length]}{self._stand_in[text[-length]]}{text[len(text) - length + 1 :]}"
        return text

    def encode(self, masked: str, salt: str = "") -> TokenIdArray:
        """Ids of a text made of masked and of trusted parts. Holds no lock of the interpreter while it encodes.

        `salt`: what was encoded with another one is not used again.

        Returns:
            ids  # [num_tokens], uint32
        """
        if self._names is not None:
            masked = self._names.sub(lambda match: self._alias[match[0]], masked)
        ids = self._encoder.encode(masked.translate(self._back), salt)
        if not self._id_of_twin_id:
            return ids
        renumbered = ids.copy()
        for twin_id, token_id in self._id_of_twin_id.items():
            renumbered[ids == twin_id] = token_id
        return renumbered  # [num_tokens]


def _renamed_twin(tokenizer: Tokenizer, alias: dict[str, str]) -> Tokenizer:
    """The same tokenizer, its special tokens under other names, in the model's vocabulary as well."""
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    spec["post_processor"] = None  # adds special tokens by itself; templates write theirs out
    for token in spec["added_tokens"]:
        token["content"] = alias.get(token["content"], token["content"])
    model = spec["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {alias.get(piece, piece): token_id for piece, token_id in vocab.items()}
    else:  # Unigram: a list of (piece, score)
        model["vocab"] = [[alias.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in alias:
        model["unk_token"] = alias[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _names_special(merge, alias)]
    return Tokenizer.from_str(json.dumps(spec))


def _names_special(merge: str | list[str], alias: dict[str, str]) -> bool:
    """A merge that would build a special token out of typed text, or take one apart."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in alias or right in alias or left + right in alias
