"""GGUF files that are damaged, and the message for each."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_worker.loading.gguf_file import GgufFile
from gpu_worker.loading.tensor_source import CheckpointError
from tests.unit.gpu_worker.loading.synthetic_gguf import write_gguf


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.gguf"
    write_gguf(path)
    return path


def _damage(good: Path, find: bytes, offset: int, replacement: bytes) -> Path:
    """Overwrites bytes `offset` after the end of the first occurrence of `find`."""
    content = bytearray(good.read_bytes())
    start = content.index(find) + len(find) + offset
    content[start : start + len(replacement)] = replacement
    path = good.with_name("damaged.gguf")
    path.write_bytes(content)
    return path


def test_agrees_with_the_gguf_package_on_a_real_file(smollm2_gguf: Path, smollm2_gguf_reader: gguf.GGUFReader) -> None:
    reference = smollm2_gguf_reader
    with GgufFile(smollm2_gguf) as ours:
        assert set(ours.metadata) == {name for name in reference.fields if not name.startswith("GGUF.")}
        for name, value in ours.metadata.items():
            expected = reference.fields[name].contents()
            assert value == (pytest.approx(expected) if isinstance(value, float) else expected)
        assert set(ours.tensors) == {tensor.name for tensor in reference.tensors}
        for tensor in reference.tensors:
            assert ours.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
            assert ours.tensors[tensor.name].offset == tensor.data_offset
            assert ours.tensors[tensor.name].num_bytes == tensor.n_bytes
        assert ours.metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-05


def test_reads_rows(good: Path) -> None:
    tensors = write_gguf(good)
    with GgufFile(good) as file:
        raw = file.read_rows("blk.1.ffn_up.weight", 5, 9)
        assert np.array_equal(raw.numpy().view(np.float32), tensors["blk.1.ffn_up.weight"][5:9])
        assert file.read_rows("blk.1.ffn_up.weight", 5, 5).shape == (0, 64 * 4)
        with pytest.raises(IndexError, match=r"96 rows, asked for 90 to 97"):
            file.read_rows("blk.1.ffn_up.weight", 90, 97)


@pytest.mark.parametrize(
    ("find", "offset", "replacement", "message"),
    [
        (b"", 0, b"GGML", r"no GGUF file: it begins with b'GGML'"),
        (b"GGUF", 0, struct.pack("<I", 1), r"version 1; versions 2 and 3 are read"),
        (b"GGUF", 0, struct.pack(">I", 3), r"big-endian"),
        (b"GGUF", 4, struct.pack("<Q", 2**60), r"claims 1,152,921,504,606,846,976 tensors"),
        (b"GGUF", 12, struct.pack("<Q", 2**40), r"too many for"),
        (b"llama.context_length", 0, struct.pack("<I", 99), r"'llama.context_length' has the unknown type 99"),
        (b"tokenizer.ggml.tokens", 8, struct.pack("<Q", 2**50), r"'tokenizer.ggml.tokens' claims .* strings"),
        (b"blk.0.attn_k.weight", 0, struct.pack("<I", 7), r"tensor 'blk.0.attn_k.weight': has 7 dimensions"),
        (b"blk.0.attn_k.weight", 4, struct.pack("<Q", 2**45), r"tensor 'blk.0.attn_k.weight'.*truncated"),
        (b"blk.0.attn_k.weight", 4, struct.pack("<Q", 0), r"tensor 'blk.0.attn_k.weight': has the shape \[32, 0\]"),
        (b"blk.0.attn_k.weight", 20, struct.pack("<I", 777), r"'blk.0.attn_k.weight': is of the unknown type 777"),
        (b"blk.0.attn_k.weight", 20, struct.pack("<I", 12), r"'blk.0.attn_k.weight'.*not whole Q4_K blocks of 256"),
        (b"blk.0.attn_k.weight", 24, struct.pack("<Q", 2**44), r"'blk.0.attn_k.weight'.*the file is truncated"),
        (b"blk.0.attn_k.weight", 24, struct.pack("<Q", 33), r"'blk.0.attn_k.weight'.*33 is not a multiple"),
        (b"blk.0.attn_k.weight", 24, struct.pack("<Q", 0), r"overlaps"),
        (b"blk.0.attn_", -1, b"\xff", r"not UTF-8"),
    ],
)
def test_damage_is_named(good: Path, find: bytes, offset: int, replacement: bytes, message: str) -> None:
    damaged = _damage(good, find, offset, replacement)
    with pytest.raises(CheckpointError, match=message) as caught:
        GgufFile(damaged)
    assert str(caught.value).startswith(str(damaged))
    assert "\n" not in str(caught.value)


def test_a_name_that_is_there_twice(good: Path) -> None:
    damaged = _damage(good, b"blk.0.attn_", 0, b"q")  # attn_norm or attn_k becomes another attn_q
    with pytest.raises(CheckpointError, match=r"tensor 'blk.0.attn_q\w*.weight'|no such|twice"):
        damaged.write_bytes(damaged.read_bytes().replace(b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"))
        GgufFile(damaged)


def test_a_truncated_file_names_the_first_tensor_that_is_cut(good: Path) -> None:
    content = good.read_bytes()
    last = max(gguf.GGUFReader(good).tensors, key=lambda tensor: tensor.data_offset)
    cut = good.with_name("cut.gguf")
    cut.write_bytes(content[: int(last.data_offset) + 16])
    with pytest.raises(CheckpointError, match=rf"tensor '{last.name}': the file is truncated"):
        GgufFile(cut)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_and_any_flipped_byte_of_the_head_is_refused_or_harmless(good: Path, data: st.DataObject) -> None:
    content = bytearray(good.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, 4000))] ^= data.draw(st.integers(1, 255))
    path = good.with_name("fuzzed.gguf")
    path.write_bytes(content)
    try:
        with GgufFile(path) as file:
            for name in file.tensors:
                file.read_rows(name)
    except CheckpointError as error:
        assert str(path) in str(error)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        GgufFile(tmp_path / "none.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        GgufFile(tmp_path / "empty.gguf")


def test_a_model_in_several_files_reads_as_in_one(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    write_gguf(tmp_path / "m.gguf", split_max_tensors=8)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert [part.name for part in parts] == [f"m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    with GgufFile(tmp_path / "whole.gguf") as whole, GgufFile(parts[0]) as split:
        assert split.parts == parts
        assert set(split.tensors) == set(whole.tensors)
        assert all(torch.equal(split.read_rows(name), whole.read_rows(name)) for name in whole.tensors)


def test_parts_that_make_no_whole(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", split_max_tensors=8)
    first, second, third = sorted(tmp_path.glob("m-*.gguf"))
    with pytest.raises(CheckpointError, match=r"part 2 of a model in 3 files; give the first of them: m-00001-of"):
        GgufFile(second)
    copied = tmp_path / "renamed.gguf"
    copied.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"its name does not say so.*00001-of-00003"):
        GgufFile(copied)
    content = third.read_bytes()
    third.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match="part 2 of 3, its name says another"):
        GgufFile(first)
    third.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf.*truncated"):
        GgufFile(first)
    third.unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf.*this part \(3 of 3\) does not exist"):
        GgufFile(first)


def test_a_file_that_shrinks_after_it_was_opened(good: Path) -> None:
    with GgufFile(good) as file:
        name = list(file.tensors)[-1]
        with good.open("r+b") as stream:
            stream.truncate(file.tensors[name].offset + 8)
        with pytest.raises(CheckpointError, match=rf"{name}.*did the file change"):
            file.read_rows(name)
