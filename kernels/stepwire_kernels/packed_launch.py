"""What the kernels of packed weights are launched with: constants of a format, pointers, parts of the inputs."""

from __future__ import annotations

import torch

from stepwire_kernels.packed_weight import (
    BF16_E2M1_INPUT_SCALE,
    BF16_E2M1_SCALE,
    FP16_E2M1_SCALE,
    MAGIC_VALUES,
    PackedWeight,
)
from stepwire_kernels.split_k import LinearWorkspace

# Programs that fill a large device twice.
WANTED_PROGRAMS = 264


def format_constants(weight: PackedWeight, dtype: torch.dtype, *, streams: bool) -> dict[str, object]:
    """What a kernel is specialised for: the weight's format, as activations of `dtype` see it."""
    low, high = MAGIC_VALUES[dtype]
    magic = 0 if weight.is_e2m1 else low + (high if weight.high_bits else 0)
    constants: dict[str, object] = {
        "HIGH_BITS": weight.high_bits,
        "IS_E2M1": weight.is_e2m1,
        "EXPONENTS": weight.exponents,
        "OFFSET": weight.offset,
        "MAGIC": magic,
        "HAS_ZEROS": weight.zeros is not None,
        "HAS_MINIMA": weight.minima is not None,
        "HAS_OUTER": weight.outer_scales is not None,
        "SUBTRACTS": weight.has_minimum or magic != 0,
        "GROUP": weight.group_size,
    }
    if streams:
        is_bf16, is_fp16 = dtype == torch.bfloat16, dtype == torch.float16
        constants["X_SCALE"] = BF16_E2M1_INPUT_SCALE if weight.is_e2m1 and is_bf16 else 1.0
        constants["OUT_SCALE"] = 1.0
        if weight.is_e2m1 and (is_bf16 or is_fp16):
            constants["OUT_SCALE"] = BF16_E2M1_SCALE if is_bf16 else FP16_E2M1_SCALE
    return constants


def weight_pointers(weight: PackedWeight) -> tuple[torch.Tensor, ...]:
    """The kernels' pointers in their order; one that a format lacks is never read."""
    optional = (weight.zeros, weight.minima, weight.outer_scales, weight.outer_minima)
    return (
        weight.words,
        weight.words if weight.high_words is None else weight.high_words,
        weight.scales,
        *(weight.scales if tensor is None else tensor for tensor in optional),
    )


def num_splits(wanted: int, programs: int, steps: int, tile_words: int, room: LinearWorkspace) -> int:
    """Parts of the inputs: enough programs to fill a large device, as far as the workspace goes."""
    wanted = wanted or min(16, max(1, WANTED_PROGRAMS // programs))
    fitting = room.partial.numel() // (programs * tile_words) if 2 * programs <= room.counters.numel() else 1
    return max(1, min(wanted, steps, fitting))
