from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.gemm import GemvTuning, SkinnyTuning, gemv, skinny_gemm
from stepwire_kernels.split_k import allocate_linear_workspace

from tests.unit.kernels.checks import USUAL_DTYPES, assert_close, poison


def operands(
    num_tokens: int, n: int, k: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = ((num_tokens, k), (n, k), (n,))
    x, weight, bias = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return x, weight, bias


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "n", "k"), [(1, 64, 512), (1, 37, 300), (2, 20, 700), (3, 16, 96), (4, 9, 1030)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_gemv_matches_twin(device: str, dtype: torch.dtype, num_tokens: int, n: int, k: int, has_bias: bool) -> None:
    x, weight, bias = operands(num_tokens, n, k, dtype, device)
    out = poison(num_tokens, n, dtype=dtype, device=device)
    gemv(x, weight, bias if has_bias else None, tuning=GemvTuning(block_n=8, block_k=256), out=out)
    assert_close(out, reference.linear(x.double(), weight.double(), bias.double() if has_bias else None))


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize(("num_tokens", "n", "k"), [(5, 64, 512), (17, 70, 300), (64, 128, 384), (1, 33, 129)])
@pytest.mark.parametrize("split_k", [1, 2, 3, 8])
def test_skinny_gemm_matches_twin(
    device: str, dtype: torch.dtype, num_tokens: int, n: int, k: int, split_k: int
) -> None:
    x, weight, bias = operands(num_tokens, n, k, dtype, device)
    workspace = allocate_linear_workspace(device, partial_words=1 << 18)
    workspace.partial.fill_(float("nan"))
    tuning = SkinnyTuning(block_n=32, block_k=64, split_k=split_k, num_stages=2)
    out = poison(num_tokens, n, dtype=dtype, device=device)
    skinny_gemm(x, weight, bias, workspace, tuning=tuning, out=out)
    assert_close(out, reference.linear(x.double(), weight.double(), bias.double()))
    assert not workspace.counters.any()


def test_strided_inputs(device: str) -> None:
    x, weight, _ = operands(3, 40, 256, torch.float32, device)
    wide_x, wide_weight = x.repeat(1, 2), weight.repeat(1, 3)
    out = gemv(wide_x[:, :256], wide_weight[:, :256], tuning=GemvTuning(block_k=128))
    assert_close(out, reference.linear(x.double(), weight.double()))


def test_misfits_are_refused(device: str) -> None:
    x, weight, _ = operands(5, 40, 256, torch.float32, device)
    with pytest.raises(ValueError, match=r"takes x \[1..4, K\]"):
        gemv(x, weight)
    workspace = allocate_linear_workspace(device, partial_words=16)
    with pytest.raises(ValueError, match="allocate a larger workspace"):
        skinny_gemm(x, weight, None, workspace, tuning=SkinnyTuning(split_k=2))
