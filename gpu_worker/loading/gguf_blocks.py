"""Decodes the tensor types of GGUF into float32, block by block, vectorised over all blocks of a tensor.

Every decoder takes the raw bytes as `[num_blocks, block_bytes]` uint8 and gives `[num_blocks, block_elements]` float32.
Layouts: ggml's `ggml-quants.h` (https://github.com/ggml-org/ggml). The order of the float operations is the
reference's, so results are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BlockDecoder = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One `ggml_type`: its number in the file, and how many elements share how many bytes."""

    name: str
    number: int
    block_elements: int
    block_bytes: int
    decode: BlockDecoder

    @property
    def is_packed(self) -> bool:
        """Whether elements share a block, or each stands for itself (floats)."""
        return self.block_elements > 1


def _half(blocks: Tensor, offset: int) -> Tensor:
    """The f16 at byte `offset` of every block, as float32."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()  # [num_blocks, 1]


def _nibbles(packed: Tensor) -> Tensor:
    """Low nibbles of all bytes first, high nibbles after them, along the last dimension."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _fields(packed: Tensor, bits: int) -> Tensor:
    """`[..., n]` bytes to `[..., 8 // bits, n]` fields: field 0 of all bytes, then field 1 of all bytes, and so on."""
    return torch.stack([(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], dim=-2)


def _decode_f32(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float32)


def _decode_f16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float16).float()


def _decode_bf16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.bfloat16).float()


def _decode_f64(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float64).float()


def _decode_q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _decode_q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _fifth_bits(packed: Tensor) -> Tensor:
    """`[num_blocks, 4]` bytes to `[num_blocks, 32]`: bit j of the little-endian word belongs to element j."""
    return torch.stack([(packed >> bit) & 1 for bit in range(8)], dim=-1).flatten(1)


def _decode_q5_0(blocks: Tensor) -> Tensor:
    levels = _nibbles(blocks[:, 6:]) | (_fifth_bits(blocks[:, 2:6]) << 4)  # [num_blocks, 32]
    return _half(blocks, 0) * (levels.float() - 16)


def _decode_q5_1(blocks: Tensor) -> Tensor:
    levels = _nibbles(blocks[:, 8:]) | (_fifth_bits(blocks[:, 4:8]) << 4)  # [num_blocks, 32]
    return _half(blocks, 0) * levels.float() + _half(blocks, 2)


def _decode_q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _decode_q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]  # [num_blocks, 16]: low nibble scale, high nibble minimum
    quants = _fields(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16).float()  # [num_blocks, 16, 16]
    step = _half(blocks, 80) * (scales & 15).float()
    minimum = _half(blocks, 82) * (scales >> 4).float()
    return (step[:, :, None] * quants - minimum[:, :, None]).flatten(1)


def _decode_q3_k(blocks: Tensor) -> Tensor:
    high_bit = _fields(blocks[:, :32], 1).reshape(-1, 16, 16)  # [num_blocks, 16, 16]
    quants = _fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    low = _nibbles(blocks[:, 96:104])  # [num_blocks, 16]
    high = _fields(blocks[:, 104:108], 2).flatten(1)  # [num_blocks, 16]
    step = _half(blocks, 108) * ((low | (high << 4)).float() - 32)
    # a clear bit means minus 4
    return (step[:, :, None] * (quants.float() - 4 * (1 - high_bit.float()))).flatten(1)


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 six-bit scales and 8 six-bit minima that Q4_K and Q5_K pack into 12 bytes, each `[num_blocks, 8]`."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    return scales.float(), minima.float()


def _apply_k_scales(blocks: Tensor, quants: Tensor) -> Tensor:
    """`quants` is `[num_blocks, 8, 32]`, with the steps, minima and packed scales in the first 16 bytes of a block."""
    scales, minima = _k_scales(blocks[:, 4:16])
    step = (_half(blocks, 0) * scales)[:, :, None]
    minimum = (_half(blocks, 2) * minima)[:, :, None]
    return (step * quants.float() - minimum).flatten(1)


def _decode_q4_k(blocks: Tensor) -> Tensor:
    return _apply_k_scales(blocks, _fields(blocks[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32))


def _decode_q5_k(blocks: Tensor) -> Tensor:
    low = _fields(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    high = _fields(blocks[:, 16:48], 1)  # [num_blocks, 8, 32]
    return _apply_k_scales(blocks, low | (high << 4))


def _decode_q6_k(blocks: Tensor) -> Tensor:
    low = _fields(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 8, 32)
    high = _fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 8, 32)
    quants = (low | (high << 4)).float() - 32
    step = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()  # [num_blocks, 16]
    return (step[:, :, None] * quants.reshape(-1, 16, 16)).flatten(1)


_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _look_up(levels: tuple[int, ...], codes: Tensor) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=codes.device)[codes.int()]


def _decode_iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _look_up(_IQ4_LEVELS, _nibbles(blocks[:, 2:]))


