from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.norm import add_rms_norm, add_rms_norm_quantized
from stepwire_kernels.quantize_input import quantize_input

from tests.unit.kernels.checks import FLOAT_DTYPES, assert_close, poison


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 64), (3, 123), (5, 576), (2, 4096)])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_add_rms_norm_matches_twin(
    device: str, dtype: torch.dtype, num_tokens: int, hidden: int, weight_offset: float
) -> None:
    x = torch.randn(num_tokens, hidden, device=device).to(dtype)
    residual = (3 * torch.randn(num_tokens, hidden, device=device)).to(dtype)
    weight = torch.randn(hidden, device=device).to(dtype)
    expected_residual = (residual.double() + x.double()).to(dtype)
    expected = reference.add_rms_norm(
        expected_residual.double(), None, weight.double(), 1e-5, weight_offset=weight_offset
    )

    out = poison(num_tokens, hidden, dtype=dtype, device=device)
    add_rms_norm(x, residual, weight, 1e-5, weight_offset=weight_offset, out=out)

    assert_close(out, expected)
    assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_plain_norm_of_strided_rows_in_place(device: str, dtype: torch.dtype) -> None:
    wide = torch.randn(4, 300, device=device).to(dtype)
    x = wide[:, 20:120]
    weight = torch.randn(100, device=device).to(dtype)
    expected = reference.add_rms_norm(x.double(), None, weight.double(), 1e-6)
    left, right = wide[:, :20].clone(), wide[:, 120:].clone()

    add_rms_norm(x, None, weight, 1e-6, out=x)

    assert_close(x, expected)
    assert torch.equal(wide[:, :20], left) and torch.equal(wide[:, 120:], right)


@pytest.mark.parametrize("target", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("is_static", [False, True])
def test_quantized_norm_is_the_norm_quantized(
    device: str, dtype: torch.dtype, target: torch.dtype, is_static: bool
) -> None:
    x, residual = (torch.randn(4, 200, device=device).to(dtype) for _ in range(2))
    weight, other = torch.randn(200, device=device).to(dtype), residual.clone()
    static = torch.tensor(0.03, device=device) if is_static else None

    values, scales = add_rms_norm_quantized(
        x, residual, weight, 1e-5, target, weight_offset=1.0, static_scale=static
    )  # fmt: skip

    normed = add_rms_norm(x, other, weight, 1e-5, weight_offset=1.0)
    twin, twin_scales = quantize_input(normed, target, static_scale=static)
    assert torch.equal(values.float(), twin.float()) and torch.equal(scales, twin_scales)
    assert torch.equal(residual, other)


def test_tiny_rows_use_eps(device: str) -> None:
    x = torch.full((1, 32), 1e-4, device=device)
    out = add_rms_norm(x, None, torch.ones(32, device=device), 1e-5)
    assert_close(out, torch.full((1, 32), 1e-4 / (1e-8 + 1e-5) ** 0.5, dtype=torch.float64))


def test_no_tokens(device: str) -> None:
    assert add_rms_norm(torch.empty(0, 8, device=device), None, torch.ones(8, device=device), 1e-5).shape == (0, 8)


def test_wrong_weight_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=r"weight must be \(8,\)"):
        add_rms_norm(torch.zeros(2, 8, device=device), None, torch.ones(7, device=device), 1e-5)
