"""Weights of a few bits a number, in the order in which matrix units take them.

One layout for every format that gives a group of inputs a scale (GPTQ, AWQ, compressed-tensors, GGUF blocks, NVFP4,
MXFP4; `gpu_worker.quant.repack` brings them here):

    W[n, k] = row_scale[n] * (scale[g, n] * value(code[n, k]) - minimum[g, n]),    g = k // group_size

    value:    code - offset, or the e2m1 float of a code, doubled
    scale:    scales[g, n], times outer_scales[k // 256, n] where a format has two levels
    minimum:  scale * zeros[g, n], or minima[g, n] times outer_minima[k // 256, n]

`words` int32 [ceil(N / 16), tiles, 128]: a tile is 16 rows by 64 inputs, one behind another along the inputs. Word
`lane * 4 + h * 2 + r` of a tile belongs to row `8 * r + lane // 4`, and its field (f, p), the 4 bits from bit `4 * f +
16 * p` on, to input `16 * f + 8 * h + 2 * (lane % 4) + p`. So each of 32 threads reads 16 bytes, which hold just the
numbers that it contributes to four products of a 16 x 16 tile; one shift and one mask leave two of them in the halves
of a word, as the left operand has them, and nothing goes through shared memory. Codes of more than 4 bits have the
upper ones in `high_words` of the same shape (int8, int16 or int32 for 1, 2 or 4 bits): a second product of the same
inputs, field (f, p) from bit `high_bits * (f + 4 * p)` on. The number of tiles is even; what lies beyond N or K is
zero.

Source of the fragments' order: PTX ISA, "Matrix Fragments for mma.m16n8k16". A half word that holds a code below an
exponent is the float `magic + code`: Kim et al., "Who Says Elephants Can't Run", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

OUTER_GROUP = 256
TILE_ROWS, TILE_INPUTS, TILE_WORDS = 16, 64, 128
# Products are begun for two tiles at a time.
ALIGN_INPUTS = 2 * TILE_INPUTS

# Two floats whose lowest mantissa bits are codes: bfloat16 128 + code and 2048 + 16 * code, float16 1024 + code and
# 16384 + 16 * code.
MAGIC_BITS = {torch.bfloat16: 0x43004300, torch.float16: 0x64006400, torch.float32: 0}
MAGIC_VALUES = {torch.bfloat16: (128, 2048), torch.float16: (1024, 16384), torch.float32: (0, 0)}
# The bits of an e2m1 float moved to a float's sign, lowest exponent bits and highest mantissa bit mean it times
# 2^-126 in bfloat16 and 2^-14 in float16. In bfloat16 the inputs are scaled as well, to stay among normal floats.
BF16_E2M1_INPUT_SCALE, BF16_E2M1_SCALE, FP16_E2M1_SCALE = 2.0**96, 2.0**31, 2.0**15


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] in the layout of this file. Tensors that a format lacks are None.

    Several weights of one shape and format can be one: every tensor then has a leading dimension, the expert.
    """

    words: torch.Tensor  # int32 [N / 16, tiles, 128]
    high_words: torch.Tensor | None  # int8, int16 or int32, shaped like words
    scales: torch.Tensor  # float16, bfloat16, float32, float8_e4m3fn, int8, or uint8 exponents (`exponents`), [G, N]
    zeros: torch.Tensor | None  # uint8 [G, N]: times the scale
    minima: torch.Tensor | None  # any type of scales [G, N]
    outer_scales: torch.Tensor | None  # float16 [K / 256, N]
    outer_minima: torch.Tensor | None  # float16 [K / 256, N]
    row_scales: torch.Tensor | None  # float32 [N]
    num_inputs: int
    group_size: int
    """16, or a multiple of 32 that divides 128 or is a multiple of it; at least 2^25: one group for all."""
    high_bits: int = 0
    offset: int = 0
    is_e2m1: bool = False
    exponents: bool = False

    @property
    def num_outputs(self) -> int:
        return self.scales.shape[-1]

    @property
    def num_tiles(self) -> int:
        return self.words.shape[-2]

    @property
    def has_minimum(self) -> bool:
        """Whether codes have something subtracted from them."""
        return bool(self.offset) or self.zeros is not None or self.minima is not None

    def tensors(self) -> list[torch.Tensor]:
        return [value for value in vars(self).values() if isinstance(value, torch.Tensor)]

    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


