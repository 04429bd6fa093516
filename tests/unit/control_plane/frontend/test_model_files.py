from __future__ import annotations

import json
from pathlib import Path

import pytest

from control_plane.frontend.model_files import ModelFilesError, read_model_files
from control_plane.frontend.served_model import load_served_model


def test_eos_ids_are_the_union_of_all_files(model_dir: Path) -> None:
    (model_dir / "config.json").write_text(json.dumps({"eos_token_id": 7, "text_config": {"eos_token_id": [8]}}))
    model = load_served_model(model_dir)
    # 7 and 8 of config.json, 0 of generation_config.json, 2 is what tokenizer_config.json calls eos_token.
    assert model.eos_token_ids == {0, 2, 7, 8}


def test_names_and_defaults(model_dir: Path) -> None:
    files = read_model_files(model_dir)
    assert files.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert files.sampling_defaults == {"temperature": 0.6, "top_k": 20}
    assert load_served_model(model_dir).names == ("tiny",)
    (model_dir / "generation_config.json").write_text('{"top_k": -1, "top_p": null, "do_sample": true}')
    assert not read_model_files(model_dir).sampling_defaults


def test_a_directory_without_a_tokenizer_is_served_with_token_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    model = load_served_model(tmp_path)
    assert model.tokenizer is None and model.chat_template is None
    assert model.eos_token_ids == {5}
    assert load_served_model(None).name("/models/llama") == "llama"


def test_where_the_chat_template_comes_from(model_dir: Path, tmp_path: Path) -> None:
    def template() -> str | None:
        return read_model_files(model_dir).chat_template

    config = model_dir / "tokenizer_config.json"
    config.write_text("{}")
    (model_dir / "chat_template.json").write_text(json.dumps({"chat_template": "P"}))
    assert template() == "P"
    config.write_text(
        json.dumps({"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]})
    )
    assert template() == "D"
    config.write_text(json.dumps({"chat_template": [{"name": "rag", "template": "R"}]}))
    assert template() == "R"
    (model_dir / "chat_template.jinja").write_text("J")
    assert template() == "J"
    override = tmp_path / "mine.jinja"
    override.write_text("M")
    assert read_model_files(model_dir, override).chat_template == "M"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "{", "config.json: not valid JSON"),
        ("config.json", "[]", "a JSON object was expected"),
        ("config.json", '{"eos_token_id": "x"}', "eos_token_id"),
        ("generation_config.json", '{"eos_token_id": [-1]}', "generation_config.json: eos_token_id"),
        ("generation_config.json", '{"temperature": -1}', "temperature must be a number from 0 to 2"),
        ("generation_config.json", '{"top_p": 0}', "top_p"),
        ("generation_config.json", '{"top_k": true}', "top_k"),
        ("tokenizer.json", "{}", "tokenizer.json: cannot be read as a tokenizer"),
        ("tokenizer_config.json", '{"chat_template": 5}', "tokenizer_config.json: chat_template must be"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "a", "template": "A"}, {"name": "b", "template": "B"}]}',
            "a, b",
        ),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "not valid jinja, line 1"),
    ],
)
def test_damage_is_named(model_dir: Path, name: str, content: str, said: str) -> None:
    (model_dir / name).write_text(content)
    with pytest.raises(ModelFilesError, match=said.replace("(", r"\(")):
        load_served_model(model_dir)


def test_missing_things_are_named(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="not a directory"):
        load_served_model(tmp_path / "no")
    with pytest.raises(ModelFilesError, match="--chat-template"):
        load_served_model(model_dir, chat_template_file=tmp_path / "no.jinja")
    (model_dir / "tokenizer.json").unlink()
    (tmp_path / "t.jinja").write_text("x")
    with pytest.raises(ModelFilesError, match="needs a tokenizer"):
        load_served_model(model_dir, chat_template_file=tmp_path / "t.jinja")
