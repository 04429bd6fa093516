from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.invariant_linear import BLOCK_M, MAX_SPLITS, invariant_linear, num_splits
from stepwire_kernels.split_k import allocate_linear_workspace

from tests.unit.kernels.checks import FLOAT_DTYPES, assert_close, poison
from tests.unit.kernels.test_gemm import operands

SHAPES = [(1, 37, 300), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((64, 70, 1030), (130, 129, 520)))]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("num_tokens", "n", "k"), SHAPES)
@pytest.mark.parametrize("spread", [False, True])
def test_matches_twin(device: str, dtype: torch.dtype, num_tokens: int, n: int, k: int, spread: bool) -> None:
    x, weight, bias = operands(num_tokens, n, k, dtype, device)
    workspace = allocate_linear_workspace(device, partial_words=1 << 18)
    workspace.partial.fill_(float("nan"))
    for one in (None, bias):
        out = poison(num_tokens, n, dtype=dtype, device=device)
        invariant_linear(x, weight, one, workspace, spread=spread, out=out)
        wide = None if one is None else one.double()
        assert_close(out, reference.linear(x.double(), weight.double(), wide))
    assert not workspace.counters.any()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(one, marks=pytest.mark.slow) for one in (torch.float32, torch.float16))]
)
def test_a_row_has_the_same_bits_in_any_batch(device: str, dtype: torch.dtype) -> None:
    """Alone and spread over programs, among many and not spread; compiled, at another place of its tile too.

    The interpreter multiplies a tile by numpy.matmul, and OpenBLAS's micro-kernels take a few rows at a time (6 of 64
    on a CPU with AVX2) and sum the rest in another order: 64 equal rows in float32 give unequal ones. Only a row that
    stays at its place can be compared there; with all other rows zero it has the same bits.
    """
    n, k = 70, 1030
    assert num_splits(n, k) > 1
    x, weight, bias = operands(150, n, k, dtype, device)
    workspace = allocate_linear_workspace(device, partial_words=1 << 20)
    many = invariant_linear(x, weight, bias, workspace)
    assert torch.equal(many, invariant_linear(x, weight, bias, workspace, spread=True))
    places = [(0, 1), (0, 100), (BLOCK_M, BLOCK_M + 1), (2 * BLOCK_M, 150)]
    if device == "cuda":
        places += [(3, 4), (60, 70), (149, 150), (10, 10 + BLOCK_M), (5, 140)]
    for start, stop in places:
        assert torch.equal(invariant_linear(x[start:stop], weight, bias, workspace), many[start:stop])


def test_spans_follow_the_weight_alone() -> None:
    for n, k in ((4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (1024, 1024), (16, 64)):
        splits = num_splits(n, k)
        assert 1 <= splits <= MAX_SPLITS
        # Every span has work.
        blocks = -(-k // 64)
        assert (splits - 1) * -(-blocks // splits) < blocks


def test_what_does_not_fit_is_said(device: str) -> None:
    x, weight, _ = operands(3, 64, 2048, torch.float32, device)
    workspace = allocate_linear_workspace(device, partial_words=100)
    with pytest.raises(ValueError, match="allocate a larger workspace"):
        invariant_linear(x, weight, None, workspace)
    with pytest.raises(ValueError, match="takes x"):
        invariant_linear(x, weight[:, 1:], None, workspace)
    with pytest.raises(ValueError, match="contiguous"):
        invariant_linear(x.t().contiguous().t(), weight, None, workspace)
    assert invariant_linear(x[:0], weight, None, workspace).shape == (0, 64)
