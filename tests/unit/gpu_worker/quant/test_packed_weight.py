"""Unquantized weights in the layouts that a CPU multiplies fastest with."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.layers.ops import TORCH_OPS
from gpu_worker.quant import none

# Accumulation in float32 of 96 products near 1; inputs, weights and results are rounded to the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("multiplies_bfloat16", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 17])
def test_equals_the_product_in_float64(
    monkeypatch: pytest.MonkeyPatch, multiplies_bfloat16: bool, dtype: torch.dtype, with_bias: bool, num_rows: int
) -> None:
    if multiplies_bfloat16 and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        multiplies_bfloat16 = False  # oneDNN refuses: this CPU has the other road alone
    monkeypatch.setattr(none, "cpu_computes_bfloat16", lambda: multiplies_bfloat16)
    weight = torch.randn(50, 96).to(dtype)
    bias = torch.randn(50).to(dtype) if with_bias else None
    x = torch.randn(num_rows, 96).to(dtype)
    assert none.can_pack(weight, TORCH_OPS)

    got = none.PackedWeight(weight).multiply(x, bias)

    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert got.dtype == dtype and got.shape == (num_rows, 50)
    assert (got.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


def test_memory_is_that_of_every_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(none, "cpu_computes_bfloat16", lambda: False)
    weight = torch.randn(64, 32).bfloat16()
    packed = none.PackedWeight(weight)
    assert packed.num_bytes() == 64 * 32 * (2 + 4) and packed.holds(weight)
    assert none.PackedWeight(weight.float()).num_bytes() == 64 * 32 * 4
