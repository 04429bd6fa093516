"""Puts the packed weights of a layer's experts into one stack, as the grouped kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from stepwire_kernels.packed_weight import TILE_ROWS, PackedWeight

from gpu_worker.quant.repack import repack
from gpu_worker.quant.weights import QuantizedWeight


def pack_expert(parts: Sequence[QuantizedWeight]) -> PackedWeight | None:
    """One expert's parts (gate and up) below each other, each from a whole block of rows on.

    None where a form or size has no kernel, the parts differ in form, or inputs have an order of their own.
    """
    packed: list[PackedWeight] = []
    for part in parts:
        repacked = repack(part)
        if repacked is None or repacked.order is not None:
            return None
        packed.append(repacked.weight)
    if len(packed) == 1:
        return packed[0]
    if len({_form(weight) for weight in packed}) > 1:
        return None
    rows = max(weight.words.shape[0] for weight in packed) * TILE_ROWS
    alike = _with_alike_zeros(packed)

    def below(tensors: Sequence[torch.Tensor | None], *, is_words: bool) -> torch.Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return None
        if is_words:
            return torch.cat(present)
        return torch.cat([_padded(tensor, rows) for tensor in present], dim=-1)

    return _combined(alike, below)


def _form(weight: PackedWeight) -> tuple[object, ...]:
    """What parts must have in common beside zero points, which can be written out."""
    return (
        weight.num_inputs,
        weight.group_size,
        weight.high_bits,
        weight.is_e2m1,
        weight.exponents,
        weight.minima is None,
        weight.outer_scales is None,
        weight.row_scales is None,
    )


def stack_experts(experts: Sequence[PackedWeight]) -> PackedWeight:
    """All experts of one shape, one behind another in every tensor."""

    def stack(tensors: Sequence[torch.Tensor | None], *, is_words: bool) -> torch.Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.stack(present) if present else None

    return _combined(_with_alike_zeros(experts), stack)


def _combined(weights: Sequence[PackedWeight], combine: object) -> PackedWeight:
    fields = {}
    for name, value in vars(weights[0]).items():
        if isinstance(value, torch.Tensor):
            tensors = [getattr(weight, name) for weight in weights]
            if len({tensor.dtype for tensor in tensors}) > 1:  # each was narrowed as far as its own values allow
                tensors = [tensor.float() for tensor in tensors]
            fields[name] = combine(tensors, is_words=name in ("words", "high_words"))  # type: ignore[operator]
    return replace(weights[0], **fields)


def _with_alike_zeros(weights: Sequence[PackedWeight]) -> list[PackedWeight]:
    """Zero points as one number of all, or as a tensor of each."""
    if all(weight.zeros is None for weight in weights) and len({weight.offset for weight in weights}) == 1:
        return list(weights)
    return [
        weight
        if weight.zeros is not None
        else replace(
            weight,
            zeros=torch.full(weight.scales.shape, weight.offset, dtype=torch.uint8, device=weight.scales.device),
            offset=0,
        )
        for weight in weights
    ]


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """[..., N] with zeros up to `rows`."""
    # float8 knows no zero padding: through its bytes.
    raw = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    return torch.nn.functional.pad(raw, (0, rows - tensor.shape[-1])).view(tensor.dtype)
