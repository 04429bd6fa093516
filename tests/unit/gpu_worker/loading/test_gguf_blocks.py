"""Every block format against the `gguf` package's own decoder, to the last bit, on arbitrary bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.loading.gguf_blocks import GGML_TYPES, GgmlType, decode_rows

DECODED = [ggml_type for ggml_type in GGML_TYPES.values() if ggml_type.name not in ("F64", "F32", "F16")]


def _assert_same_bits(ours: torch.Tensor, reference: np.ndarray) -> None:
    assert ours.dtype == torch.float32
    assert tuple(ours.shape) == reference.shape
    a, b = ours.numpy(), reference.astype(np.float32)
    same = (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))
    assert same.all(), f"{(~same).sum()} of {same.size} values differ, first at {np.argwhere(~same)[0]}"


def _raw_rows(ggml_type: GgmlType, random: np.random.Generator, num_rows: int, blocks_per_row: int) -> np.ndarray:
    raw = random.integers(0, 256, (num_rows, blocks_per_row, ggml_type.block_bytes), dtype=np.uint8)
    if ggml_type.name == "NVFP4":
        raw[..., :4] &= 0x7F  # its scales have no sign
    return raw.reshape(num_rows, -1)


@pytest.mark.parametrize("ggml_type", DECODED, ids=lambda ggml_type: ggml_type.name)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 9), blocks_per_row=st.integers(1, 4))
def test_decodes_arbitrary_bytes_as_the_gguf_package_does(
    ggml_type: GgmlType, seed: int, num_rows: int, blocks_per_row: int
) -> None:
    raw = _raw_rows(ggml_type, np.random.default_rng(seed), num_rows, blocks_per_row)
    with np.errstate(all="ignore"):
        reference = dequantize(raw, GGMLQuantizationType(ggml_type.number))
        ours = decode_rows(torch.from_numpy(raw), ggml_type)
    _assert_same_bits(ours, reference)


def test_every_type_that_the_gguf_package_decodes_is_known_with_its_block_size() -> None:
    from gguf import quants

    decodable = {quantization.name for quantization in quants._type_traits}
    assert decodable <= {ggml_type.name for ggml_type in GGML_TYPES.values()}
    for number, ggml_type in GGML_TYPES.items():
        assert GGMLQuantizationType(number).name == ggml_type.name
        assert GGML_QUANT_SIZES[GGMLQuantizationType(number)] == (ggml_type.block_elements, ggml_type.block_bytes)


@pytest.mark.parametrize(("name", "dtype"), [("F32", np.float32), ("F16", np.float16), ("F64", np.float64)])
def test_plain_floats(name: str, dtype: type) -> None:
    values = np.random.default_rng(1).standard_normal((3, 8)).astype(dtype)
    ggml_type = next(ggml_type for ggml_type in GGML_TYPES.values() if ggml_type.name == name)
    _assert_same_bits(decode_rows(torch.from_numpy(values.view(np.uint8)), ggml_type), values.astype(np.float32))
