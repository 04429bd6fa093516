"""y = x @ weight^T + bias by whatever was measured fastest for its shape: ours, or torch's (cuBLAS).

x: [num_tokens, K]; weight: [N, K]; bias: [N]; y: [num_tokens, N].

`tuned/<device>.json`, list `choices` (made by `python -m load_tests.kernels.linear_sweep`), names for a measured shape
and a number of tokens (the next power of two) the kernel and its launch shape; where it names none, or "torch", torch
was as fast. It also takes tiles that would not be full.
A shape that nobody measured (another model's, a rank's share) goes by the measured one that is nearest to it, up to
half a power of two in each direction: up to 32 tokens what is a little larger or smaller wants the same launch (of
140 cases of seven other models 124 were faster than torch on an H100, 8 % in the median, the slowest 5 % slower).
Beyond that, torch.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from math import log2

import torch
import triton

from stepwire_kernels.fused_linear import FusedTuning, fused_linear
from stepwire_kernels.gemm import GemvTuning, SkinnyTuning, gemv, has_room, skinny_gemm
from stepwire_kernels.split_k import LinearWorkspace
from stepwire_kernels.tile_linear import TileLinearTuning, serves, tile_linear
from stepwire_kernels.tuned_table import tuned_rows

LinearTuning = GemvTuning | SkinnyTuning | FusedTuning | TileLinearTuning

MAX_TABLE_TOKENS = 256
# In powers of two.
NEAR = 0.5
# With more, products matter as well as memory, and how tiles divide the shape decides.
MAX_NEAR_TOKENS = 32


@functools.cache
def load_table(device_name: str) -> dict[tuple[int, int, int], LinearTuning]:
    """The measured choices for a device name as torch reports it: (token bucket, N, K) to ours; absent means torch."""
    kinds = {"gemv": GemvTuning, "skinny": SkinnyTuning, "ahead": FusedTuning, "tile": TileLinearTuning}
    return {
        (row["num_tokens"], row["n"], row["k"]): kinds[row["kernel"]](**row["tuning"])
        for row in tuned_rows(device_name, "choices", ("num_tokens", "n", "k"))
        if row["kernel"] != "torch"
    }


@functools.cache
def choose_linear(device_name: str, bucket: int, n: int, k: int) -> LinearTuning | None:
    """The launch shape for a bucket of tokens; None: torch."""
    table = load_table(device_name)
    measured = {(measured_n, measured_k) for _, measured_n, measured_k in table}
    near = nearest_shape(measured, n, k) if bucket <= MAX_NEAR_TOKENS else (n, k)
    tuning = None if near is None else table.get((bucket, *near))
    if isinstance(tuning, SkinnyTuning):
        # Parts of two steps at least, as were measured.
        steps = triton.cdiv(k, tuning.block_k)
        return replace(tuning, split_k=max(1, min(tuning.split_k, steps // 2)))
    return tuning


def nearest_shape(measured: set[tuple[int, int]], n: int, k: int) -> tuple[int, int] | None:
    """The measured (N, K) that is nearest to this one; None: none is near."""

    def distances(shape: tuple[int, int]) -> tuple[float, float]:
        return abs(log2(shape[0] / n)), abs(log2(shape[1] / k))

    near = [shape for shape in measured if max(distances(shape)) <= NEAR]
    # Of two that are as near the first by size, so that every process chooses alike.
    return min(near, key=lambda shape: (sum(distances(shape)), shape), default=None)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    workspace: LinearWorkspace | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """y [num_tokens, N]. Without a workspace only kernels that need none are considered."""
    num_tokens = x.shape[0]
    n, k = weight.shape
    if x.is_cuda and x.ndim == 2 and 1 <= num_tokens <= MAX_TABLE_TOKENS and x.dtype == torch.bfloat16:
        bucket = triton.next_power_of_2(num_tokens)
        tuning = choose_linear(torch.cuda.get_device_name(x.device), bucket, n, k)
        if isinstance(tuning, GemvTuning):
            return gemv(x, weight, bias, tuning=tuning, pdl=pdl)
        if isinstance(tuning, FusedTuning) and bias is None:
            return fused_linear(x, weight, tuning=tuning, pdl=pdl)[0]
        if isinstance(tuning, SkinnyTuning) and workspace is not None and has_room(workspace, tuning, num_tokens, n):
            return skinny_gemm(x, weight, bias, workspace, tuning=tuning, pdl=pdl)
        if (
            isinstance(tuning, TileLinearTuning)
            and workspace is not None
            and tuning.is_filled_by(num_tokens)
            and serves(x, weight)
        ):
            return tile_linear(x, weight, bias, workspace, tuning=tuning, pdl=pdl)
    return torch.nn.functional.linear(x, weight, bias)
