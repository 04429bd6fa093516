from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.activation import ACTIVATIONS
from stepwire_kernels.fused_linear import FusedTuning, NormInput, fused_linear
from stepwire_kernels.quantize_input import quantize_input

from tests.unit.kernels.checks import USUAL_DTYPES, assert_close, poison

# num_tokens, outputs, inputs
SHAPES = [(1, 16, 256), (1, 37, 300), (2, 9, 1030), (3, 20, 96), (4, 24, 768)]


def rows(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


def norm_input(x: torch.Tensor, *, adds: bool, weight_offset: float = 0.0) -> NormInput:
    residual = (3 * torch.randn_like(x.float())).to(x.dtype) if adds else None
    return NormInput(residual, torch.randn_like(x[0].float()).to(x.dtype), 1e-5, weight_offset)


def twin(x: torch.Tensor, weight: torch.Tensor, norm: NormInput | None, kind: str | None) -> torch.Tensor:
    """In float64, from the rounded sum of x and residual."""
    total = x.double()
    if norm is not None:
        if norm.residual is not None:
            total = (total + norm.residual.double()).to(x.dtype).double()
        total = reference.add_rms_norm(total, None, norm.weight.double(), norm.eps, weight_offset=norm.weight_offset)
    y = reference.linear(total, weight.double())
    return y if kind is None else reference.gated_activation(y, kind)


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize(("num_tokens", "n", "k"), SHAPES)
@pytest.mark.parametrize("ahead", [1, 8])
def test_norm_and_product_match_twin(
    device: str, dtype: torch.dtype, num_tokens: int, n: int, k: int, ahead: int
) -> None:
    x, weight = rows(num_tokens, k, dtype=dtype, device=device), rows(n, k, dtype=dtype, device=device)
    norm = norm_input(x, adds=True, weight_offset=1.0)
    before = norm.residual.clone()
    out, total = (poison(num_tokens, size, dtype=dtype, device=device) for size in (n, k))
    tuning = FusedTuning(block_n=8, block_k=256, num_warps=1, ahead=ahead)

    returned, h = fused_linear(x, weight, norm=norm, tuning=tuning, out=out, residual_out=total)

    assert returned is out and h is total
    assert_close(out, twin(x, weight, norm, None))
    assert torch.equal(total, (x.double() + before.double()).to(dtype))
    assert torch.equal(norm.residual, before)  # others still read it


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_gate_matches_twin(device: str, dtype: torch.dtype, kind: str, num_tokens: int) -> None:
    x, weight = rows(num_tokens, 520, dtype=dtype, device=device), rows(2 * 21, 520, dtype=dtype, device=device)
    norm = norm_input(x, adds=True)
    out = poison(num_tokens, 21, dtype=dtype, device=device)
    fused_linear(x, weight, norm=norm, activation=kind, tuning=FusedTuning(4, 256, 1, 2), out=out)
    assert_close(out, twin(x, weight, norm, kind))


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("has_norm", "kind"), [(False, None), (False, "silu"), (True, None), (True, "gelu")])
def test_each_part_can_be_left_out(device: str, adds: bool, has_norm: bool, kind: str | None) -> None:
    dtype = torch.float32
    wide = rows(2, 600, dtype=dtype, device=device)
    x, weight = wide[:, 100:400], rows(30, 600, dtype=dtype, device=device)[:, :300]
    norm = norm_input(x, adds=adds) if has_norm else None
    y, total = fused_linear(x, weight, norm=norm, activation=kind, tuning=FusedTuning(2, 512, 2, 1))
    assert_close(y, twin(x, weight, norm, kind))
    if norm is None or norm.residual is None:
        assert total is x
    else:
        assert torch.equal(total, x + norm.residual)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("n", "k"), [(30, 300), (5, 64), (3, 700)])
def test_normed_rows_are_kept_for_others(device: str, adds: bool, n: int, k: int) -> None:
    x, weight = (rows(size, k, dtype=torch.bfloat16, device=device) for size in (2, n))
    norm = norm_input(x, adds=adds)
    normed = poison(2, k, dtype=x.dtype, device=device)
    y, total = fused_linear(x, weight, norm=norm, tuning=FusedTuning(2, 256, 1, 1), normed_out=normed)
    assert_close(y, twin(x, weight, norm, None))
    assert_close(normed, reference.add_rms_norm(total.double(), None, norm.weight.double(), norm.eps))


