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


def choose_gated(x: torch.Tensor, weight: torch.Tensor) -> TileLinearTuning | None:
    """The launch shape for these rows; None: separate launches are faster, or were not measured."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or not 1 <= x.shape[0] <= MAX_TABLE_TOKENS:
        return None
    table = load_gated_table(torch.cuda.get_device_name(x.device))
    tuning = table.get((triton.next_power_of_2(x.shape[0]), weight.shape[0], weight.shape[1]))
    is_served = tuning is not None and tuning.is_filled_by(x.shape[0]) and serves(x, weight)
    return tuning if is_served else None
