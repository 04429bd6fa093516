from __future__ import annotations

import json
from pathlib import Path

import pytest
from llguidance import LLTokenizer

from control_plane.frontend.served_model import ServedModel, load_served_model
from control_plane.frontend.tokenizer import TextTokenizer
from tests.unit.control_plane.frontend import tokenizers_for_tests as kinds

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory as `prepare` leaves it, without weights."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    kinds.byte_level().save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0], "temperature": 0.6, "top_k": 20})
    )
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": CHATML})
    )
    return directory


@pytest.fixture
def model(model_dir: Path) -> ServedModel:
    return load_served_model(model_dir, names=("tiny", "alias/tiny"))


@pytest.fixture(scope="session")
def tokenizer(smollm2_dir: Path) -> TextTokenizer:
    """SmolLM2's."""
    return TextTokenizer.from_file(smollm2_dir / "tokenizer.json")


@pytest.fixture(scope="session")
def table(tokenizer: TextTokenizer) -> LLTokenizer:
    """What llguidance reads of it."""
    return LLTokenizer(tokenizer.to_json(), n_vocab=49152, eos_token=[2])
