"""act(x @ gate^T) * (x @ up^T) in one launch, for five to some hundred tokens, where that measured faster than two.

x: [num_tokens, K]; weight = [gate; up]: [2 * I, K]; y: [num_tokens, I]. By `skinny_gemm` or `tile_linear`, whichever
`tuned/<device>.json` names (list `gated`, made by `python -m load_tests.kernels.gated`). For fewer tokens see
`fused_linear`.
"""

from __future__ import annotations

import functools

import torch
import triton

from stepwire_kernels.activation import Activation
from stepwire_kernels.gemm import SkinnyTuning, skinny_gemm
from stepwire_kernels.linear import MAX_TABLE_TOKENS
from stepwire_kernels.split_k import LinearWorkspace
from stepwire_kernels.tile_linear import TileLinearTuning, serves, tile_linear
from stepwire_kernels.tuned_table import tuned_choices

GatedTuning = SkinnyTuning | TileLinearTuning


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation: Activation,
    workspace: LinearWorkspace,
    tuning: GatedTuning,
    *,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """y [num_tokens, I].

    Raises:
        ValueError: shapes or strides that do not fit the launch shape's kernel.
    """
    if isinstance(tuning, SkinnyTuning):
        return skinny_gemm(x, weight, None, workspace, activation=activation, tuning=tuning, out=out, pdl=pdl)
    return tile_linear(x, weight, None, workspace, activation=activation, tuning=tuning, out=out, pdl=pdl)


@functools.cache
def load_gated_table(device_name: str) -> dict[tuple[int, int, int], GatedTuning]:
    """Where product and gate in one launch measured faster than two: (token bucket, 2 * I, K) to the launch shape."""
    kinds = {"skinny": SkinnyTuning, "tile": TileLinearTuning}
    return {
        (row["num_tokens"], row["n"], row["k"]): kinds[row["kernel"]](**row["tuning"])
        for row in tuned_choices(device_name, "gated")
    }


def choose_gated(x: torch.Tensor, weight: torch.Tensor) -> GatedTuning | None:
    """The launch shape for these rows; None: separate launches are faster, or were not measured."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or not 1 <= x.shape[0] <= MAX_TABLE_TOKENS:
        return None
    table = load_gated_table(torch.cuda.get_device_name(x.device))
    tuning = table.get((triton.next_power_of_2(x.shape[0]), weight.shape[0], weight.shape[1]))
    if isinstance(tuning, TileLinearTuning) and not serves(x, weight):
        return None
    return tuning