def _decode_iq4_xs(blocks: Tensor) -> Tensor:
    high = torch.stack([(blocks[:, 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)  # [num_blocks, 8]
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], dim=-1).flatten(1)  # [num_blocks, 8]
    step = _half(blocks, 0) * ((low | (high << 4)).float() - 32)
    codes = _nibbles(blocks[:, 8:].reshape(-1, 8, 16))  # [num_blocks, 8, 32]
    return (step[:, :, None] * _look_up(_IQ4_LEVELS, codes)).flatten(1)


def _decode_mxfp4(blocks: Tensor) -> Tensor:
    # 2^(e - 128): half of the e8m0 scale, as the table holds doubled values
    step = torch.ldexp(torch.ones_like(blocks[:, :1], dtype=torch.float32), blocks[:, :1].int() - 128)
    return step * _look_up(_E2M1_DOUBLED, _nibbles(blocks[:, 1:]))


def _decode_nvfp4(blocks: Tensor) -> Tensor:
    scales = blocks[:, :4]
    step = scales.contiguous().view(torch.float8_e4m3fn).float() * 0.5
    step = torch.where(
        (scales & 0x7F) == 0x7F, 0.0, step.abs()
    )  # the scales are unsigned; ggml reads the NaN code as 0
    codes = _nibbles(blocks[:, 4:].reshape(-1, 4, 8))  # [num_blocks, 4, 16]
    return (step[:, :, None] * _look_up(_E2M1_DOUBLED, codes)).flatten(1)


def _ternary(packed: Tensor, num_digits: int) -> Tensor:
    """`[num_blocks, n]` bytes that hold base-3 fractions to `[num_blocks, num_digits * n]` values in -1, 0, 1."""
    digits = [((packed * power).int() * 3) >> 8 for power in (1, 3, 9, 27, 81)[:num_digits]]  # uint8 wraps on purpose
    return torch.cat(digits, dim=1).float() - 1


def _decode_tq1_0(blocks: Tensor) -> Tensor:
    values = [_ternary(blocks[:, :32], 5), _ternary(blocks[:, 32:48], 5), _ternary(blocks[:, 48:52], 4)]
    return _half(blocks, 52) * torch.cat(values, dim=1)


def _decode_tq2_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 64) * (_fields(blocks[:, :64].reshape(-1, 2, 32), 2).reshape(-1, 256).float() - 1)


def _through_gguf_package(name: str) -> BlockDecoder:
    """The IQ1..IQ3 types index tables of thousands of vectors, which the `gguf` package carries."""

    def decode(blocks: Tensor) -> Tensor:
        try:
            from gguf import GGMLQuantizationType
            from gguf.quants import dequantize
        except ImportError as error:
            raise ModuleNotFoundError(
                f"decoding {name} needs the tables of the gguf package: pip install gguf", name="gguf"
            ) from error
        return torch.from_numpy(dequantize(blocks.cpu().numpy(), GGMLQuantizationType[name])).to(blocks.device)

    return decode


_ALL = [
    GgmlType("F32", 0, 1, 4, _decode_f32),
    GgmlType("F16", 1, 1, 2, _decode_f16),
    GgmlType("Q4_0", 2, 32, 18, _decode_q4_0),
    GgmlType("Q4_1", 3, 32, 20, _decode_q4_1),
    GgmlType("Q5_0", 6, 32, 22, _decode_q5_0),
    GgmlType("Q5_1", 7, 32, 24, _decode_q5_1),
    GgmlType("Q8_0", 8, 32, 34, _decode_q8_0),
    GgmlType("Q2_K", 10, 256, 84, _decode_q2_k),
    GgmlType("Q3_K", 11, 256, 110, _decode_q3_k),
    GgmlType("Q4_K", 12, 256, 144, _decode_q4_k),
    GgmlType("Q5_K", 13, 256, 176, _decode_q5_k),
    GgmlType("Q6_K", 14, 256, 210, _decode_q6_k),
    GgmlType("IQ2_XXS", 16, 256, 66, _through_gguf_package("IQ2_XXS")),
    GgmlType("IQ2_XS", 17, 256, 74, _through_gguf_package("IQ2_XS")),
    GgmlType("IQ3_XXS", 18, 256, 98, _through_gguf_package("IQ3_XXS")),
    GgmlType("IQ1_S", 19, 256, 50, _through_gguf_package("IQ1_S")),
    GgmlType("IQ4_NL", 20, 32, 18, _decode_iq4_nl),
    GgmlType("IQ3_S", 21, 256, 110, _through_gguf_package("IQ3_S")),
    GgmlType("IQ2_S", 22, 256, 82, _through_gguf_package("IQ2_S")),
    GgmlType("IQ4_XS", 23, 256, 136, _decode_iq4_xs),
    GgmlType("F64", 28, 1, 8, _decode_f64),
    GgmlType("IQ1_M", 29, 256, 56, _through_gguf_package("IQ1_M")),
    GgmlType("BF16", 30, 1, 2, _decode_bf16),
    GgmlType("TQ1_0", 34, 256, 54, _decode_tq1_0),
    GgmlType("TQ2_0", 35, 256, 66, _decode_tq2_0),
    GgmlType("MXFP4", 39, 32, 17, _decode_mxfp4),
    GgmlType("NVFP4", 40, 64, 36, _decode_nvfp4),
]

