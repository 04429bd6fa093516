"""Norms and gated activations against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_worker.cpu.ops import CpuOps
from gpu_worker.cpu.team import Team
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.norm import LayerNorm, RMSNorm
from gpu_worker.layers.ops import GATED_ACTIVATIONS
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.quant.none import Unquantized

BUILD = BuildContext(ParallelContext(), Unquantized(), torch.bfloat16, torch.device("cpu"))
ROUNDING = 2**-8


def make_norm(kind: str, size: int, generator: torch.Generator) -> RMSNorm | LayerNorm:
    weight = torch.randn(size, generator=generator).bfloat16()
    if kind == "rms":
        norm: RMSNorm | LayerNorm = RMSNorm(size, 1e-5, BUILD, weight_offset=1.0)
    else:
        norm = LayerNorm(size, 1e-5, BUILD, bias=kind == "layer with bias")
        if norm.bias is not None:
            norm.bias.copy_(torch.randn(size, generator=generator))
    norm.weight.copy_(weight)
    norm.finish()
    return norm


def expected_norm(norm: RMSNorm | LayerNorm, x: torch.Tensor) -> torch.Tensor:
    x, weight = x.double(), norm.weight.double()
    if isinstance(norm, RMSNorm):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (weight + norm.weight_offset)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * weight
    return normed if norm.bias is None else normed + norm.bias.double()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["rms", "layer", "layer with bias"]),
    num_rows=st.integers(1, 40),
    size=st.integers(2, 700),
    adds=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_norms(team: Team, kind: str, num_rows: int, size: int, adds: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(num_rows, size + 3, generator=generator).bfloat16() * 3 + 1
    residual, beside = wide[:, :size], wide[:, size:].clone()
    x = torch.randn(num_rows, size, generator=generator).bfloat16() if adds else None
    summed = residual.clone() if x is None else residual + x
    norm = make_norm(kind, size, generator)
    normed = CpuOps(team, attends=False).add_norm(x, residual, norm)
    assert torch.equal(residual, summed)
    assert torch.equal(wide[:, size:], beside)
    torch.testing.assert_close(normed.double(), expected_norm(norm, summed), rtol=ROUNDING, atol=2e-3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(set(GATED_ACTIVATIONS) - {"gelu"})),
    num_rows=st.integers(1, 20),
    size=st.integers(1, 600),
    spread=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_gated_activations(team: Team, kind: str, num_rows: int, size: int, spread: float, seed: int) -> None:
    gate_up = (torch.randn(num_rows, 2 * size, generator=torch.Generator().manual_seed(seed)) * spread).bfloat16()
    actual = CpuOps(team, attends=False).gated_activation(gate_up, kind)
    expected = GATED_ACTIVATIONS[kind](gate_up.double(), size)
    torch.testing.assert_close(actual.double(), expected, rtol=2 * ROUNDING, atol=1e-6)


def test_gelu_with_erf_is_torchs(team: Team) -> None:
    gate_up = torch.randn(3, 40).bfloat16()
    assert torch.equal(
        CpuOps(team, attends=False).gated_activation(gate_up, "gelu"), GATED_ACTIVATIONS["gelu"](gate_up, 20)
    )


@pytest.mark.parametrize("kind", ["silu", "gelu_pytorch_tanh", "swiglu_oai"])
def test_gates_of_any_size_stay_finite(team: Team, kind: str) -> None:
    gates = torch.tensor([-1e38, -1000.0, -89.0, -87.5, 0.0, 87.5, 89.0, 1000.0]).bfloat16()
    gate_up = torch.cat((gates, torch.ones_like(gates))).view(1, -1)
    actual = CpuOps(team, attends=False).gated_activation(gate_up, kind)
    expected = GATED_ACTIVATIONS[kind](gate_up.double(), len(gates))
    torch.testing.assert_close(actual.double(), expected, rtol=2 * ROUNDING, atol=1e-6)
    gate_up[0, 0] = float("nan")
    assert CpuOps(team, attends=False).gated_activation(gate_up, kind)[0, 0].isnan()
