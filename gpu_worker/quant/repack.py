"""Brings group-scaled weights into the one layout that `stepwire_kernels.packed_linear` multiplies by.

Nothing is rounded: codes, scales and minima are those of the checkpoint, in its own element types.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from stepwire_kernels.packed_linear import PackedWeight

from gpu_worker.loading.gguf_blocks import codes_of
from gpu_worker.quant.weights import AffineWeight, Float4Weight, GgufWeight, QuantizedWeight

PLANE, SMALL_PLANE = 32, 16
SMALL_GROUP = 16


@dataclass(frozen=True, slots=True)
class Repacked:
    """`order`: input k of the packed weight is input order[k] of the linear (one past the last: nothing); None: k."""

    weight: PackedWeight
    order: torch.Tensor | None = None  # int64 [K of the packed weight]


def repack(weight: QuantizedWeight) -> Repacked | None:
    """The kernel's layout; None where a form or size has none."""
    if isinstance(weight, AffineWeight):
        return _repack_affine(weight)
    if isinstance(weight, Float4Weight):
        return _repack_float4(weight)
    if isinstance(weight, GgufWeight):
        return _repack_gguf(weight)
    return None


def _narrowest(values: torch.Tensor) -> torch.Tensor:
    """float32 in 16 bits where that loses nothing."""
    for dtype in (torch.float16, torch.bfloat16):
        narrow = values.to(dtype)
        if torch.equal(narrow.float(), values):
            return narrow
    return values


def _tiles(codes: torch.Tensor, field_bits: int, per_word: int, plane: int, dtype: torch.dtype) -> torch.Tensor:
    """codes uint8 [N, K] -> `dtype` [tiles, N, plane], `per_word` codes of `field_bits` in each element."""
    width = plane * per_word
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % width))
    fields = padded.unflatten(1, (-1, per_word, plane))  # [N, tiles, per_word, plane]
    words = torch.zeros(fields.shape[1], codes.shape[0], plane, dtype=torch.int32, device=codes.device)
    for field in range(per_word):
        words |= fields[:, :, field].transpose(0, 1).to(torch.int32) << (field * field_bits)
    return words.to(dtype)  # the narrow types wrap around, which keeps the bits


