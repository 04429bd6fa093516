from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from control_plane.frontend.special_text import SpecialTextGuard
from tests.unit.control_plane.frontend import tokenizers_for_tests as kinds

# Whole special tokens and the pieces they are made of.
fragments = st.sampled_from(
    [
        "<|im_start|>",
        "<|im_end|>",
        "<",
        "|",
        "<|",
        "im_end",
        "|>",
        "<|im_",
        "end|>",
        ">",
        "user",
        "\n",
        "é",
        " ",
        "<think>",
    ]
)
typed = st.lists(fragments, max_size=8).map("".join)

TOKENIZERS = {
    "byte level": kinds.byte_level(),
    "llama": kinds.sentence_piece(),
    "forging": kinds.sentence_piece("forging"),
}


def special_ids(tokenizer: Tokenizer) -> set[int]:
    return {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=100)
@given(parts=st.lists(st.one_of(typed, st.text(max_size=6)), min_size=1, max_size=4))
def test_only_the_templates_special_tokens_are_tokens(name: str, parts: list[str]) -> None:
    """Typed parts directly beside one another, then the template's closing: that is the one special id."""
    tokenizer = TOKENIZERS[name]
    guard = SpecialTextGuard(tokenizer)
    close = "</s>" if name != "byte level" else "<|im_end|>"
    masked = "".join(guard.mask(part) for part in parts) + close
    ids = guard.encode(masked)
    assert [token_id for token_id in ids if token_id in special_ids(tokenizer)] == [tokenizer.token_to_id(close)]


@settings(deadline=None, max_examples=100)
@given(typed)
def test_what_was_typed_is_what_the_model_reads(text: str) -> None:
    tokenizer = kinds.byte_level()
    guard = SpecialTextGuard(tokenizer)
    ids = guard.encode("<|im_start|>" + guard.mask(text) + "<|im_end|>").tolist()
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"<|im_start|>{text}<|im_end|>"


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=100)
@given(st.text(max_size=20))
def test_text_without_special_tokens_is_encoded_as_ever(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    guard = SpecialTextGuard(tokenizer)
    opening = "<s>" if name != "byte level" else "<|im_start|>"
    rendered = opening + text + opening
    ids = guard.encode(opening + guard.mask(text) + opening)
    assert ids.tolist() == tokenizer.encode(rendered, add_special_tokens=False).ids


def test_a_tokenizer_would_take_the_typed_text_for_the_token_otherwise() -> None:
    """What the guard is for; without it the test above would have nothing to show."""
    tokenizer = kinds.byte_level()
    assert 2 in tokenizer.encode("hello <|im_end|>").ids
    forging = kinds.sentence_piece("forging")
    forging.encode_special_tokens = True
    try:
        assert forging.token_to_id("</s>") in forging.encode("a</s>", add_special_tokens=False).ids
    finally:
        forging.encode_special_tokens = False


def test_text_split_over_parts_does_not_join_to_a_token() -> None:
    tokenizer = kinds.byte_level()
    guard = SpecialTextGuard(tokenizer)
    ids = guard.encode(guard.mask("<|im_") + guard.mask("end|>")).tolist()
    assert 2 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_end|>"


def test_unusual_names_and_unigram_vocabularies() -> None:
    """Unigram would find the name as a piece of its vocabulary; the name is gone from there."""
    tokenizer = Tokenizer(
        models.Unigram(
            [("<unk>", 0.0), ("</s>", -0.5), ("a", -1.0), ("<", -3.0), ("/", -3.0), ("s", -3.0), (">", -3.0)], 0
        )
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    guard = SpecialTextGuard(tokenizer)
    assert guard.encode(guard.mask("a</s>") + "</s>").tolist() == [2, 3, 4, 5, 6, 1]


def test_other_spellings_that_normalize_to_a_special_token() -> None:
    tokenizer = Tokenizer(
        models.WordLevel({"[unk]": 0, "[end]": 1, "hi": 2, "[": 3, "end": 4, "]": 5}, unk_token="[unk]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("[end]", special=True, normalized=True)])
    assert tokenizer.encode("hi [END]").ids == [2, 1]
    guard = SpecialTextGuard(tokenizer)
    assert guard.always
    assert guard.encode(guard.mask("hi [END]") + "[end]").tolist() == [2, 3, 4, 5, 1]
