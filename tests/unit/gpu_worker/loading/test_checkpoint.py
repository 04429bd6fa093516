"""The strict accounting: nothing missing, nothing left over, nothing of another shape, nothing unread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gpu_worker.loading.checkpoint import StrictReader, open_checkpoint
from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.safetensors_reader import SafetensorsReader
from gpu_worker.loading.tensor_source import CheckpointError
from tests.unit.gpu_worker.loading.synthetic_gguf import write_gguf

EXPECTED: dict[str, tuple[int, ...] | None] = {"embed.weight": (4, 2), "norm.weight": (2,), "packed": None}


def _checkpoint(directory: Path, **more: torch.Tensor) -> SafetensorsReader:
    tensors = {"embed.weight": torch.randn(4, 2), "norm.weight": torch.randn(2), "packed": torch.arange(7)}
    save_file(
        tensors | {name.replace("__", "."): tensor for name, tensor in more.items()}, directory / "model.safetensors"
    )
    return SafetensorsReader(directory)


def test_open_checkpoint_picks_the_reader(tmp_path: Path) -> None:
    _checkpoint(tmp_path)
    write_gguf(tmp_path / "m.gguf")
    with open_checkpoint(tmp_path) as safetensors, open_checkpoint(tmp_path / "m.gguf") as gguf:
        assert isinstance(safetensors, SafetensorsReader)
        assert isinstance(gguf, GgufReader)
    with pytest.raises(CheckpointError, match="none: does not exist"):
        open_checkpoint(tmp_path / "none")


def test_everything_is_yielded_once(tmp_path: Path) -> None:
    with StrictReader(_checkpoint(tmp_path), EXPECTED) as reader:
        assert sorted(name for name, _ in reader) == sorted(EXPECTED)


def test_missing_and_left_over_are_named_together(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path, extra__weight=torch.ones(1), extra__bias=torch.ones(1))
    with pytest.raises(CheckpointError) as caught:
        StrictReader(source, {**EXPECTED, "head.weight": (4, 2)})
    message = str(caught.value)
    assert "lacks 1 tensor that the model needs: head.weight" in message
    assert "has 2 tensors that the model has no place for: extra.bias, extra.weight" in message


def test_many_names_are_counted_and_not_listed(tmp_path: Path) -> None:
    expected = EXPECTED | {f"layers.{layer}.weight": (1,) for layer in range(40)}
    with pytest.raises(CheckpointError, match=r"lacks 40 tensors .*layers.0.weight, .*layers.4.weight and 35 more;"):
        StrictReader(_checkpoint(tmp_path), expected)


def test_another_shape_is_named_with_both(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'embed.weight': has the shape \[4, 2\], .* asks for \[5, 2\]"):
        StrictReader(_checkpoint(tmp_path), EXPECTED | {"embed.weight": (5, 2)})


@pytest.mark.parametrize("present", [True, False])
def test_a_tied_head_may_be_there_or_not(tmp_path: Path, present: bool) -> None:
    source = _checkpoint(tmp_path, **({"lm_head__weight": torch.randn(4, 2)} if present else {}))
    with StrictReader(source, EXPECTED, tied_head=True) as reader:
        assert "lm_head.weight" not in dict(reader)
    if present:
        with pytest.raises(CheckpointError, match=r"no place for: lm_head.weight"):
            StrictReader(source, EXPECTED)
    else:
        with pytest.raises(CheckpointError, match=r"needs: lm_head.weight"):
            StrictReader(source, EXPECTED | {"lm_head.weight": (4, 2)})


def test_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    more = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)}
    source = _checkpoint(tmp_path, **more)
    assert any("inv_freq" in info.name for info in source.names())
    with StrictReader(source, EXPECTED) as reader:
        assert len(dict(reader)) == 3


def test_optional_tensors_are_read_when_they_are_there(tmp_path: Path) -> None:
    with StrictReader(_checkpoint(tmp_path), EXPECTED, optional=["k_scale"]) as reader:
        assert "k_scale" not in reader
        dict(reader)
    with StrictReader(_checkpoint(tmp_path, k_scale=torch.ones(1)), EXPECTED, optional=["k_scale"]) as reader:
        assert "k_scale" in reader
        dict(reader)


def test_a_tensor_that_was_never_read_is_an_error_at_the_end(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"announced 2 tensors that it never read: .*norm.weight"),
        StrictReader(_checkpoint(tmp_path), EXPECTED) as reader,
    ):
        assert reader.read("embed.weight", (slice(0, 2),)).shape == (2, 2)
        assert reader.read("embed.weight", (slice(2, 4),)).shape == (2, 2)
    with pytest.raises(KeyError, match="did not announce"):
        StrictReader(_checkpoint(tmp_path), EXPECTED).read("other")


def test_an_error_inside_is_not_hidden_by_the_check_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), StrictReader(_checkpoint(tmp_path), EXPECTED):
        _ = 1 / 0
