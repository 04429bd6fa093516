"""Brings group-scaled weights into the one layout that the kernels multiply by (`stepwire_kernels.packed_weight`).

Nothing is rounded: codes, scales and minima are those of the checkpoint, in its own element types.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from stepwire_kernels.packed_weight import ALIGN_INPUTS, PackedWeight, pack_fields

from gpu_worker.loading.gguf_blocks import codes_of
from gpu_worker.quant.weights import AffineWeight, Float4Weight, GgufWeight, OffsetWeight, QuantizedWeight

# What runs of a group are made of.
PLANE = 32
SMALL_GROUP = 16
ONE_GROUP = 1 << 25


@dataclass(frozen=True, slots=True)
class Repacked:
    """`order`: input k of the packed weight is input order[k] of the linear (one past the last: nothing); None: k."""

    weight: PackedWeight
    order: torch.Tensor | None = None  # int64 [K of the packed weight]


def repack(weight: QuantizedWeight) -> Repacked | None:
    """The kernel's layout; None where a form or size has none."""
    if isinstance(weight, AffineWeight):
        return _repack_affine(weight)
    if isinstance(weight, OffsetWeight):
        return _repack_offset(weight)
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


def _by_group(values: torch.Tensor) -> torch.Tensor:
    """[N, G] -> [G, N]."""
    return values.t().contiguous()


def _words(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Codes uint8 [N, K] of up to `bits` bits: words, high words and the bits in those."""
    words = pack_fields(codes & 15, 4, torch.int32)
    if bits <= 4:
        return words, None, 0
    high_bits = {5: 1, 6: 2}.get(bits, 4)
    dtype = {1: torch.int8, 2: torch.int16, 4: torch.int32}[high_bits]
    return words, pack_fields(codes >> 4, high_bits, dtype), high_bits


def _kernel_group(group_size: int, num_inputs: int) -> int | None:
    """The group size as the kernels count: one group for all inputs is a large one."""
    if group_size >= num_inputs:
        return ONE_GROUP
    if group_size == SMALL_GROUP or (group_size % PLANE == 0 and ALIGN_INPUTS % group_size == 0):
        return group_size
    return group_size if group_size % ALIGN_INPUTS == 0 else None


def _repack_affine(weight: AffineWeight) -> Repacked | None:
    if weight.bits > 8:
        return None
    order = None
    if weight.groups is not None:
        weight, order = _regular(weight)
    group_size = _kernel_group(weight.group_size, weight.num_inputs)
    if group_size is None:
        return None
    one_zero = weight.zeros.numel() == 1 or bool((weight.zeros == weight.zeros.flatten()[0]).all())
    words, high_words, high_bits = _words(weight.codes, weight.bits)
    packed = PackedWeight(
        words=words,
        high_words=high_words,
        scales=_by_group(_narrowest(weight.scales.float())),
        zeros=None if one_zero else _by_group(weight.zeros),
        minima=None,
        outer_scales=None,
        outer_minima=None,
        row_scales=None,
        num_inputs=weight.num_inputs,
        group_size=group_size,
        high_bits=high_bits,
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


def _repack_offset(weight: OffsetWeight) -> Repacked | None:
    group_size = _kernel_group(weight.group_size, weight.num_inputs)
    if group_size is None:
        return None
    words, high_words, high_bits = _words(weight.codes, weight.bits)
    packed = PackedWeight(
        words=words,
        high_words=high_words,
        scales=_by_group(_narrowest(weight.scales)),
        zeros=None,
        minima=_by_group(_narrowest(-weight.offsets)),
        outer_scales=None,
        outer_minima=None,
        row_scales=None,
        num_inputs=weight.num_inputs,
        group_size=group_size,
        high_bits=high_bits,
    )
    return Repacked(packed)


def _repack_float4(weight: Float4Weight) -> Repacked:
    codes = torch.stack((weight.packed & 15, weight.packed >> 4), dim=-1).flatten(1)  # [N, K]
    packed = PackedWeight(
        words=pack_fields(codes, 4, torch.int32),
        high_words=None,
        scales=_by_group(weight.scales),
        zeros=None,
        minima=None,
        outer_scales=None,
        outer_minima=None,
        row_scales=(0.5 / weight.row_divisors).contiguous(),  # the kernels' e2m1 values are doubled
        num_inputs=weight.num_inputs,
        group_size=weight.group_size,
        is_e2m1=True,
        exponents=weight.scales.dtype == torch.uint8,
    )
    return Repacked(packed)


def _repack_gguf(weight: GgufWeight) -> Repacked | None:
    parts = codes_of(weight.blocks, weight.ggml_type)
    if parts is None:
        return None

    def transposed(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else _by_group(values)

    words, high_words, high_bits = _words(parts.codes, parts.bits)
    packed = PackedWeight(
        words=words,
        high_words=high_words,
        scales=_by_group(parts.scales),
        zeros=None,
        minima=transposed(parts.minima),
        outer_scales=transposed(parts.outer_scales),
        outer_minima=transposed(parts.outer_minima),
        row_scales=torch.full((weight.num_outputs,), 0.5, device=weight.device) if parts.is_e2m1 else None,
        num_inputs=weight.num_inputs,
        group_size=parts.group_size,
        high_bits=high_bits,
        offset=parts.offset,
        is_e2m1=parts.is_e2m1,
        exponents=parts.is_e2m1,
    )
    return Repacked(packed)
