"""The checks of tests/unit/kernels/test_tile_linear.py, compiled, and with real sizes."""

from __future__ import annotations

import itertools

import pytest
import torch
from stepwire_kernels.split_k import allocate_linear_workspace
from stepwire_kernels.tile_linear import TileLinearTuning, tile_linear

from tests.unit.kernels.checks import assert_close, poison
from tests.unit.kernels.test_tile_linear import *  # noqa: F403
from tests.unit.kernels.test_tile_linear import operands

pytestmark = pytest.mark.gpu

TUNINGS = [
    TileLinearTuning(256, 64, 64, 1, 4, 5, 1024),
    TileLinearTuning(128, 128, 64, 4, 8, 4, 0),
    TileLinearTuning(128, 256, 64, 2, 8, 4, 512),
    TileLinearTuning(256, 128, 64, 3, 8, 4, 2048),
]


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
@pytest.mark.parametrize(("dtype", "num_tokens"), itertools.product([torch.bfloat16, torch.float8_e4m3fn], [33, 300]))
def test_many_rounds_one_after_another(
    device: str, tuning: TileLinearTuning, dtype: torch.dtype, num_tokens: int
) -> None:
    """As in a step: each launch begins before the last has ended, and its parts meet in the same scratch."""
    workspace = allocate_linear_workspace(device)
    cases = [operands(num_tokens, n, k, dtype, device) for n, k in ((6144, 4096), (1000, 2048), (4096, 4096))]
    ones = [(torch.ones(num_tokens, device=device), torch.ones(w.shape[0], device=device)) for _, w in cases]
    outs = [poison(num_tokens, w.shape[0], dtype=torch.bfloat16, device=device) for _, w in cases]
    for _ in range(20):
        for (x, w), scales, out in zip(cases, ones, outs, strict=True):
            out.fill_(float("nan"))
            tile_linear(x, w, None, workspace, scales=scales, tuning=tuning, out=out, pdl=True)
    for (x, w), out in zip(cases, outs, strict=True):
        assert_close(out, x.double() @ w.double().T)
