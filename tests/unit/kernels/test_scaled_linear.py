from __future__ import annotations

import pytest
import torch
from stepwire_kernels.quantize_input import quantize_input
from stepwire_kernels.scaled_linear import ScaledTuning, scaled_linear
from stepwire_kernels.split_k import allocate_linear_workspace

from gpu_worker.quant.activations import ActivationQuant, StaticScale
from gpu_worker.quant.activations import quantize_input as quantize_twin
from tests.unit.kernels.checks import FLOAT_DTYPES, assert_close, poison

EIGHT_BITS = (torch.float8_e4m3fn, torch.int8)


def inputs(num_tokens: int, k: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    x = torch.randn(num_tokens, k, generator=torch.Generator().manual_seed(k)).to(device)
    x[0] = 0  # a token of zeros has a scale as well
    x[-1, 3] = 40  # and one an outlier
    return x.to(dtype)


@pytest.mark.parametrize("target", EIGHT_BITS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("group_size", [None, 64])
def test_quantized_inputs_are_those_of_the_definition(
    device: str, target: torch.dtype, dtype: torch.dtype, group_size: int | None
) -> None:
    x = inputs(5, 200, dtype, device)
    values, scales = quantize_input(x, target, group_size=group_size)
    kind = "int8" if target == torch.int8 else "float8"
    quant = ActivationQuant(kind, "group" if group_size else "token", True, group_size or 0)
    twin = quantize_twin(x.float(), quant, None)
    torch.testing.assert_close(scales, twin.scales)
    # A value half way between two steps may fall either way by the last bit of its scale.
    off = (values.float() - twin.values.float()).abs() > 1e-6
    assert off.float().mean() < 0.01


@pytest.mark.parametrize("target", EIGHT_BITS)
def test_a_static_scale_is_taken_as_it_is(device: str, target: torch.dtype) -> None:
    x = inputs(4, 96, torch.float32, device)
    static = torch.tensor(0.07, device=device)
    values, scales = quantize_input(x, target, static_scale=static)
    kind = "int8" if target == torch.int8 else "float8"
    twin = quantize_twin(x, ActivationQuant(kind, "tensor", False), StaticScale(static))
    assert torch.equal(scales, torch.full((4, 1), 0.07, device=device))
    assert torch.equal(values.float(), twin.values)


def operands(
    num_tokens: int, n: int, k: int, kind: torch.dtype, groups: int, scale_rows: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(n + k)
    x, w = ((torch.randn(size, k, device=device) * 30).clamp(-127, 127).to(kind) for size in (num_tokens, n))
    x_scales = torch.rand(num_tokens, groups, device=device) + 0.5
    w_scales = torch.rand(-(-n // scale_rows), groups, device=device) + 0.5
    return x, x_scales, w, w_scales


def twin_of(
    x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, group: int, scale_rows: int
) -> torch.Tensor:
    k = x.shape[1]
    wide_x = x.double() * x_scales.double().repeat_interleave(group, 1)[:, :k]
    rows = w_scales.double().repeat_interleave(scale_rows, 0)[: w.shape[0]]
    return wide_x @ (w.double() * rows.repeat_interleave(group, 1)[:, :k]).T


@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize(("num_tokens", "n", "k"), [(1, 64, 512), (3, 37, 304), (16, 48, 200), (70, 33, 160)])
@pytest.mark.parametrize("split_k", [1, 3])
def test_scales_by_token_and_output(
    device: str, kind: torch.dtype, num_tokens: int, n: int, k: int, split_k: int
) -> None:
    x, x_scales, w, w_scales = operands(num_tokens, n, k, kind, 1, 1, device)
    bias = torch.randn(n, device=device).bfloat16()
    workspace = allocate_linear_workspace(device, partial_words=1 << 17)
    workspace.partial.fill_(float("nan"))
    out = poison(num_tokens, n, dtype=torch.bfloat16, device=device)
    tuning = ScaledTuning(block_n=32, block_k=64, split_k=split_k)
    scaled_linear(x, x_scales, w, w_scales, bias, workspace, torch.bfloat16, tuning=tuning, out=out)
    assert_close(out, twin_of(x, x_scales, w, w_scales, k, 1) + bias.double())
    assert not workspace.counters.any()


@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize("scale_rows", [1, 32])
@pytest.mark.parametrize(("num_tokens", "n", "k"), [(2, 80, 256), (20, 48, 192)])
def test_scales_by_group(device: str, kind: torch.dtype, scale_rows: int, num_tokens: int, n: int, k: int) -> None:
    group = 128
    x, x_scales, w, w_scales = operands(num_tokens, n, k, kind, -(-k // group), scale_rows, device)
    workspace = allocate_linear_workspace(device, partial_words=1 << 16)
    out = scaled_linear(
        x, x_scales, w, w_scales, None, workspace, torch.float32, scale_rows=scale_rows, group_size=group
    )
    assert_close(out, twin_of(x, x_scales, w, w_scales, group, scale_rows), factor=5)


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_scales_by_group_of_many_tokens(device: str, kind: torch.dtype) -> None:
    """Here float8 products are those of the matrix units."""
    x, x_scales, w, w_scales = operands(70, 48, 256, kind, 2, 32, device)
    workspace = allocate_linear_workspace(device, partial_words=1 << 16)
    options = {"scale_rows": 32, "group_size": 128}
    out = scaled_linear(x, x_scales, w, w_scales, None, workspace, torch.bfloat16, **options)
    assert_close(out, twin_of(x, x_scales, w, w_scales, 128, 32))


def test_misfits_are_refused(device: str) -> None:
    x, x_scales, w, w_scales = operands(2, 32, 64, torch.int8, 1, 1, device)
    workspace = allocate_linear_workspace(device, partial_words=16)
    with pytest.raises(ValueError, match="of one 8-bit type"):
        scaled_linear(x, x_scales, w.to(torch.float8_e4m3fn), w_scales, None, workspace, torch.bfloat16)
    with pytest.raises(ValueError, match="need scales of shape"):
        scaled_linear(x, x_scales, w, w_scales[:-1], None, workspace, torch.bfloat16)
    with pytest.raises(ValueError, match="power of two"):
        scaled_linear(x, x_scales.expand(2, 2), w, w_scales.expand(32, 2), None, workspace, torch.bfloat16,
                      group_size=48)  # fmt: skip
    with pytest.raises(ValueError, match="float8_e4m3fn or int8"):
        quantize_input(torch.zeros(2, 4), torch.float16)