def test_misfits_are_refused(device: str) -> None:
    x, weight = torch.zeros(5, 64, device=device), torch.zeros(7, 64, device=device)
    with pytest.raises(ValueError, match=r"takes x \[1..4, K\]"):
        fused_linear(x, weight)
    x = x[:2]
    with pytest.raises(ValueError, match="gate's rows and as many of up"):
        fused_linear(x, weight, activation="silu")
    with pytest.raises(ValueError, match="the norm's weight"):
        fused_linear(x, weight, norm=NormInput(None, torch.ones(63, device=device), 1e-5))
    with pytest.raises(ValueError, match="the residual must be"):
        fused_linear(x, weight, norm=NormInput(x[:1], torch.ones(64, device=device), 1e-5))


@pytest.mark.parametrize(("num_tokens", "n", "k"), SHAPES)
def test_float8_with_scales_matches_twin(device: str, num_tokens: int, n: int, k: int) -> None:
    x, weight = (rows(count, k, dtype=torch.float8_e4m3fn, device=device) for count in (num_tokens, n))
    x_scales, w_scales = (torch.rand(count, 1, device=device) + 0.5 for count in (num_tokens, n))
    out = poison(num_tokens, n, dtype=torch.bfloat16, device=device)
    fused_linear(x, weight, scales=(x_scales, w_scales), tuning=FusedTuning(8, 512, 1, 2), out=out)
    assert_close(out, (x.double() * x_scales.double()) @ (weight.double() * w_scales.double()).T)


def float8_weight(n: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and its scales, which bring products to about one."""
    return rows(n, k, dtype=torch.float8_e4m3fn, device=device), (torch.rand(n, 1, device=device) + 0.5) / k**0.5


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize(("num_tokens", "n", "k"), [(1, 24, 512), (2, 10, 1040), (4, 30, 96)])
def test_float8_with_gate_matches_twin(device: str, num_tokens: int, n: int, k: int, kind: str) -> None:
    x = rows(num_tokens, k, dtype=torch.float8_e4m3fn, device=device)
    x_scales = torch.rand(num_tokens, 1, device=device) + 0.5
    weight, w_scales = float8_weight(n, k, device)
    out = poison(num_tokens, n // 2, dtype=torch.bfloat16, device=device)
    tuning = FusedTuning(4, 512, 1, 2)
    fused_linear(x, weight, scales=(x_scales, w_scales), activation=kind, tuning=tuning, out=out)
    packed = (x.double() * x_scales.double()) @ (weight.double() * w_scales.double()).T
    assert_close(out, reference.gated_activation(packed, kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ahead", [1, 8])
@pytest.mark.parametrize(("num_tokens", "n", "k"), [(1, 24, 512), (1, 37, 304), (2, 10, 1040)])
def test_inputs_are_quantized_as_by_a_launch_of_its_own(
    device: str, num_tokens: int, n: int, k: int, ahead: int, dtype: torch.dtype
) -> None:
    x = (20 * rows(num_tokens, k, dtype=dtype, device=device)).contiguous()
    weight, w_scales = float8_weight(n, k, device)
    values, x_scales = quantize_input(x, torch.float8_e4m3fn)
    tuning = FusedTuning(4, 256, 1, ahead)
    out = poison(num_tokens, n, dtype=dtype, device=device)
    fused_linear(x, weight, scales=(None, w_scales), tuning=tuning, out=out)
    assert_close(out, (values.double() * x_scales.double()) @ (weight.double() * w_scales.double()).T)
    x[0] = 0
    zeros, _ = fused_linear(x, weight, scales=(None, w_scales), tuning=tuning)
    assert not zeros[0].any() and torch.equal(zeros[1:], out[1:])


def test_scales_are_for_a_product_alone(device: str) -> None:
    x = rows(2, 64, dtype=torch.bfloat16, device=device)
    weight = rows(8, 64, dtype=torch.bfloat16, device=device)
    scales = (torch.ones(2, device=device), torch.ones(8, device=device))
    with pytest.raises(ValueError, match="without a norm"):
        fused_linear(x, weight, norm=norm_input(x, adds=False), scales=scales)
    with pytest.raises(ValueError, match="as many scales"):
        fused_linear(x, weight, scales=(scales[0], scales[1][:4]))
    with pytest.raises(ValueError, match="only without scales of x"):
        fused_linear(x, weight, scales=(None, scales[1]))
