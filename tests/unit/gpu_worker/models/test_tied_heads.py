"""Output heads of checkpoints whose config ties them to the table of embeddings: what is stored is what is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from transformers import AutoModelForCausalLM
from transformers.models.qwen2 import Qwen2Config

from gpu_worker.loading.tensor_source import CheckpointError
from tests.unit.gpu_worker.models.test_families import PagedModel, check_logits
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny
from tests.unit.gpu_worker.parallel.test_shares import logits_of_group
from tests.unit.gpu_worker.quant.published import SIZES, assert_equal_logits, publish
from tests.unit.gpu_worker.quant.test_mlx import packed_by_mlx

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_tied(name: str, directory: Path, head: torch.Tensor | None = None) -> torch.Tensor:
    """A tied checkpoint, with this head as well; returns its table."""
    save_tiny(name, directory, tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    assert HEAD not in tensors
    if head is not None:
        save_file(tensors | {HEAD: head}, directory / "model.safetensors", {"format": "pt"})
    return tensors[TABLE]


def other_head() -> torch.Tensor:
    return torch.randn(301, 60, generator=torch.Generator().manual_seed(3)) * 0.2


def by_transformers(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def is_tied(model: PagedModel) -> bool:
    return model.model.head is not None and model.model.head.table is model.model.embedding


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "cohere", "granite4-dense-nope", "qwen3-moe"])
def test_a_head_with_other_values_is_served_as_transformers_does(name: str, tmp_path: Path) -> None:
    save_tied(name, tmp_path, other_head())
    check_logits(by_transformers(tmp_path), tmp_path)
    with capture_logs() as logs:
        assert not is_tied(PagedModel(tmp_path))
    [line] = [line for line in logs if line["log_level"] == "warning"]
    assert "stores another one: that is served" in line["event"] and line["head"] == "lm_head"


def test_a_config_that_says_nothing_of_a_head_that_is_not_stored(tmp_path: Path) -> None:
    """Of transformers' classes some tie by default, and not in every version."""
    save_tied("qwen2", tmp_path)
    expected = PagedModel(tmp_path).logits([5, 6, 7], 0)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = PagedModel(tmp_path)
    assert is_tied(model) and torch.equal(model.logits([5, 6, 7], 0), expected)
    (tmp_path / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor that the model needs: lm_head\.weight"):
        PagedModel(tmp_path)


def test_one_value_makes_another_head(tmp_path: Path) -> None:
    table = save_tied("qwen2", tmp_path)
    head = table.clone()
    save_tied("qwen2", tmp_path, head)
    before = PagedModel(tmp_path)
    assert is_tied(before)
    head[-1, -1] += 1
    save_tied("qwen2", tmp_path, head)
    after = PagedModel(tmp_path)
    assert not is_tied(after)
    one, other = (model.logits([5, 6, 7], 0) for model in (before, after))
    assert torch.equal(one[:, :-1], other[:, :-1]) and not torch.equal(one[:, -1], other[:, -1])


def test_a_table_may_be_stored_under_the_heads_name_alone(tmp_path: Path) -> None:
    """What `safetensors.torch.save_model` leaves of two names."""
    save_tied("gemma2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[HEAD] = tensors.pop(TABLE)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    check_logits(by_transformers(tmp_path), tmp_path)
    assert is_tied(PagedModel(tmp_path))


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_tied("qwen2", tmp_path, other_head()[:-1].contiguous())
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*\[300, 60\].*\[301, 60\]"):
        PagedModel(tmp_path)


# Shares of packed weights, and of heads that are not packed, are in every run (test_shares.py).
@pytest.mark.slow
def test_ranks_hold_their_shares_of_a_packed_head(tmp_path: Path) -> None:
    config = Qwen2Config(**(SIZES | {"vocab_size": 301}))
    directory = publish(tmp_path, config, {"group_size": 32, "bits": 4}, lambda name: packed_by_mlx(4))
    file = directory / "packed" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    ours = assert_equal_logits(directory)
    assert ours.model.head is not None and ours.model.head.table is not ours.model.embedding
    expected = logits_of_group(directory / "plain", 1, "width")
    torch.testing.assert_close(logits_of_group(directory / "packed", 2, "width"), expected, atol=1e-4, rtol=1e-4)
