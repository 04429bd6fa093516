"""Which kernel multiplies by a packed weight: tables measured on a device, and defaults for what is not in them.

`tuned/packed/<device>.json` holds linears and `tuned/packed_experts/<device>.json` mixtures, made by
`python -m load_tests.kernels.sweep packed` and `packed_experts`; few tokens of linears also by
`python -m load_tests.kernels.packed_chain`, which chooses between a layer's other linears. A row with `measured_tokens`
was measured with so many, and stands where a shape for fewer was found slower than that.
"""

from __future__ import annotations

import functools

import torch
import triton

from stepwire_kernels.expert_packed import PackedExpertTuning, PackedExpertWeights
from stepwire_kernels.packed_dense import dense_linear
from stepwire_kernels.packed_in_flight import InFlightTuning
from stepwire_kernels.packed_in_flight import serves as few_tokens_serve
from stepwire_kernels.packed_linear import (
    KERNEL_NAMES,
    MAX_STREAM_TOKENS,
    PackedTuning,
    StreamTuning,
    Tuning,
    packed_linear,
)
from stepwire_kernels.packed_ring import RingTuning
from stepwire_kernels.packed_weight import PackedWeight, weight_format
from stepwire_kernels.packed_wgmma import WgmmaTuning, serves
from stepwire_kernels.split_k import LinearWorkspace
from stepwire_kernels.tuned_table import tuned_rows

# Programs that a large device holds at a time, one a multiprocessor.
NUM_MULTIPROCESSORS = 132
# From here on a weight is made dense first: by the kernel for Hopper's matrix units, and by that for any.
WGMMA_DENSE_FROM_TOKENS = 1024
DENSE_FROM_TOKENS = 256
_MIXTURE_SHAPE = ("format", "experts", "chosen", "hidden", "inner")


def dense_from(x: torch.Tensor, weight: PackedWeight) -> int:
    """The number of tokens from which on `packed_dense.dense_linear` is the faster road."""
    return WGMMA_DENSE_FROM_TOKENS if serves(x, weight) else DENSE_FROM_TOKENS


def _device_name(tensor: torch.Tensor) -> str | None:
    return torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else None


@functools.cache
def _linear_table(device_name: str) -> dict[tuple[str, int, int], list[tuple[int, Tuning]]]:
    """(format, N, K) to launch shapes by numbers of tokens, ascending."""
    kinds = {name: kind for kind, name in KERNEL_NAMES.items()}
    table: dict[tuple[str, int, int], list[tuple[int, Tuning]]] = {}
    # Of another card, of which the chips are the same: the numbers of tokens that were not measured on this one.
    rows = tuned_rows(device_name, "choices", ("format", "n", "k", "num_tokens"), "packed")
    for row in sorted(rows, key=lambda one: int(one["num_tokens"])):
        tuning: Tuning = kinds[row["kernel"]](**row["tuning"])
        table.setdefault((row["format"], row["n"], row["k"]), []).append((row["num_tokens"], tuning))
    return table


def measured_linear(device_name: str, weight: PackedWeight, num_tokens: int) -> Tuning | None:
    """The choice for the next larger number of tokens that was measured of this format and shape."""
    rows = _linear_table(device_name).get((weight_format(weight), weight.num_outputs, weight.num_inputs), ())
    return next((tuning for most, tuning in rows if num_tokens <= most), None)


def choose_linear(x: torch.Tensor, weight: PackedWeight) -> Tuning:
    """The launch shape of `packed_linear` for x [num_tokens, K]."""
    num_tokens, n = x.shape[0], weight.num_outputs
    name = _device_name(x)
    on_wgmma = serves(x, weight)
    if name is not None and x.dtype == torch.bfloat16:
        measured = measured_linear(name, weight, num_tokens)
        is_served = on_wgmma or not isinstance(measured, WgmmaTuning)
        if isinstance(measured, InFlightTuning | RingTuning):
            is_served = few_tokens_serve(x, weight)
        if measured is not None and is_served:
            return measured
    if num_tokens > MAX_STREAM_TOKENS // 2 and on_wgmma:
        return _default_wgmma(num_tokens, n)
    if num_tokens <= MAX_STREAM_TOKENS:
        return StreamTuning(row_blocks=2, num_warps=4) if n >= 8192 or num_tokens > 8 else StreamTuning()
    if num_tokens <= 32:
        return PackedTuning(block_m=32)
    return PackedTuning() if num_tokens <= 64 else PackedTuning(block_n=128, block_m=128, num_warps=8)


def multiply_packed(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    workspace: LinearWorkspace,
    *,
    scratch: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """x [num_tokens, K] -> [num_tokens, N] by the fastest road; without `scratch` (`dense_linear`) never the dense one.

    Raises:
        ValueError: x does not fit the weight, or its columns are not contiguous.
    """
    if scratch is not None and x.shape[0] >= dense_from(x, weight):
        return dense_linear(x, weight, bias, scratch, workspace=workspace, pdl=pdl)
    return packed_linear(x, weight, bias, workspace, tuning=choose_linear(x, weight), pdl=pdl)


def _default_wgmma(num_tokens: int, n: int) -> WgmmaTuning:
    block_m = min(128, max(16, triton.next_power_of_2(num_tokens)))
    programs = triton.cdiv(n, 128) * triton.cdiv(num_tokens, block_m)
    split = max(1, min(8, NUM_MULTIPROCESSORS // programs))
    return WgmmaTuning(block_m, 8, 1, split, *((6, 4) if block_m <= 64 else (4, 2)))


def measured_experts(
    device_name: str, held: PackedExpertWeights, num_tokens: int, num_chosen: int, num_experts: int
) -> PackedExpertTuning | None:
    """The choice for the nearest number of tokens that was measured of this format and shape, up to twice as many."""
    down = held.down
    shape = (weight_format(down), num_experts, num_chosen, down.num_outputs, held.inner_size)
    rows = [
        row
        for row in tuned_rows(device_name, "choices", _MIXTURE_SHAPE, "packed_experts")
        if tuple(row[name] for name in _MIXTURE_SHAPE) == shape
        and num_tokens <= 2 * row["num_tokens"] <= 4 * num_tokens
    ]
    if not rows:
        return None
    return PackedExpertTuning(**min(rows, key=lambda row: abs(row["num_tokens"] - num_tokens))["tuning"])
