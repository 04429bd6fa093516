from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.activation import ACTIVATIONS, Activation
from stepwire_kernels.gated_choice import choose_gated, load_gated_table, measured_gated
from stepwire_kernels.split_k import allocate_linear_workspace
from stepwire_kernels.tile_linear import TileLinearTuning, tile_linear

from tests.unit.kernels.checks import assert_close, poison

TUNING = TileLinearTuning(block_m=32, block_n=64, block_k=64, num_warps=4, num_stages=2)


def operands(num_tokens: int, outputs: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(outputs + k)
    # Gates of both signs that neither saturate nor vanish.
    x, weight = torch.randn(num_tokens, k, device=device), torch.randn(2 * outputs, k, device=device) / k**0.5
    return x.bfloat16(), weight.bfloat16()


def twin(x: torch.Tensor, weight: torch.Tensor, activation: Activation) -> torch.Tensor:
    return reference.gated_activation(x.double() @ weight.double().T, activation)


# Gates are not added up over programs, whatever is asked for.
@pytest.mark.parametrize("split_k", [1, 2])
# A whole tile, outputs that no tile divides (a tile of gate reaches into up), several blocks of tokens.
@pytest.mark.parametrize(("num_tokens", "outputs", "k"), [(5, 32, 128), (20, 72, 208), (70, 40, 144)])
def test_product_and_gate_match_twin(device: str, num_tokens: int, outputs: int, k: int, split_k: int) -> None:
    x, weight = operands(num_tokens, outputs, k, device)
    workspace = allocate_linear_workspace(device, partial_words=1 << 17)
    workspace.partial.fill_(float("nan"))
    out = poison(num_tokens, outputs, dtype=torch.bfloat16, device=device)
    tuning = replace(TUNING, split_k=split_k)
    assert tile_linear(x, weight, None, workspace, activation="silu", tuning=tuning, out=out) is out
    assert_close(out, twin(x, weight, "silu"))
    assert not workspace.counters.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_activation(device: str, activation: Activation, dtype: torch.dtype) -> None:
    x, weight = (operand.to(dtype) for operand in operands(7, 48, 96, device))
    workspace = allocate_linear_workspace(device, partial_words=1 << 12)
    y = tile_linear(x, weight, None, workspace, activation=activation, tuning=TUNING)
    assert_close(y, twin(x, weight, activation))


@pytest.mark.parametrize(("num_tokens", "outputs", "k"), [(5, 32, 128), (70, 40, 144)])
def test_float8_with_scales(device: str, num_tokens: int, outputs: int, k: int) -> None:
    x, weight = (operand.to(torch.float8_e4m3fn) for operand in operands(num_tokens, outputs, k, device))
    scales = (torch.rand(num_tokens, 1, device=device) + 0.5, torch.rand(2 * outputs, 1, device=device) + 0.5)
    workspace = allocate_linear_workspace(device, partial_words=1 << 12)
    y = tile_linear(
        x, weight, None, workspace, activation="silu", scales=scales, out_dtype=torch.bfloat16, tuning=TUNING
    )
    expected = twin(x.double() * scales[0].double(), weight.double() * scales[1].double(), "silu")
    assert y.dtype == torch.bfloat16
    assert_close(y, expected)


def test_misfits_are_refused(device: str) -> None:
    x, weight = operands(7, 48, 96, device)
    workspace = allocate_linear_workspace(device, partial_words=1 << 12)
    with pytest.raises(ValueError, match="as many of up"):
        tile_linear(x, weight[:-1], None, workspace, activation="silu")
    ones = torch.ones(96, device=device)
    with pytest.raises(ValueError, match="neither a bias nor int8"):
        tile_linear(x, weight, ones.to(x.dtype), workspace, activation="silu")
    with pytest.raises(ValueError, match="neither a bias nor int8"):
        tile_linear(
            x.to(torch.int8), weight.to(torch.int8), None, workspace, activation="silu", scales=(ones[:7], ones)
        )


def test_what_was_not_measured_is_two_launches() -> None:
    x, weight = operands(7, 48, 96, "cpu")
    assert choose_gated(x, weight) is None
    assert load_gated_table("Imaginary GPU") == {}


@pytest.mark.parametrize("device_name", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_what_was_measured_is_taken_for_as_many_tokens(device_name: str) -> None:
    table = load_gated_table(device_name)
    assert {num_tokens for num_tokens, _, _ in table} >= {8, 16, 32, 64, 128}
    for (num_tokens, n, k), tuning in table.items():
        assert measured_gated(device_name, num_tokens, n, k) == tuning
        # The next larger tile would lack all but a few of its tokens.
        assert measured_gated(device_name, num_tokens // 2 + 1, n, k) is None
    assert measured_gated("Imaginary GPU", 16, 6144, 1024) is None
