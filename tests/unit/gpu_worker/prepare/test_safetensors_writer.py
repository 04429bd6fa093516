"""Streamed shards, read back by the safetensors library."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gpu_worker.loading.safetensors_reader import SafetensorsReader
from gpu_worker.loading.tensor_source import TensorInfo, iterate
from gpu_worker.prepare.errors import PrepareError, explained_os_errors
from gpu_worker.prepare.safetensors_writer import plan_shards, write_shards

DTYPES = {"a": torch.bfloat16, "b": torch.float32, "c": torch.float32, "d": torch.bfloat16, "e": torch.float32}
SHAPES = {"a": (7, 5), "b": (40, 3), "c": (11,), "d": (3, 2), "e": (1,)}


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(SHAPES[name]).to(dtype) for name, dtype in DTYPES.items()}


def _infos() -> list[TensorInfo]:
    return [TensorInfo(name, SHAPES[name], DTYPES[name], Path("source")) for name in DTYPES]


def _in_pieces(info: TensorInfo) -> Iterator[torch.Tensor]:
    yield from _tensors()[info.name].split(3)


@pytest.mark.parametrize(("max_bytes", "num_shards"), [(10**9, 1), (500, 3), (1, 5)])
def test_shards_are_read_back_by_the_library(tmp_path: Path, max_bytes: int, num_shards: int) -> None:
    shards = plan_shards(_infos(), max_bytes)
    assert len(shards) == num_shards
    done: list[int] = []
    files = write_shards(tmp_path, shards, _in_pieces, done.append)
    assert sum(done) == sum(info.num_bytes for info in _infos())
    weights = [name for name in files if name.endswith(".safetensors")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    assert len(weights) == num_shards
    read = {}
    for name in weights:
        with safe_open(tmp_path / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            read |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert set(read) == set(_tensors())
    assert all(torch.equal(read[name], tensor) for name, tensor in _tensors().items())
    with SafetensorsReader(tmp_path) as reader:
        assert all(torch.equal(tensor, _tensors()[name]) for name, tensor in iterate(reader))
    if num_shards > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(done)
        assert set(index["weight_map"]) == set(_tensors())


def test_no_shard_is_larger_than_asked_unless_one_tensor_is() -> None:
    for max_bytes in range(1, 800, 13):
        shards = plan_shards(_infos(), max_bytes)
        assert [info for shard in shards for info in shard] == _infos()
        assert all(len(shard) == 1 or sum(info.num_bytes for info in shard) <= max_bytes for shard in shards)


@pytest.mark.parametrize("wrong", ["dtype", "size"])
def test_pieces_that_do_not_make_the_tensor_are_an_error(tmp_path: Path, wrong: str) -> None:
    def pieces(info: TensorInfo) -> Iterator[torch.Tensor]:
        tensor = _tensors()[info.name]
        yield tensor.double() if wrong == "dtype" else tensor[:-1]

    with pytest.raises(ValueError, match="piece"):
        write_shards(tmp_path, plan_shards(_infos()), pieces, lambda count: None)


def test_a_full_disk_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    """/dev/full is the kernel's own full disk."""
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(PrepareError) as caught, explained_os_errors(tmp_path, 269_000_000):
        write_shards(tmp_path, plan_shards(_infos()), _in_pieces, lambda count: None)
    assert "No space left on device; 269 MB are needed: make room, or name another directory" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "cannot be written (Permission denied): name a writable directory"),
        (errno.EROFS, "cannot be written (Read-only file system)"),
        (errno.ENOTDIR, "cannot be made (Not a directory)"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_other_failures_to_write(tmp_path: Path, number: int, advice: str) -> None:
    import os

    with pytest.raises(PrepareError) as caught, explained_os_errors(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))
    assert str(caught.value).startswith(str(tmp_path / "x"))
    assert advice in str(caught.value)
