"""Where act(x @ gate^T) * (x @ up^T) in one launch, by `tile_linear`, measured faster than product and gate in two.

For five to some hundred tokens; for fewer see `fused_linear`. `tuned/<device>.json`, list `gated`, made by
`python -m load_tests.kernels.gated` and kept where whole steps were faster too.
"""

from __future__ import annotations

import functools

import torch
import triton

from stepwire_kernels.linear import MAX_TABLE_TOKENS
from stepwire_kernels.tile_linear import TileLinearTuning, serves
from stepwire_kernels.tuned_table import tuned_rows


@functools.cache
def load_gated_table(device_name: str) -> dict[tuple[int, int, int], TileLinearTuning]:
    """Where product and gate in one launch measured faster than two: (token bucket, 2 * I, K) to the launch shape."""
    return {
        (row["num_tokens"], row["n"], row["k"]): TileLinearTuning(**row["tuning"])
        for row in tuned_rows(device_name, "gated", ("num_tokens", "n", "k"))
    }


def measured_gated(device_name: str, num_tokens: int, n: int, k: int) -> TileLinearTuning | None:
    """The launch shape for so many tokens and a weight [n, k]; None: there is none, or its tiles would lack tokens."""
    bucket = triton.next_power_of_2(num_tokens)
    tuning = load_gated_table(device_name).get((bucket, n, k))
    # With the bucket's own number it was measured, and eight tokens in a tile of sixteen were faster all the same.
    is_served = tuning is not None and (num_tokens == bucket or tuning.is_filled_by(num_tokens))
    return tuning if is_served else None


def choose_gated(x: torch.Tensor, weight: torch.Tensor) -> TileLinearTuning | None:
    """The launch shape for these rows; None: separate launches are faster, or were not measured."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or not 1 <= x.shape[0] <= MAX_TABLE_TOKENS:
        return None
    tuning = measured_gated(torch.cuda.get_device_name(x.device), x.shape[0], *weight.shape)
    return tuning if tuning is not None and serves(x, weight) else None
