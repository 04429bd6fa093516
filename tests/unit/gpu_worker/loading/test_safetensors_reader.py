"""Safetensors directories as they should be, and every way in which they can be damaged."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gpu_worker.loading.safetensors_headers import INDEX_NAME, ITEM_BYTES
from gpu_worker.loading.safetensors_reader import DTYPES, SafetensorsReader
from gpu_worker.loading.tensor_source import CheckpointError, iterate

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "embed": torch.randn(10, 8),
        "up": torch.randn(6, 8).to(torch.bfloat16),
        "down": torch.randn(8, 6).to(torch.float16),
        "scale": torch.tensor(3.5),
        "counts": torch.arange(12, dtype=torch.int32).reshape(3, 2, 2),
        "none": torch.empty(0, 4),
    }


def _write_sharded(directory: Path) -> dict[str, torch.Tensor]:
    tensors = _tensors()
    names = list(tensors)
    parts = (names[:3], names[3:])
    for shard, part in zip(SHARDS, parts, strict=True):
        save_file({name: tensors[name] for name in part}, directory / shard)
    index = {"metadata": {}, "weight_map": {n: s for s, part in zip(SHARDS, parts, strict=True) for n in part}}
    (directory / INDEX_NAME).write_text(json.dumps(index))
    return tensors


def _write_raw(file: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def _refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsReader(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _assert_reads(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with SafetensorsReader(path) as reader:
        read = dict(iterate(reader))
        assert set(read) == set(tensors)
        for info in reader.names():
            assert (info.shape, info.dtype) == (tuple(tensors[info.name].shape), tensors[info.name].dtype)
            assert info.num_bytes == tensors[info.name].numel() * tensors[info.name].element_size()
            assert torch.equal(read[info.name], tensors[info.name])


def test_single_file_shards_with_an_index_shards_without_one_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "single").mkdir()
    save_file(_tensors(), tmp_path / "single" / "model.safetensors")
    _assert_reads(tmp_path / "single", _tensors())
    _assert_reads(tmp_path / "single" / "model.safetensors", _tensors())
    (tmp_path / "sharded").mkdir()
    _assert_reads(tmp_path / "sharded", _write_sharded(tmp_path / "sharded"))
    (tmp_path / "sharded" / INDEX_NAME).unlink()
    _assert_reads(tmp_path / "sharded", _tensors())


def test_every_dtype_is_read(tmp_path: Path) -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_BYTES
    tensors = {}
    for name, dtype in DTYPES.items():
        raw = torch.arange(4 * dtype.itemsize, dtype=torch.uint8) % 2
        tensors[name] = raw.view(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    with SafetensorsReader(tmp_path) as reader:
        assert {info.name: info.dtype for info in reader.names()} == DTYPES
        for name, tensor in iterate(reader):
            assert torch.equal(tensor.view(torch.uint8), tensors[name].view(torch.uint8))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_slices_equal_slices_of_the_whole(tmp_path: Path, data: st.DataObject) -> None:
    save_file(_tensors(), tmp_path / "model.safetensors")
    with SafetensorsReader(tmp_path) as reader:
        name = data.draw(st.sampled_from(["embed", "up", "down", "counts"]))
        whole = _tensors()[name]
        index = []
        for size in whole.shape[: data.draw(st.integers(0, whole.dim()))]:
            start = data.draw(st.integers(0, size))
            index.append(slice(start, data.draw(st.integers(start, size))))
        part = reader.read(name, tuple(index))
        assert torch.equal(part, whole[tuple(index)])
        assert part.dtype == whole.dtype


@pytest.mark.parametrize("index", [(slice(0, 11),), (slice(3, 2),), (slice(0, 4, 2),), (slice(-1, None),)])
def test_slices_that_do_not_fit_are_errors(tmp_path: Path, index: tuple[slice, ...]) -> None:
    save_file(_tensors(), tmp_path / "model.safetensors")
    with SafetensorsReader(tmp_path) as reader, pytest.raises(IndexError, match=r"'embed' has shape \[10, 8\]"):
        reader.read("embed", index)


def test_a_missing_shard_is_named_with_a_tensor_of_it(tmp_path: Path) -> None:
    _write_sharded(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    assert f"{SHARDS[1]}: tensor 'scale': this shard" in _refusal(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    assert f"{SHARDS[1]}: this shard (2 of 2) does not exist" in _refusal(tmp_path)


def test_the_index_of_another_model_beside_a_single_file(tmp_path: Path) -> None:
    """Tools that quantize copy what lies beside the weights that they read."""
    tensors = _write_sharded(tmp_path)
    for shard in SHARDS:
        (tmp_path / shard).unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    _assert_reads(tmp_path, tensors)
    # Where one of the shards is there, the index speaks of this model.
    save_file({"embed": tensors["embed"]}, tmp_path / SHARDS[0])
    assert f"{SHARDS[1]}: tensor 'scale': this shard" in _refusal(tmp_path)


def test_an_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    _write_sharded(tmp_path)
    index = json.loads((tmp_path / INDEX_NAME).read_text())

    def with_map(**changes: Any) -> str:
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": index["weight_map"] | changes}))
        return _refusal(tmp_path)

    assert f"{SHARDS[0]}: tensor 'ghost': {INDEX_NAME} says" in with_map(ghost=SHARDS[0])
    assert "tensor 'scale': its file name '../secret.safetensors' is not" in with_map(scale="../secret.safetensors")
    assert "pytorch_model.bin: is a pickle file" in with_map(scale="pytorch_model.bin")
    (tmp_path / INDEX_NAME).write_text("{")
    assert "is not readable JSON" in _refusal(tmp_path)
    (tmp_path / INDEX_NAME).write_text("{}")
    assert "has no weight_map" in _refusal(tmp_path)


def test_an_index_from_before_the_weights_were_changed(tmp_path: Path) -> None:
    """Of a wrong size, for shards of which a tensor has moved, a head is tied and a weight is packed."""
    tensors = _write_sharded(tmp_path)
    content = json.loads((tmp_path / INDEX_NAME).read_text())
    tensors["layer.qweight"] = torch.ones(2, dtype=torch.int32)
    save_file({name: tensors[name] for name in (*list(tensors)[3:],)}, tmp_path / SHARDS[1])
    content["metadata"] = {"total_size": 7}
    content["weight_map"] |= {"scale": SHARDS[0], "lm_head.weight": SHARDS[1], "layer.weight": SHARDS[1]}
    (tmp_path / INDEX_NAME).write_text(json.dumps(content))
    _assert_reads(tmp_path, tensors)
    # All of its shards are others.
    content["weight_map"] = {name: f"model-00001-of-0000{4 + (name == 'up')}.safetensors" for name in tensors}
    (tmp_path / INDEX_NAME).write_text(json.dumps(content))
    _assert_reads(tmp_path, tensors)


def test_tensors_that_the_index_leaves_out_are_listed_too(tmp_path: Path) -> None:
    """Whether such a tensor is one too many, the model decides that loads it."""
    tensors = _write_sharded(tmp_path)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    del index["weight_map"]["up"]
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    _assert_reads(tmp_path, tensors)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tensors = _write_sharded(tmp_path)
    save_file({name: tensors[name] for name in ("embed", "scale", "counts", "none")}, tmp_path / SHARDS[1])
    message = _refusal(tmp_path)
    assert f"{SHARDS[1]}: tensor 'embed': is also in {SHARDS[0]}" in message


@pytest.mark.parametrize("cut", [0, 5, 40, -1, -30])
def test_a_truncated_file(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(10), "b": torch.ones(10)}, file)
    file.write_bytes(file.read_bytes()[:cut])
    message = _refusal(tmp_path)
    assert str(file) in message
    assert "truncated" in message
    if cut == -1:
        assert "tensor 'b'" in message


def _entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "its header is not JSON"),
        (b"[]", b"", "its header is not a JSON object"),
        ({"a": _entry("F7")}, b"12345678", "tensor 'a': has the unknown dtype 'F7'; known are: F64"),
        ({"a": _entry(["F32"])}, b"12345678", "tensor 'a': has the unknown dtype"),
        ({"a": _entry(shape=[2, -1])}, b"12345678", "tensor 'a': has the bad shape [2, -1]"),
        ({"a": _entry(shape=[True])}, b"12345678", "tensor 'a': has the bad shape"),
        ({"a": _entry(offsets=[0])}, b"12345678", "tensor 'a': has the bad data_offsets [0]"),
        ({"a": _entry(shape=[3])}, b"12345678", "tensor 'a': F32 [3] needs 12 bytes, its data_offsets give 8"),
        ({"a": 5}, b"12345678", "tensor 'a': its header entry is not"),
        (
            {"a": _entry(), "b": _entry(offsets=[4, 12])},
            b"123456789012",
            "tensor 'b': its data begins at 4 and overlaps",
        ),
        (
            {"a": _entry(), "b": _entry(offsets=[12, 20])},
            b"1" * 20,
            "tensor 'b': its data begins at 12 and leaves a gap",
        ),
        ({"a": _entry()}, b"1234567890", "holds 2 bytes after its last tensor"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"1234", "tensor 'a': is listed twice"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: dict[str, Any] | bytes, data: bytes, message: str) -> None:
    _write_raw(tmp_path / "model.safetensors", header, data)
    assert message in _refusal(tmp_path)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_of_the_head_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "model.safetensors"
    save_file(_tensors(), file)
    content = bytearray(file.read_bytes())
    head = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, head - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    try:
        with SafetensorsReader(file) as reader:
            for name, tensor in iterate(reader):
                assert isinstance(name, str)
                tensor.clone()
    except CheckpointError as error:
        assert str(file) in str(error)


def _lfs_pointer(directory: Path) -> None:
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda directory: (directory / "pytorch_model.bin").touch(), "is a pickle file; pickle files can run code"),
        (lambda directory: (directory / "model.pt").touch(), "is a pickle file"),
        (
            lambda directory: (directory / "config.json").touch(),
            "holds no *.safetensors file; is the download complete?",
        ),
        (lambda directory: (directory / "m.Q4_0.gguf").touch(), "give the path of a .gguf file in it: m.Q4_0.gguf"),
        (lambda directory: (directory / "consolidated.safetensors").touch(), "Mistral's own"),
        (lambda directory: (directory / "adapter_model.safetensors").touch(), "an adapter and not a model"),
        (_lfs_pointer, "git-lfs pointer"),
    ],
)
def test_directories_without_a_usable_model(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path)
    assert message in _refusal(tmp_path)


def test_several_files_that_are_no_shards(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    assert "several safetensors files and no model.safetensors.index.json: a.safetensors, b.safetensors" in _refusal(
        tmp_path
    )


def test_original_shards_beside_the_hugging_face_ones_are_left_alone(tmp_path: Path) -> None:
    tensors = _write_sharded(tmp_path)
    save_file({"tok_embeddings.weight": torch.ones(3)}, tmp_path / "consolidated.safetensors")
    _assert_reads(tmp_path, tensors)


def test_a_file_that_is_gone_when_it_is_read(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / "model.safetensors")
    with SafetensorsReader(tmp_path) as reader:
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="tensor 'up': cannot be read any more"):
            reader.read("up")
