"""Directories as they are found: damaged configs, and tokenizers of older forms."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from gpu_worker.loading.checkpoint import open_checkpoint
from gpu_worker.prepare.errors import PrepareError
from gpu_worker.prepare.preparation import PreparedModel, prepare
from gpu_worker.prepare.progress import PlainProgress, SilentProgress

# none begins with a space: there transformers differs from SentencePiece, and its conversion is what is used
TEXTS = ["the cat sat on the mat", "two  spaces", "12 birds", "été 日本"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    save_file({"model.norm.weight": torch.ones(4)}, path / "model.safetensors")
    return path


def _prepare(directory: Path) -> PreparedModel:
    return prepare(directory, directory.parent / "cache", progress=SilentProgress())


def _error(directory: Path) -> str:
    with pytest.raises(PrepareError) as caught:
        _prepare(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json does not exist: give a directory with a model"),
        ("config.json", "{", "config.json is not readable JSON"),
        ("config.json", "[]", "config.json holds no JSON object"),
        ("config.json", "{}", "names neither architectures nor model_type"),
        ("tokenizer_config.json", "nope", "tokenizer_config.json is not readable JSON"),
        ("tokenizer.json", '{"model": 1}', "tokenizer.json cannot be used"),
        ("tekken.json", "{}", "cannot be converted"),
        ("vocab.json", "{}", "has vocab.json and lacks merges.txt: download merges.txt too"),
    ],
)
def test_files_that_do_not_do(directory: Path, name: str, content: str | None, message: str) -> None:
    (directory / name).unlink(missing_ok=True)
    if content is not None:
        (directory / name).write_text(content)
    assert message in _error(directory)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "adapter_config.json",
            '{"base_model_name_or_path": "org/base"}',
            "an adapter (PEFT) and not a model: .*org/base",
        ),
        ("params.json", '{"dim": 4096}', "its maker's own layout (params.json)"),
        ("model_index.json", "{}", "makes images"),
    ],
)
def test_what_is_taken_for_a_model_is_called_by_its_name(
    directory: Path, name: str, content: str, message: str
) -> None:
    (directory / "config.json").unlink()
    (directory / name).write_text(content)
    start, _, end = message.partition(".*")
    assert start in _error(directory) and end in _error(directory)


def _add_sentencepiece(directory: Path) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(TEXTS)] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ messages }}", "bos_token": "<s>"})
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_a_sentencepiece_model_is_converted_beside_the_directory(directory: Path) -> None:
    processor = _add_sentencepiece(directory)
    before = sorted(path.name for path in directory.iterdir())
    model = _prepare(directory)
    assert model.has_tokenizer
    assert model.path != directory
    assert sorted(path.name for path in directory.iterdir()) == before
    tokenizer = Tokenizer.from_file(str(model.path / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False).ids == processor.encode(text), text
    config = json.loads((model.path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}"
    with open_checkpoint(model.path) as checkpoint:
        assert torch.equal(checkpoint.read("model.norm.weight"), torch.ones(4))
    inode = (model.path / "tokenizer.json").stat().st_ino
    assert (_prepare(directory).path / "tokenizer.json").stat().st_ino == inode
    assert prepare(model.path, directory.parent / "cache", progress=SilentProgress()).path == model.path


def test_vocab_and_merges_are_converted(directory: Path) -> None:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = ["<|endoftext|>", *letters, "Ġ", "th", "the", "Ġthe"]
    (directory / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (directory / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    model = _prepare(directory)
    tokenizer = Tokenizer.from_file(str(model.path / "tokenizer.json"))
    assert tokenizer.encode("the the cat").tokens == ["the", "Ġthe", "Ġ", "c", "a", "t"]


def test_a_tokenizer_that_cannot_be_converted_says_why_and_what_to_do(directory: Path) -> None:
    (directory / "tokenizer.model").write_bytes(b"no protobuf")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    message = _error(directory)
    assert f"the tokenizer of {directory} cannot be converted" in message
    assert "save_pretrained" in message
    assert not any("partial" in path.name for path in (directory.parent / "cache").iterdir())


def test_no_tokenizer_at_all_is_said(directory: Path) -> None:
    stream = io.StringIO()
    model = prepare(directory, directory.parent / "cache", progress=PlainProgress(stream))
    assert (model.path, model.has_tokenizer) == (directory, False)
    assert "has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)" in stream.getvalue()


def test_mistral_s_own_form_is_converted(directory: Path) -> None:
    """Token for token what mistral-common makes of the same file."""
    fixture = Path(__file__).parents[3] / "fixtures" / "tekken"
    (directory / "tekken.json").write_bytes((fixture / "tekken.json").read_bytes())
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    model = _prepare(directory)
    assert model.has_tokenizer
    tokenizer = Tokenizer.from_file(str(model.path / "tokenizer.json"))
    for vector in json.loads((fixture / "token_ids.json").read_text("utf-8")):
        encoded = tokenizer.encode(vector["text"])
        assert encoded.ids == vector["ids"], vector["text"]
        assert tokenizer.decode(encoded.ids) == vector["text"]
    assert tokenizer.encode("[INST]a[/INST]").ids[1] == tokenizer.token_to_id("[INST]") == 3
    config = json.loads((model.path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    assert (model.path / "chat_template.jinja").read_text() == "{{ messages }}"


def test_without_a_chat_template_mistral_s_form_says_so(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = Path(__file__).parents[3] / "fixtures" / "tekken"
    (directory / "tekken.json").write_bytes((fixture / "tekken.json").read_bytes())
    monkeypatch.setattr("transformers.integrations.mistral.tokenizer.is_mistral_common_available", lambda: False)
    stream = io.StringIO()
    prepare(directory, directory.parent / "cache", progress=PlainProgress(stream))
    assert "has no chat template: give one with --chat-template" in stream.getvalue()