def _by_group(values: torch.Tensor, group_size: int, num_inputs: int, tile_inputs: int) -> torch.Tensor:
    """[N, G] -> [G', N], with groups of zeros up to the end of the last tile."""
    num_groups = -(-(-(-num_inputs // tile_inputs) * tile_inputs) // group_size)
    # float8 knows no zero padding: through its bytes.
    raw = values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values
    padded = torch.nn.functional.pad(raw, (0, num_groups - values.shape[1])).t().contiguous()
    return padded.view(values.dtype)


def _kernel_group(group_size: int, num_inputs: int, plane: int) -> int | None:
    """The group size as the kernel counts: a power of two of planes; one group for all inputs is a large one."""
    if group_size >= num_inputs:
        return plane * (1 << 20)
    planes = group_size // plane
    return group_size if planes * plane == group_size and planes & (planes - 1) == 0 else None


def _repack_affine(weight: AffineWeight) -> Repacked | None:
    if weight.bits not in (2, 3, 4, 8):
        return None
    bits = 8 if weight.bits == 8 else 4
    order = None
    if weight.groups is not None:
        weight, order = _regular(weight)
    plane = SMALL_PLANE if weight.group_size == SMALL_GROUP else PLANE
    num_inputs, per_word = weight.num_inputs, 32 // bits
    group_size = _kernel_group(weight.group_size, num_inputs, plane)
    if group_size is None:
        return None
    tile = plane * per_word
    one_zero = weight.zeros.numel() == 1 or bool((weight.zeros == weight.zeros.flatten()[0]).all())
    packed = PackedWeight(
        words=_tiles(weight.codes, bits, per_word, plane, torch.int32),
        high_words=None,
        scales=_by_group(_narrowest(weight.scales.float()), group_size, num_inputs, tile),
        zeros=None if one_zero else _by_group(weight.zeros, group_size, num_inputs, tile),
        minima=None,
        outer_scales=None,
        outer_minima=None,
        row_scales=None,
        num_inputs=num_inputs,
        group_size=group_size,
        bits=bits,
        offset=int(weight.zeros.flatten()[0]) if one_zero else 0,
    )
    return Repacked(packed, order)


def _regular(weight: AffineWeight) -> tuple[AffineWeight, torch.Tensor]:
    """Act-order: inputs sorted by group. Groups of other lengths (a share of the inputs holds any part of each) are
    filled up to whole planes, and every plane gets its group's scale."""
    groups = weight.group_of_input()
    order = torch.argsort(groups, stable=True)
    counts = torch.bincount(groups, minlength=weight.scales.shape[1])
    zeros = weight.zeros.expand(weight.scales.shape)
    if bool((counts == weight.group_size).all()):
        return AffineWeight(weight.codes[:, order], zeros, weight.scales, weight.group_size, weight.bits), order
    filled = -(-counts // PLANE) * PLANE
    ends = filled.cumsum(0)
    num_inputs = weight.num_inputs
    padded = torch.full((int(ends[-1]),), num_inputs, device=groups.device)
    rank_in_group = torch.arange(num_inputs, device=groups.device) - (counts.cumsum(0) - counts)[groups[order]]
    padded[(ends - filled)[groups[order]] + rank_in_group] = order
    codes = torch.nn.functional.pad(weight.codes, (0, 1))[:, padded]
    of_plane = torch.repeat_interleave(torch.arange(len(counts), device=groups.device), filled // PLANE)
    return AffineWeight(codes, zeros[:, of_plane], weight.scales[:, of_plane], PLANE, weight.bits), padded


def _repack_float4(weight: Float4Weight) -> Repacked:
    codes = torch.stack((weight.packed & 15, weight.packed >> 4), dim=-1).flatten(1)  # [N, K]
    plane = SMALL_PLANE if weight.group_size == SMALL_GROUP else PLANE
    tile = plane * 8
    packed = PackedWeight(
        words=_tiles(codes, 4, 8, plane, torch.int32),
        high_words=None,
        scales=_by_group(weight.scales, weight.group_size, weight.num_inputs, tile),
        zeros=None,
        minima=None,
        outer_scales=None,
        outer_minima=None,
        row_scales=(0.5 / weight.row_divisors).contiguous(),  # the kernel's e2m1 values are doubled
        num_inputs=weight.num_inputs,
        group_size=weight.group_size,
        bits=4,
        is_e2m1=True,
        exponents=weight.scales.dtype == torch.uint8,
    )
    return Repacked(packed)


def _repack_gguf(weight: GgufWeight) -> Repacked | None:
    parts = codes_of(weight.blocks, weight.ggml_type)
    if parts is None:
        return None
    num_inputs = weight.num_inputs
    plane = SMALL_PLANE if parts.group_size == SMALL_GROUP else PLANE
    bits = 8 if parts.bits == 8 else 4
    per_word = 32 // bits
    tile = plane * per_word
    high_bits = parts.bits - 4 if 4 < parts.bits < 8 else 0

    def grouped(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else _by_group(values, parts.group_size, num_inputs, tile)

    def outer(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values.t().contiguous()

    high_words = None
    if high_bits:
        narrow = torch.int8 if high_bits * per_word <= 8 else torch.int16
        high_words = _tiles(parts.codes >> 4, high_bits, per_word, plane, narrow)
    scales = grouped(parts.scales)
    assert scales is not None
    packed = PackedWeight(
        words=_tiles(parts.codes & 15 if high_bits else parts.codes, bits, per_word, plane, torch.int32),
        high_words=high_words,
        scales=scales,
        zeros=None,
        minima=grouped(parts.minima),
        outer_scales=outer(parts.outer_scales),
        outer_minima=outer(parts.outer_minima),
        row_scales=torch.full((weight.num_outputs,), 0.5, device=weight.device) if parts.is_e2m1 else None,
        num_inputs=num_inputs,
        group_size=parts.group_size,
        bits=bits,
        high_bits=high_bits,
        offset=parts.offset,
        is_e2m1=parts.is_e2m1,
        exponents=parts.is_e2m1,
    )
    return Repacked(packed)
