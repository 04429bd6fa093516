from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.activation import ACTIVATIONS, Activation
from stepwire_kernels.gated_linear import GatedTuning, choose_gated, gated_linear, load_gated_table
from stepwire_kernels.gemm import SkinnyTuning
from stepwire_kernels.split_k import allocate_linear_workspace
from stepwire_kernels.tile_linear import TileLinearTuning, tile_linear

from tests.unit.kernels.checks import assert_close, poison

TUNINGS: dict[str, GatedTuning] = {
    "skinny": SkinnyTuning(block_n=32, block_k=64, num_stages=2),
    "skinny, K split": SkinnyTuning(block_n=32, block_k=64, split_k=3, num_stages=2),
    "tile": TileLinearTuning(block_m=32, block_n=64, block_k=64, num_warps=4, num_stages=2),
    # What it asks for there is no room for: gates are not added up over programs.
    "tile, K to be split": TileLinearTuning(block_m=32, block_n=64, block_k=64, split_k=2, num_warps=4, num_stages=2),
}


def operands(num_tokens: int, outputs: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(outputs + k)
    # Gates of both signs that neither saturate nor vanish.
    x, weight = torch.randn(num_tokens, k, device=device), torch.randn(2 * outputs, k, device=device) / k**0.5
    return x.bfloat16(), weight.bfloat16()


def twin(x: torch.Tensor, weight: torch.Tensor, activation: Activation) -> torch.Tensor:
    return reference.gated_activation(x.double() @ weight.double().T, activation)


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=list(TUNINGS))
# A whole tile, outputs that no tile divides (a tile of gate reaches into up), several blocks of tokens.
@pytest.mark.parametrize(("num_tokens", "outputs", "k"), [(5, 32, 128), (20, 72, 208), (64, 40, 144)])
def test_product_and_gate_match_twin(device: str, tuning: GatedTuning, num_tokens: int, outputs: int, k: int) -> None:
    x, weight = operands(num_tokens, outputs, k, device)
    workspace = allocate_linear_workspace(device, partial_words=1 << 17)
    workspace.partial.fill_(float("nan"))
    out = poison(num_tokens, outputs, dtype=torch.bfloat16, device=device)
    assert gated_linear(x, weight, "silu", workspace, tuning, out=out) is out
    assert_close(out, twin(x, weight, "silu"))
    assert not workspace.counters.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["skinny", "tile"])
def test_every_activation(device: str, activation: Activation, name: str) -> None:
    x, weight = operands(7, 48, 96, device)
    workspace = allocate_linear_workspace(device, partial_words=1 << 12)
    assert_close(gated_linear(x, weight, activation, workspace, TUNINGS[name]), twin(x, weight, activation))


def test_misfits_are_refused(device: str) -> None:
    x, weight = operands(7, 48, 96, device)
    workspace = allocate_linear_workspace(device, partial_words=1 << 12)
    for tuning in (TUNINGS["skinny"], TUNINGS["tile"]):
        with pytest.raises(ValueError, match="as many of up"):
            gated_linear(x, weight[:-1], "silu", workspace, tuning)
    with pytest.raises(ValueError, match="neither scales nor bias"):
        tile_linear(x, weight, torch.zeros(96, device=device, dtype=x.dtype), workspace, activation="silu")


def test_what_was_not_measured_is_two_launches() -> None:
    x, weight = operands(7, 48, 96, "cpu")
    assert choose_gated(x, weight) is None
    assert load_gated_table("Imaginary GPU") == {}
