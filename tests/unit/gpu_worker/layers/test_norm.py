"""RMSNorm against its formula in float64, in every form that it is computed in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.norm import RMSNorm
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.quant.none import Unquantized


class Stored:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def read(self, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        return self.tensor


def make_norm(weight: torch.Tensor, eps: float, offset: float = 0.0, *, finished: bool = True) -> RMSNorm:
    build = BuildContext(ParallelContext(), Unquantized(), weight.dtype, torch.device("cpu"))
    norm = RMSNorm(len(weight), eps, build, weight_offset=offset)
    norm.load("", "weight", Stored(weight))
    if finished:
        norm.finish()
    return norm


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(1, 7), (3, 64), (2, 5, 18), (40, 576)]),
    st.sampled_from([1e-3, 1.0, 300.0]),
    st.floats(-50, 50),
    st.sampled_from([1e-6, 1e-5, 0.1]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_equals_the_formula(
    shape: tuple[int, ...], scale: float, shift: float, eps: float, finished: bool, seed: int
) -> None:
    """Also far from zero mean, where a LayerNorm would give something else."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * scale + shift
    weight = torch.randn(shape[-1], generator=generator)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    got = make_norm(weight, eps, finished=finished).apply(x)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("num_rows", [1, 33])
def test_bfloat16_is_rounded_once(num_rows: int) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(num_rows, 576) * 5).bfloat16(), torch.randn(576).bfloat16()
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    got = make_norm(weight, 1e-5).apply(x)
    assert got.dtype == torch.bfloat16
    # Half a unit in the last of bfloat16's eight bits, and a little for the arithmetic before it.
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=2**-8 * 1.02)


def test_a_weight_stored_minus_one_is_added_up() -> None:
    x, weight = torch.randn(4, 16), torch.randn(16) * 0.1
    torch.testing.assert_close(make_norm(weight, 1e-6, 1.0).apply(x), make_norm(weight + 1, 1e-6).apply(x))