GGML_TYPES = {ggml_type.number: ggml_type for ggml_type in _ALL}
"""Types that hold weights, by their number in the file. Integer types and withdrawn ones are not among them."""


def decode_rows(raw: Tensor, ggml_type: GgmlType) -> Tensor:
    """`[num_rows, row_bytes]` uint8 to `[num_rows, row_elements]` float32."""
    num_rows, row_bytes = raw.shape
    blocks = raw.reshape(-1, ggml_type.block_bytes)  # [num_blocks, block_bytes]
    return ggml_type.decode(blocks).reshape(num_rows, row_bytes // ggml_type.block_bytes * ggml_type.block_elements)


@dataclass(frozen=True, slots=True)
class BlockCodes:
    """A matrix of blocks as codes and scales, nothing rounded: for kernels that keep weights packed.

    W[n, k] = scale * (codes[n, k] - offset) - minimum, where a K-type has two levels of each:
    scale = outer_scales[n, k // 256] * scales[n, k // group_size].
    """

    codes: Tensor  # uint8 [N, K]
    scales: Tensor  # float16 or 8-bit integers [N, K / group_size]; e8m0 exponents for e2m1 codes
    group_size: int
    bits: int
    offset: int = 0
    minima: Tensor | None = None
    outer_scales: Tensor | None = None  # float16 [N, K / 256]
    outer_minima: Tensor | None = None
    is_e2m1: bool = False


def _raw_half(blocks: Tensor, offset: int) -> Tensor:
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16)  # [num_blocks, 1]


def codes_of(raw: Tensor, ggml_type: GgmlType) -> BlockCodes | None:
    """`[N, row_bytes]` uint8 as codes and scales; None for a type that no kernel reads."""
    num_rows = raw.shape[0]
    blocks = raw.reshape(-1, ggml_type.block_bytes)

    def rows(values: Tensor) -> Tensor:
        return values.reshape(num_rows, -1)

    match ggml_type.name:
        case "Q4_0":
            return BlockCodes(rows(_nibbles(blocks[:, 2:])), rows(_raw_half(blocks, 0)), 32, 4, offset=8)
        case "Q4_1":
            codes, lowest = _nibbles(blocks[:, 4:]), -_raw_half(blocks, 2)
            return BlockCodes(rows(codes), rows(_raw_half(blocks, 0)), 32, 4, minima=rows(lowest))
        case "Q5_0":
            codes = _nibbles(blocks[:, 6:]) | (_fifth_bits(blocks[:, 2:6]) << 4)
            return BlockCodes(rows(codes), rows(_raw_half(blocks, 0)), 32, 5, offset=16)
        case "Q5_1":
            codes, lowest = _nibbles(blocks[:, 8:]) | (_fifth_bits(blocks[:, 4:8]) << 4), -_raw_half(blocks, 2)
            return BlockCodes(rows(codes), rows(_raw_half(blocks, 0)), 32, 5, minima=rows(lowest))
        case "Q8_0":
            codes = (blocks[:, 2:].view(torch.int8).short() + 128).to(torch.uint8)
            return BlockCodes(rows(codes), rows(_raw_half(blocks, 0)), 32, 8, offset=128)
        case "Q4_K" | "Q5_K":
            return _k_codes(blocks, ggml_type.name, num_rows)
        case "Q6_K":
            low = _fields(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 256)
            high = _fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
            scales = blocks[:, 192:208].contiguous().view(torch.int8)
            return BlockCodes(
                rows(low | (high << 4)), rows(scales), 16, 6, offset=32, outer_scales=rows(_raw_half(blocks, 208))
            )
        case "MXFP4":
            return BlockCodes(rows(_nibbles(blocks[:, 1:])), rows(blocks[:, :1]), 32, 4, is_e2m1=True)
        case _:
            return None


def _k_codes(blocks: Tensor, name: str, num_rows: int) -> BlockCodes:
    """Q4_K and Q5_K: steps and minima of 6 bits under two halves a block."""
    scales, minima = _k_scales(blocks[:, 4:16])
    first_nibbles = 16 if name == "Q4_K" else 48
    codes = _fields(blocks[:, first_nibbles:].reshape(-1, 4, 32), 4).reshape(-1, 256)
    if name == "Q5_K":
        codes = codes | (_fields(blocks[:, 16:48], 1).reshape(-1, 256) << 4)
    return BlockCodes(
        codes.reshape(num_rows, -1),
        scales.to(torch.uint8).reshape(num_rows, -1),
        32,
        4 if name == "Q4_K" else 5,
        minima=minima.to(torch.uint8).reshape(num_rows, -1),
        outer_scales=_raw_half(blocks, 0).reshape(num_rows, -1),
        outer_minima=_raw_half(blocks, 2).reshape(num_rows, -1),
    )
