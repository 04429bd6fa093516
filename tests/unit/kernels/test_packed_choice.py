from __future__ import annotations

import dataclasses

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.expert_packed import PackedExpertTuning, PackedExpertWeights
from stepwire_kernels.packed_choice import (
    DENSE_FROM_TOKENS,
    choose_linear,
    dense_from,
    measured_experts,
    measured_linear,
    multiply_packed,
)
from stepwire_kernels.packed_linear import PackedTuning, StreamTuning
from stepwire_kernels.packed_ring import RingTuning
from stepwire_kernels.packed_weight import PackedWeight, unpack
from stepwire_kernels.packed_wgmma import WgmmaTuning
from stepwire_kernels.reference_packed import rounded
from stepwire_kernels.split_k import allocate_linear_workspace

from tests.unit.gpu_worker.quant.packed_cases import WEIGHTS
from tests.unit.kernels.checks import assert_close
from tests.unit.kernels.test_packed_linear import packed

H100 = "NVIDIA H100 80GB HBM3"
H200 = "NVIDIA H200"


def shape_only(n: int, k: int, group: int, *, is_e2m1: bool = False, experts: int | None = None) -> PackedWeight:
    """A weight without memory."""
    leading = () if experts is None else (experts,)
    words = torch.empty(*leading, n // 16, 2 * -(-k // 128), 128, dtype=torch.int32, device="meta")
    scales = torch.empty(*leading, -(-k // group), n, device="meta")
    return PackedWeight(words, None, scales, None, None, None, None, None, k, group, is_e2m1=is_e2m1)


def test_experts_take_the_nearest_measured_number_of_tokens() -> None:
    held = PackedExpertWeights(
        shape_only(1536, 2048, 128, experts=128), shape_only(2048, 768, 128, experts=128), None, None
    )
    assert measured_experts(H100, held, 40, 8, 128) == PackedExpertTuning(8, 64, 2, 3)
    assert measured_experts(H100, held, 5000, 8, 128) == PackedExpertTuning(128, 64, 4, 3)
    assert measured_experts(H100, held, 8, 8, 128) is None  # neither 1 nor 32 is near
    assert measured_experts(H100, held, 32, 4, 128) is None
    assert measured_experts("another device", held, 32, 8, 128) is None


def test_linears_take_the_next_larger_measured_number_of_tokens() -> None:
    weight = shape_only(4096, 4096, 128)
    shapes = [measured_linear(H100, weight, num_tokens) for num_tokens in (1, 12, 16, 200, 257)]
    assert isinstance(shapes[1], WgmmaTuning) and shapes[1] == shapes[2]
    assert isinstance(shapes[3], WgmmaTuning) and shapes[3].block_m == 128
    assert shapes[4] is None
    assert measured_linear(H100, shape_only(4096, 4096, 64), 1) is None


def test_a_card_takes_its_own_few_tokens_and_its_twins_many() -> None:
    weight = shape_only(4096, 14336, 128)
    assert isinstance(measured_linear(H200, weight, 1), RingTuning)
    assert measured_linear(H200, weight, 5) == measured_linear(H200, weight, 8) != measured_linear(H100, weight, 8)
    assert measured_linear(H200, weight, 200) == measured_linear(H100, weight, 200) is not None


def test_what_was_not_measured_has_a_default() -> None:
    weight = shape_only(48, 256, 128)
    assert measured_linear(H100, weight, 1) is None
    assert isinstance(choose_linear(torch.empty(1, 256), weight), StreamTuning)
    assert isinstance(choose_linear(torch.empty(16, 256), weight), StreamTuning)
    assert isinstance(choose_linear(torch.empty(17, 256), weight), PackedTuning)


@pytest.mark.parametrize("num_tokens", [3, DENSE_FROM_TOKENS])
def test_both_roads_give_the_twins_numbers(device: str, num_tokens: int) -> None:
    weight = packed("int4-g64-odd-k", device)
    x = torch.randn(num_tokens, weight.num_inputs, device=device).bfloat16()
    scratch = torch.full((weight.num_outputs * weight.num_inputs,), float("nan"), dtype=x.dtype, device=device)
    out = multiply_packed(x, weight, None, allocate_linear_workspace(device, partial_words=1 << 17), scratch=scratch)
    assert_close(out, reference.linear(x.double(), unpack(weight)), factor=2.0)
    assert bool(scratch.isnan().any()) == (num_tokens < dense_from(x, weight))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights_are_near_exact_ones(name: str, dtype: torch.dtype) -> None:
    """Half a unit for the scale, half for the product, and those of a minimum."""
    weight = dataclasses.replace(packed(name, "cpu"), row_scales=None)
    exact, near = unpack(weight), rounded(weight, dtype)
    unit = torch.finfo(dtype).eps
    largest = exact.abs().amax(dim=1, keepdim=True)
    assert ((near - exact).abs() <= unit * (exact.abs() + largest) + 1e-7).all()
    if weight.exponents:
        assert torch.equal(near, exact)
