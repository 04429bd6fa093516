"""Products of bfloat16 weights against float64: any number of rows, odd sizes, strided inputs, more threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_worker.cpu.layout import BLOCK_ROWS, LARGE_ROWS, PANEL_INPUTS, STAGED_INPUTS
from gpu_worker.cpu.ops import CpuOps
from gpu_worker.cpu.team import Team


def check(team: Team, num_rows: int, num_inputs: int, num_outputs: int, *, has_bias: bool, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Rows further apart than they are long, as a part of a wider tensor has them.
    x = torch.randn(num_rows, num_inputs + 5, generator=generator).bfloat16()[:, :num_inputs]
    weight = torch.randn(num_outputs, num_inputs, generator=generator).bfloat16()
    bias = torch.randn(num_outputs, generator=generator).bfloat16() if has_bias else None
    y = CpuOps(team, attends=False).linear(x, weight, bias)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert y.dtype == torch.bfloat16
    # One rounding to bfloat16, of sums in float32 whose terms are about sqrt(num_inputs) large together.
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5 * num_inputs)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_rows=st.integers(1, 30),
    num_inputs=st.integers(1, 400),
    num_outputs=st.integers(1, 300),
    has_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_few_rows(team: Team, num_rows: int, num_inputs: int, num_outputs: int, has_bias: bool, seed: int) -> None:
    check(team, num_rows, num_inputs, num_outputs, has_bias=has_bias, seed=seed)


@pytest.mark.parametrize("num_rows", [1, 2, 4, 5, BLOCK_ROWS - 1, LARGE_ROWS, LARGE_ROWS + 1, 600])
@pytest.mark.parametrize("num_inputs", [PANEL_INPUTS, STAGED_INPUTS, STAGED_INPUTS + 1, 2 * STAGED_INPUTS + 7])
def test_rows_and_inputs_in_several_parts(team: Team, num_rows: int, num_inputs: int) -> None:
    check(team, num_rows, num_inputs, 131, has_bias=True)


def test_other_types_are_torchs(team: Team) -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    assert torch.equal(CpuOps(team, attends=False).linear(x, weight, None), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("num_rows", [6, 20])
def test_what_is_not_finite_stays_in_its_row(team: Team, num_rows: int) -> None:
    x, weight = torch.ones(num_rows, 40).bfloat16(), torch.ones(23, 40).bfloat16()
    x[2, 3], x[4, 0] = float("nan"), float("inf")
    y = CpuOps(team, attends=False).linear(x, weight, None)
    assert y[2].isnan().all()
    assert y[4].isinf().all()
    others = [row for row in range(num_rows) if row not in (2, 4)]
    assert torch.equal(y[others], torch.full((num_rows - 2, 23), 40.0).bfloat16())
