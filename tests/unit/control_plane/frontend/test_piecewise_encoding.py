from __future__ import annotations

import json
import random
import threading
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from control_plane.frontend.piecewise_encoding import PiecewiseEncoder, finds_words
from control_plane.frontend.word_encoding import WordEncoder
from tests.unit.control_plane.frontend import tokenizers_for_tests as kinds

# The words of GPT-2, Llama 3, Qwen 2, GPT-4o and DeepSeek V3.
_PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek": r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
}
_ADDED = (
    AddedToken("<|start|>", special=True, normalized=False),
    AddedToken("<|end|>", special=True, normalized=False, rstrip=True),
    # The longest of those that begin at one place counts, and hides what begins within it.
    AddedToken("<|end|>\n", special=True, normalized=False),
    AddedToken("<|end|><|", special=False, normalized=False),
    AddedToken("<mask>", special=True, normalized=False, lstrip=True),
    AddedToken("<<|start|>", special=False, normalized=False),
    AddedToken("<think>", special=False, normalized=False),
    AddedToken("word", special=True, normalized=False, single_word=True),
    AddedToken("[NORM]", special=True, normalized=True),
)


def _byte_level(pattern: str, *, normalizer: normalizers.Normalizer | None = None, prefix: bool = False) -> Tokenizer:
    tokenizer = Tokenizer.from_str(kinds.byte_level().to_str())
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    tokenizer.add_tokens(list(_ADDED))
    return tokenizer


def _sentence_piece(kind: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(kinds.sentence_piece().to_str())
    if kind != "llama":
        scheme, split = kind.split("/")
        tokenizer.normalizer = None  # type: ignore[assignment]
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split == "split")
    tokenizer.add_tokens(list(_ADDED))
    return tokenizer


def _unigram() -> Tokenizer:
    pieces = ["<unk>", "▁", "a", "b", "the", "▁the", "▁a", "</", "s", ">", "<", "|", "end", "▁▁"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(index)) for index, piece in enumerate(pieces)], 0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_tokens(list(_ADDED))
    return tokenizer


WORDS = {name: _byte_level(pattern) for name, pattern in _PATTERNS.items()}
WORDS |= {
    "nfc": _byte_level(_PATTERNS["qwen2"], normalizer=normalizers.NFC()),
    "prefix": _byte_level(_PATTERNS["gpt2"], prefix=True),
}
NO_WORDS = {
    **{kind: _sentence_piece(kind) for kind in ("llama", "first/whole", "first/split", "always/whole", "never/split")},
    "unigram": _unigram(),
    "with a token of three words": kinds.byte_level(),
    "strips": _byte_level(_PATTERNS["qwen2"], normalizer=normalizers.Strip()),
    "across blanks": _byte_level(r"[\p{L} ]+|\s+"),
    "looking back": _byte_level(r"(?<=a) ?\p{L}+| ?\p{L}+|\s+"),
    "at borders": _byte_level(r"\b ?\p{L}+| ?\p{L}+|\s+"),
    "far ahead": _byte_level(r"\p{L}+(?=.*Z)| ?\p{L}+|\s+"),
}

_fragments = st.sampled_from(
    [
        *(token.content for token in _ADDED),
        *("<|im_start|>", "<|im_end|>", "<s>", "</s>", "[norm]", "user", "the", "I'm", "it's", "x1y", "abc", "Z"),
        *(
            " ",
            " ",
            " ",
            "  ",
            "\n",
            "\n\n",
            "\t",
            "a",
            "b",
            "é",
            "e\u0301",
            "東京",
            "9",
            ",",
            ". ",
            "?! a",
            "|",
            "<",
            "end|>",
            "\u3000",
        ),
    ]
)
_texts = st.lists(st.one_of(_fragments, st.text(max_size=3)), max_size=24).map("".join)


@cache
def _encoder(name: str, min_chars: int) -> PiecewiseEncoder:
    return PiecewiseEncoder((WORDS | NO_WORDS)[name], min_turn_chars=min_chars, min_words_chars=min_chars)


