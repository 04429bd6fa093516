"""The kernel's layout holds exactly the weights that the checkpoint's tensors mean."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from stepwire_kernels.packed_weight import unpack

from gpu_worker.quant.repack import repack
from gpu_worker.quant.weights import QuantizedWeight
from tests.unit.gpu_worker.quant.packed_cases import KERNEL_TYPES, WEIGHTS, affine, random_blocks


def check_exact(weight: QuantizedWeight) -> None:
    repacked = repack(weight)
    assert repacked is not None
    got = unpack(repacked.weight)  # [N, K of the packed weight]
    if repacked.order is not None:
        given = got
        got = torch.zeros(weight.num_outputs, weight.num_inputs, dtype=torch.float64)
        for position, source in enumerate(repacked.order.tolist()):
            if source < weight.num_inputs:
                got[:, source] = given[:, position]
    assert torch.equal(got.float(), weight.dequantize()) or torch.allclose(
        got, weight.dequantize().double(), rtol=3e-7, atol=1e-9
    )


@pytest.mark.parametrize("name", WEIGHTS)
def test_nothing_is_lost(name: str) -> None:
    check_exact(WEIGHTS[name]())


def test_act_order_sorts_the_inputs() -> None:
    groups = torch.arange(192) // 64
    shuffled = groups[torch.randperm(192, generator=torch.Generator().manual_seed(2))]
    weight = affine(16, 192, 64, 4, groups=shuffled)
    repacked = repack(weight)
    assert repacked is not None and repacked.weight.num_inputs == 192  # whole groups need no filling
    check_exact(weight)


def test_a_share_of_an_act_ordered_weight_fills_its_groups() -> None:
    groups = (torch.arange(256) // 64)[torch.randperm(256, generator=torch.Generator().manual_seed(3))][:100]
    weight = affine(16, 100, 64, 4, groups=groups)
    repacked = repack(weight)
    assert repacked is not None and repacked.weight.num_inputs > 100
    check_exact(weight)


@pytest.mark.parametrize("group_size", [48, 96])
def test_groups_that_the_kernel_cannot_count_have_no_layout(group_size: int) -> None:
    assert repack(affine(8, 288, group_size, 4)) is None


@pytest.mark.parametrize("name", KERNEL_TYPES)
def test_gguf_blocks_are_those_of_the_gguf_package(name: str) -> None:
    weight = random_blocks(name, 8, 512)
    expected = dequantize(weight.blocks.numpy(), GGMLQuantizationType[name])
    assert torch.equal(weight.dequantize(), torch.from_numpy(expected))