def weight_format(weight: PackedWeight) -> str:
    """What tables of launch shapes call a format: the number of bits, or e2m1, and the group size."""
    return f"{'e2m1' if weight.is_e2m1 else f'int{4 + weight.high_bits}'}-g{weight.group_size}"


def pack_fields(codes: torch.Tensor, field_bits: int, dtype: torch.dtype) -> torch.Tensor:
    """codes uint8 [..., N, K] of `field_bits` -> `dtype` [..., N / 16, tiles, 128], see the top of this file."""
    *leading, n, k = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -k % ALIGN_INPUTS, 0, -n % TILE_ROWS))
    # [..., blocks, r, g, tiles, f, h, t, p]
    split = padded.reshape(*leading, -1, 2, 8, padded.shape[-1] // TILE_INPUTS, 4, 2, 4, 2)
    at = len(leading)
    order = [at + axis for axis in (0, 3, 2, 6, 5, 1, 4, 7)]
    fields = split.permute(*range(at), *order)  # [..., blocks, tiles, g, t, h, r, f, p]
    half = 16 if field_bits == 4 else 4 * field_bits
    words = torch.zeros(fields.shape[:-2], dtype=torch.int32, device=codes.device)
    for f in range(4):
        for p in range(2):
            words |= fields[..., f, p].to(torch.int32) << (field_bits * f + half * p)
    return words.flatten(-4).to(dtype)  # the narrow types wrap around, which keeps the bits


def unpack_fields(words: torch.Tensor, field_bits: int) -> torch.Tensor:
    """The inverse: int32 [..., N / 16 * 16, tiles * 64]."""
    half = 16 if field_bits == 4 else 4 * field_bits
    shifts = torch.tensor([[field_bits * f + half * p for p in range(2)] for f in range(4)], device=words.device)
    wide = words.int().unflatten(-1, (8, 4, 2, 2))  # [..., blocks, tiles, g, t, h, r]
    fields = (wide[..., None, None] >> shifts.int()) & ((1 << field_bits) - 1)  # [..., f, p]
    at = words.ndim - 3
    order = [at + axis for axis in (0, 5, 2, 1, 6, 4, 3, 7)]
    codes = fields.permute(*range(at), *order)  # [..., blocks, r, g, tiles, f, h, t, p]
    return codes.flatten(at + 3).flatten(at, at + 2)


def unpack(weight: PackedWeight) -> torch.Tensor:
    """The twin's weight: float64 [N, K], by the formula at the top."""
    n, k = weight.num_outputs, weight.num_inputs
    codes = unpack_fields(weight.words, 4)
    if weight.high_words is not None:
        codes = codes | (unpack_fields(weight.high_words, weight.high_bits) << 4)
    codes = codes[..., :n, :k]
    values = codes.double() - weight.offset
    if weight.is_e2m1:
        magnitudes = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12], dtype=torch.float64, device=codes.device)
        values = magnitudes[(codes & 7).long()] * torch.where(codes & 8 > 0, -1.0, 1.0).double()
    inputs = torch.arange(k, device=codes.device)
    groups, outer = inputs // weight.group_size, inputs // OUTER_GROUP

    def by_input(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return values.double()[..., index, :].mT  # [..., N, K]

    raw = torch.exp2(weight.scales.double() - 127) if weight.exponents else weight.scales
    scales = by_input(raw, groups)
    minima = torch.zeros_like(scales)
    if weight.outer_scales is not None:
        scales = scales * by_input(weight.outer_scales, outer)
    if weight.zeros is not None:
        minima = scales * by_input(weight.zeros, groups)
    if weight.minima is not None:
        minima = by_input(weight.minima, groups)
        if weight.outer_minima is not None:
            minima = minima * by_input(weight.outer_minima, outer)
    dense = scales * values - minima
    return dense if weight.row_scales is None else dense * weight.row_scales.double()[..., None]


@triton.jit
def halves(pairs, X: tl.constexpr):
    """The two X (16 bits) in each int32, in a last dimension."""
    low = pairs.to(tl.int16).to(X, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(X, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _e2m1_in_float32(code):
    # Magnitudes 0 1 2 3 4 6 8 12, doubled to be integers, as digits of one constant (0xC8643210).
    magnitude = (-0x379BCDF0 >> ((code & 7) * 4)) & 15
    return tl.where((code & 8) != 0, -magnitude, magnitude).to(tl.float32)


@triton.jit
def low_pairs(words, F: tl.constexpr, magic, IS_E2M1: tl.constexpr, X: tl.constexpr):
    """Field F of int32 words as values of X, both halves in a last dimension.

    `magic` (`magic_bits`) is an argument of the kernel: with two constants the mask and the exponent would be two
    instructions instead of one.
    """
    # A branch not taken is not compiled; what follows a return in one would be.
    if tl.float32 == X:
        low = (words >> (4 * F)) & 15
        high = (words >> (4 * F + 16)) & 15
        if IS_E2M1:
            values = tl.join(_e2m1_in_float32(low), _e2m1_in_float32(high))
        else:
            values = tl.join(low.to(tl.float32), high.to(tl.float32))
    elif IS_E2M1:
        sign = (words << (12 - 4 * F)) & -0x7FFF8000
        UP: tl.constexpr = (6 if tl.bfloat16 == X else 9) - 4 * F
        rest = words << UP if UP >= 0 else words >> -UP
        rest = rest & (0x01C001C0 if tl.bfloat16 == X else 0x0E000E00)
        values = halves(sign | rest, X)
    else:
        values = halves(((words >> (4 * F)) & 0x000F000F) | magic, X)
    return values


@triton.jit
def spread_high(high, HIGH_BITS: tl.constexpr):
    """High words as int32, the fields of p = 1 in the upper half."""
    wide = high.to(tl.int32)
    if HIGH_BITS == 2:
        wide = (wide & 0xFF) | ((wide & 0xFF00) << 8)
    if HIGH_BITS == 1:
        wide = (wide & 0xF) | ((wide & 0xF0) << 12)
    return wide


@triton.jit
def high_pairs(wide, F: tl.constexpr, HIGH_BITS: tl.constexpr, magic, X: tl.constexpr):
    """Field F of spread high words, times 16, as values of X: as `low_pairs`."""
    # The exponent of 16 times as much.
    STEP: tl.constexpr = 0x02000200 if tl.bfloat16 == X else 0x10001000
    MASK: tl.constexpr = (1 << HIGH_BITS) - 1
    if tl.float32 == X:
        low = (wide >> (HIGH_BITS * F)) & MASK
        high = (wide >> (HIGH_BITS * F + 16)) & MASK
        values = tl.join((low * 16).to(tl.float32), (high * 16).to(tl.float32))
    else:
        bits = (wide >> (HIGH_BITS * F)) & (MASK * 0x10001)
        values = halves(bits | (magic + STEP), X)
    return values


@triton.jit
def scale_and_minimum(
    scales_ptr,
    zeros_ptr,
    minima_ptr,
    outer_scales_ptr,
    outer_minima_ptr,
    at,
    outer_at,
    mask,
    OFFSET: tl.constexpr,
    MAGIC: tl.constexpr,
    EXPONENTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    HAS_OUTER: tl.constexpr,
):
    """A group's scale, and what it subtracts: for values that are `MAGIC` more than the code. float32, like `at`."""
    raw = tl.load(scales_ptr + at, mask=mask)  # rows beyond the weight stay undefined: they are not stored
    if EXPONENTS:  # noqa: SIM108
        scale = (raw.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    else:
        scale = raw.to(tl.float32)
    if HAS_OUTER:
        scale *= tl.load(outer_scales_ptr + outer_at, mask=mask, other=0.0).to(tl.float32)
    minimum = scale * (OFFSET + MAGIC)
    if HAS_ZEROS:
        minimum += scale * tl.load(zeros_ptr + at, mask=mask, other=0).to(tl.float32)
    if HAS_MINIMA:
        low = tl.load(minima_ptr + at, mask=mask, other=0).to(tl.float32)
        if HAS_OUTER:
            low *= tl.load(outer_minima_ptr + outer_at, mask=mask, other=0.0).to(tl.float32)
        minimum += low
    return scale, minimum