@pytest.mark.parametrize("name", [*WORDS, *NO_WORDS])
@settings(deadline=None, max_examples=100)
@given(text=_texts, min_chars=st.sampled_from([1, 2, 4, 9]))
@example(text="a <|end|>  \n<|start|> b c <mask>", min_chars=1)
@example(text="x<<|start|> the cat <|end|><|start|> the mat", min_chars=1)
def test_ids_are_those_of_the_whole_text(name: str, text: str, min_chars: int) -> None:
    encoder = _encoder(name, min_chars)
    whole = (WORDS | NO_WORDS)[name].encode(text, add_special_tokens=False).ids
    for _ in range(2):  # encoded, then kept
        ids = encoder.encode(text)
        assert ids.dtype == np.uint32
        assert ids.tolist() == whole
    assert "".join(encoder.pieces(text)) == text


def test_which_tokenizers_find_words() -> None:
    assert [name for name, tokenizer in WORDS.items() if not finds_words(tokenizer)] == []
    assert [name for name, tokenizer in NO_WORDS.items() if finds_words(tokenizer)] == []


class CountingTokenizer:
    """Counts what really has to be encoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.encoded: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> object:
        self.encoded += texts
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


def _chat(*turns: str) -> str:
    return "".join(f"<|start|>user\n{turn}<|end|>\n" for turn in turns)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_of_a_chat_only_the_new_turn_is_encoded(name: str) -> None:
    tokenizer = CountingTokenizer((WORDS | NO_WORDS)[name])
    encoder = PiecewiseEncoder(tokenizer)  # type: ignore[arg-type]
    turns = [f"turn {number}: " + "some words of it " * 60 for number in range(6)]
    for count in range(1, 7):
        tokenizer.encoded.clear()
        encoder.encode(_chat(*turns[:count]))
        assert len("".join(tokenizer.encoded)) <= len(_chat(turns[0])) + 2 * len("<|end|>")
    tokenizer.encoded.clear()
    encoder.encode(_chat("another beginning " * 10, *turns[1:]))
    assert len("".join(tokenizer.encoded)) < 300, "turns are found again behind a beginning that changed"


def test_a_long_text_is_cut_between_words() -> None:
    encoder = PiecewiseEncoder(WORDS["qwen2"])
    pieces = list(encoder.pieces("some words of it " * 500))
    assert len(pieces) > 10
    assert all(512 <= len(piece) < 530 for piece in pieces[:-1])
    assert all(piece.startswith(" ") for piece in pieces[1:])
    assert len(list(encoder.pieces("x" * 10_000))) == 1


def test_what_came_with_another_salt_is_encoded_again() -> None:
    tokenizer = CountingTokenizer(WORDS["qwen2"])
    encoder = PiecewiseEncoder(tokenizer)  # type: ignore[arg-type]
    text = "some words " * 10
    for salt, is_new in (("", True), ("mine", True), ("mine", False), ("", False)):
        tokenizer.encoded.clear()
        encoder.encode(text, salt)
        assert bool(tokenizer.encoded) == is_new
    # Words of its own are not known to anybody else, and it does not learn what others know.
    tokenizer.encoded.clear()
    encoder.encode(text + "more", "mine")
    assert "".join(tokenizer.encoded) == text + "more"
    for end in ("", " more"):
        encoder.encode("some words some words" + end)
        encoder.encode("further words" + end, "mine")
    tokenizer.encoded.clear()
    encoder.encode("some further words some words words")
    assert tokenizer.encoded == [" further"]


def test_what_was_not_used_for_longest_goes_first() -> None:
    tokenizer = CountingTokenizer(WORDS["qwen2"])
    encoder = PiecewiseEncoder(tokenizer, max_kept_chars=1000)  # type: ignore[arg-type]
    first, second, third = ("a" * 300, "b" * 300, "c" * 300)
    for text in (first, second, first, third):
        encoder.encode(text)
    tokenizer.encoded.clear()
    encoder.encode(first)
    assert tokenizer.encoded == []
    encoder.encode(second)
    assert tokenizer.encoded == [second]
    tokenizer.encoded.clear()
    for _ in range(2):
        encoder.encode("d" * 2000)
    assert len(tokenizer.encoded) == 2, "what is larger than all that may be kept is not kept"
    assert encoder.encode("").tolist() == []


def test_threads_may_encode_at_once() -> None:
    encoder = PiecewiseEncoder(WORDS["qwen2"], max_kept_chars=3000)
    texts = [f"text {number % 7} " * 50 for number in range(40)]
    expected = [WORDS["qwen2"].encode(text, add_special_tokens=False).ids for text in texts]
    wrong: list[str] = []

    def run() -> None:
        wrong.extend(text for text, ids in zip(texts, expected, strict=True) if encoder.encode(text).tolist() != ids)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_words_are_encoded_once_wherever_they_come_again() -> None:
    tokenizer = CountingTokenizer(WORDS["gpt2"])
    encoder = PiecewiseEncoder(tokenizer)  # type: ignore[arg-type]
    for end in ("?", " not?"):
        encoder.encode(f"It is one text, made of words. Is it{end}")
    tokenizer.encoded.clear()
    for text in (" words. is made of text,", "It text, of made of words. is"):
        assert encoder.encode(text).tolist() == WORDS["gpt2"].encode(text).ids
    assert not tokenizer.encoded


@pytest.mark.parametrize("name", WORDS)
def test_a_word_at_the_end_of_a_text_is_no_word_within_another(name: str) -> None:
    """What may not be followed by a cut was the end of a text that was met before."""
    encoder = PiecewiseEncoder(WORDS[name])
    for end in (")", "1", "\n", "é", '"', "<|end|>", "["):
        for text in (f"the cat{end}", f"cat{end}", f"the cat{end} the cat", f"cat{end} cat", f" cat{end} cat"):
            assert encoder.encode(text).tolist() == WORDS[name].encode(text, add_special_tokens=False).ids


def test_words_are_kept_within_bounds() -> None:
    tokenizer = WORDS["qwen2"]
    encoder = WordEncoder(tokenizer, max_words=120)
    for number in range(0, 600, 30):
        texts = [" ".join(f"w{each}" for each in range(number, number + 30)), "x" * 100 + " y"]
        whole = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
        for _ in range(3):
            assert [ids.tolist() for ids in encoder.encode(texts)] == whole
            assert encoder.num_words <= 240


def test_words_are_known_when_they_come_a_third_time() -> None:
    tokenizer = CountingTokenizer(WORDS["qwen2"])
    encoder = WordEncoder(tokenizer)  # type: ignore[arg-type]
    texts = [" " + " ".join(f"a{number}x{each}x" for each in range(40)) for number in range(4)]
    for num_encoded in (4, 4, 0):
        tokenizer.encoded.clear()
        assert [ids.tolist() for ids in encoder.encode(texts)] == [WORDS["qwen2"].encode(text).ids for text in texts]
        assert len(tokenizer.encoded) == num_encoded
    encoder.encode([texts[0] + " new"])
    assert tokenizer.encoded == [" new"]


@pytest.mark.parametrize("name", WORDS)
def test_ids_are_dealt_out_to_their_words(name: str) -> None:
    """Blanks in a row, before marks and digits, and characters that a normalizer makes blanks of."""
    words = [
        "the",
        "a  b",
        "of -",
        "1 2",
        "(in",
        "it's",
        "\xa0to",
        "x\u2003y",
        "\n",
        " ",
        "naïve",
        "end.",
        "...",
        "東 京",
    ]
    encoder, drawn = WordEncoder(WORDS[name]), random.Random(3)
    for _ in range(300):
        texts = [" ".join(drawn.choices(words, k=drawn.randint(1, 8))) for _ in range(2)]
        whole = [encoding.ids for encoding in WORDS[name].encode_batch(texts, add_special_tokens=False)]
        assert [ids.tolist() for ids in encoder.encode(texts)] == whole
    assert encoder.num_words
