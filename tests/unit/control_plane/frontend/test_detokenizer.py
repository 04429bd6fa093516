from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from control_plane.frontend.detokenizer import (
    ByteLevelDetokenization,
    SentencePieceDetokenization,
    WindowDetokenization,
    create_detokenization,
)
from tests.unit.control_plane.frontend import tokenizers_for_tests as kinds

TOKENIZERS: dict[str, tuple[Callable[[], Tokenizer], type]] = {
    "byte level": (kinds.byte_level, ByteLevelDetokenization),
    "llama": (kinds.sentence_piece, SentencePieceDetokenization),
    "gemma": (lambda: kinds.sentence_piece("gemma"), SentencePieceDetokenization),
    "metaspace": (lambda: kinds.sentence_piece("metaspace"), SentencePieceDetokenization),
    "word piece": (kinds.word_piece, WindowDetokenization),
    "suffix": (kinds.bpe_with_suffix, WindowDetokenization),
    "no decoder": (kinds.without_decoder, WindowDetokenization),
}

each_kind = pytest.mark.parametrize("kind", TOKENIZERS)


@each_kind
def test_the_kind_is_seen(kind: str) -> None:
    make, expected = TOKENIZERS[kind]
    assert isinstance(create_detokenization(make()), expected)


@each_kind
@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_joined_deltas_equal_decode(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind][0]()
    size = tokenizer.get_vocab_size()
    # Ids past the vocabulary occur too: models pad their logits. Tokens that mark blanks are few: drawn more often.
    blanks = [token_id for token, token_id in tokenizer.get_vocab().items() if "\u2581" in token] or [0]
    ids = data.draw(st.lists(st.integers(0, size + 3) | st.sampled_from(blanks), max_size=30))
    skip = data.draw(st.booleans())
    group = data.draw(st.integers(1, 4))
    detokenizer = create_detokenization(tokenizer).start(skip_special_tokens=skip)
    deltas = [detokenizer.push(ids[start : start + group]) for start in range(0, len(ids), group)]
    deltas.append(detokenizer.finish())
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=120)
@given(data=st.lists(st.integers(0, 255), max_size=20))
def test_any_bytes_give_what_a_lossy_decoder_gives(data: list[int]) -> None:
    """Truncated, overlong and surrogate sequences, one byte a token."""
    tokenizer = kinds.byte_level()
    alphabet = {token: token_id for token, token_id in tokenizer.get_vocab().items() if len(token) == 1}
    detokenization = create_detokenization(tokenizer)
    byte_ids = {detokenization.token_bytes(token_id): token_id for token_id in alphabet.values()}
    ids = [byte_ids[bytes([byte])] for byte in data]
    detokenizer = detokenization.start(skip_special_tokens=True)
    deltas = [detokenizer.push([token_id]) for token_id in ids] + [detokenizer.finish()]
    assert "".join(deltas) == bytes(data).decode("utf-8", "replace") == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", [kinds.byte_level(), kinds.sentence_piece()], ids=["byte level", "llama"])
def test_no_delta_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    text = "café 東京 🙂 👩‍👩‍👧 ok"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) > len(text.split()), "the text must take several tokens a character somewhere"
    detokenizer = create_detokenization(tokenizer).start(skip_special_tokens=True)
    deltas = [detokenizer.push([token_id]) for token_id in ids] + [detokenizer.finish()]
    assert "".join(deltas) == text
    assert "\ufffd" not in "".join(deltas)
    assert any(delta == "" for delta in deltas), "something was held back"


def test_a_character_cut_off_at_the_end_is_shown_at_the_end_only() -> None:
    tokenizer = kinds.byte_level()
    detokenization = create_detokenization(tokenizer)
    ids = tokenizer.encode("🙂").ids
    detokenizer = detokenization.start(skip_special_tokens=True)
    assert len(ids) > 1
    assert [detokenizer.push([token_id]) for token_id in ids[:-1]] == [""] * (len(ids) - 1)
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_sequences_do_not_share_state() -> None:
    tokenizer = kinds.byte_level()
    detokenization = create_detokenization(tokenizer)
    one, other = (detokenization.start(skip_special_tokens=True) for _ in range(2))
    ids = tokenizer.encode("🙂").ids
    assert one.push(ids[:1]) == ""
    assert other.push(tokenizer.encode("a").ids) == "a"
    assert one.push(ids[1:]) == "🙂"


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = kinds.byte_level()
    ids = [1, *tokenizer.encode("user").ids, 2]
    for skip, expected in ((True, "user"), (False, "<|im_start|>user<|im_end|>")):
        assert create_detokenization(tokenizer).start(skip_special_tokens=skip).push(ids) == expected


@pytest.mark.parametrize("tokenizer", [kinds.byte_level(), kinds.sentence_piece("gemma")], ids=["byte level", "gemma"])
def test_token_bytes_join_to_the_text(tokenizer: Tokenizer) -> None:
    text = "abc é東 🙂"
    detokenization = create_detokenization(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(map(detokenization.token_bytes, ids)).decode() == tokenizer.decode(ids)
    assert detokenization.token_bytes(tokenizer.get_vocab_size() + 5) == b""
    special = next(iter(tokenizer.get_added_tokens_decoder().items()))
    assert detokenization.token_bytes(special[0]) == special[1].content.encode()
