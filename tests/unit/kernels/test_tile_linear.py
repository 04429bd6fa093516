from __future__ import annotations

import pytest
import torch
from stepwire_kernels.split_k import allocate_linear_workspace
from stepwire_kernels.tile_linear import TileLinearTuning, serves, tile_linear

from tests.unit.kernels.checks import assert_close, poison

# num_tokens, outputs, inputs: within one tile, over several, and none that a tile divides.
SHAPES = [(1, 64, 128), (20, 48, 208), (70, 104, 176)]
SMALL = TileLinearTuning(block_m=32, block_n=32, block_k=64, num_warps=4, num_stages=2)


def operands(num_tokens: int, n: int, k: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(n + k)
    factor = 30 if dtype.itemsize == 1 else 1
    x, w = (factor * torch.randn(size, k, device=device) for size in (num_tokens, n))
    return x.clamp(-127, 127).to(dtype), w.clamp(-127, 127).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "n", "k"), SHAPES)
@pytest.mark.parametrize("split_k", [1, 3])
def test_product_and_bias_match_twin(
    device: str, dtype: torch.dtype, num_tokens: int, n: int, k: int, split_k: int
) -> None:
    x, w = operands(num_tokens, n, k, dtype, device)
    bias = torch.randn(n, device=device).to(dtype)
    workspace = allocate_linear_workspace(device, partial_words=1 << 17)
    workspace.partial.fill_(float("nan"))
    out = poison(num_tokens, n, dtype=dtype, device=device)
    tuning = TileLinearTuning(**{**vars(SMALL), "split_k": split_k})
    assert tile_linear(x, w, bias, workspace, tuning=tuning, out=out) is out
    assert_close(out, x.double() @ w.double().T + bias.double())
    assert not workspace.counters.any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(("num_tokens", "n", "k"), SHAPES)
def test_scales_of_tokens_and_outputs(device: str, dtype: torch.dtype, num_tokens: int, n: int, k: int) -> None:
    x, w = operands(num_tokens, n, k, dtype, device)
    x_scales, w_scales = (torch.rand(size, 1, device=device) + 0.5 for size in (num_tokens, n))
    workspace = allocate_linear_workspace(device, partial_words=1 << 17)
    out = poison(num_tokens, n, dtype=torch.bfloat16, device=device)
    tuning = TileLinearTuning(**{**vars(SMALL), "split_k": 2})
    tile_linear(x, w, None, workspace, scales=(x_scales, w_scales), tuning=tuning, out=out)
    assert_close(out, (x.double() * x_scales.double()) @ (w.double() * w_scales.double()).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_default_shape_serves_a_strided_input(device: str, dtype: torch.dtype) -> None:
    x, w = operands(5, 160, 512, dtype, device)
    x, w = x[:, 128:384], w[:, 256:]
    ones = (torch.ones(5, device=device), torch.ones(160, device=device))
    workspace = allocate_linear_workspace(device, partial_words=1 << 12)
    y = tile_linear(x, w, None, workspace, scales=ones, out_dtype=torch.float32)
    assert_close(y, x.double() @ w.double().T, factor=50 if x.is_cuda and dtype.itemsize == 1 else 1)


def test_no_tokens(device: str) -> None:
    x, w = operands(0, 16, 64, torch.bfloat16, device)
    assert tile_linear(x, w, None, allocate_linear_workspace(device, partial_words=16)).shape == (0, 16)


def test_misfits_are_refused(device: str) -> None:
    x, w = operands(2, 16, 64, torch.bfloat16, device)
    workspace = allocate_linear_workspace(device, partial_words=16)
    assert serves(x, w) and not serves(x[:, :60].contiguous(), w) and not serves(x.T, w)
    with pytest.raises(ValueError, match="rows of whole 16 bytes"):
        tile_linear(x[:, :60].contiguous(), w[:, :60].contiguous(), None, workspace)
    with pytest.raises(ValueError, match="of one type"):
        tile_linear(x, w.half(), None, workspace)
    with pytest.raises(ValueError, match="need as many scales"):
        tile_linear(x, w, None, workspace, scales=(torch.ones(2), torch.ones(15)))
