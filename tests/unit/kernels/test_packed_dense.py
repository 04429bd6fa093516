from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.packed_dense import DenseTuning, dense_linear, dense_weight
from stepwire_kernels.packed_weight import unpack

from tests.unit.gpu_worker.quant.packed_cases import WEIGHTS
from tests.unit.kernels.checks import assert_close, poison
from tests.unit.kernels.test_packed_linear import QUICK, packed


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WEIGHTS]
)
@pytest.mark.parametrize("tuning", [DenseTuning(2, 4, 4), pytest.param(DenseTuning(1, 1, 2), marks=pytest.mark.slow)])
def test_every_format_is_the_twin_rounded_once(device: str, name: str, tuning: DenseTuning) -> None:
    weight = packed(name, device)
    out = poison(weight.num_outputs, weight.num_inputs, dtype=torch.bfloat16, device=device)
    dense_weight(weight, out, tuning=tuning)
    exact = unpack(weight)
    # Half a unit of bfloat16, and what float32 loses beside the largest term.
    assert ((out.double() - exact).abs() <= exact.abs() * 2.0**-8 + exact.abs().max() * 2.0**-16).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types(device: str, dtype: torch.dtype) -> None:
    weight = packed("int4-g64-odd-k", device)
    out = torch.empty(weight.num_outputs, weight.num_inputs, dtype=dtype, device=device)
    assert_close(dense_weight(weight, out), unpack(weight), factor=2.0)


def test_a_product_by_the_dense_copy(device: str) -> None:
    weight = packed("mxfp4", device)
    x = torch.randn(9, weight.num_inputs, device=device).bfloat16()
    bias = torch.randn(weight.num_outputs, device=device).bfloat16()
    scratch = torch.full((weight.num_outputs * weight.num_inputs + 5,), float("nan"), dtype=x.dtype, device=device)
    out = dense_linear(x, weight, bias, scratch)
    assert_close(out, reference.linear(x.double(), unpack(weight), bias.double()), factor=2.0)
    assert scratch[-5:].isnan().all()


def test_misfits_are_refused(device: str) -> None:
    weight = packed("mxfp4", device)
    with pytest.raises(ValueError, match="contiguous columns"):
        dense_weight(weight, torch.empty(3, 3, device=device))
    x = torch.zeros(1, weight.num_inputs, device=device)
    with pytest.raises(ValueError, match="numbers of scratch"):
        dense_linear(x, weight, None, torch.empty(7, device=device))
