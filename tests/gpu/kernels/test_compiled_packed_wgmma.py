"""`packed_wgmma` runs compiled only: Gluon has no interpreter."""

from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.packed_linear import packed_linear
from stepwire_kernels.packed_weight import PackedWeight
from stepwire_kernels.packed_wgmma import WgmmaTuning, serves
from stepwire_kernels.reference_packed import rounded
from stepwire_kernels.split_k import allocate_linear_workspace

from gpu_worker.quant.repack import repack
from tests.unit.gpu_worker.quant.packed_cases import WEIGHTS, affine
from tests.unit.kernels.checks import assert_close, poison
from tests.unit.kernels.test_packed_linear import on_device, packed

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a device of capability 9")


def check(weight: PackedWeight, num_tokens: int, dtype: torch.dtype, tuning: WgmmaTuning, *, pdl: bool = False) -> None:
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, weight.num_inputs, device="cuda").to(dtype)
    if not serves(x, weight):
        pytest.skip("not of this kernel's sizes")
    bias = torch.randn(weight.num_outputs, device="cuda").to(dtype)
    workspace = allocate_linear_workspace("cuda")
    workspace.partial.fill_(float("nan"))
    expected = reference.linear(x.double(), rounded(weight, dtype), bias.double())
    for _ in range(3):
        out = poison(num_tokens, weight.num_outputs, dtype=dtype, device="cuda")
        packed_linear(x, weight, bias, workspace, tuning=tuning, out=out, pdl=pdl)
        # Only sums and outputs are rounded: the weights are those of the twin.
        assert_close(out, expected, factor=0.5)
        assert not workspace.counters.any()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_format_matches_its_twin(name: str, dtype: torch.dtype) -> None:
    check(packed(name, "cuda"), 21, dtype, WgmmaTuning(32, 4, 1, 1, 3, 2))


@pytest.mark.parametrize(
    "tuning",
    [
        WgmmaTuning(16, 8, 1, 1, 6, 4),
        WgmmaTuning(16, 4, 1, 4, 6, 4),
        WgmmaTuning(64, 8, 2, 2, 4, 2),
        WgmmaTuning(128, 8, 2, 1, 3, 2),
        WgmmaTuning(128, 4, 1, 3, 3, 2),
        WgmmaTuning(256, 8, 1, 4, 3, 2),
        WgmmaTuning(256, 4, 1, 2, 3, 2),
        WgmmaTuning(256, 4, 1, 2, 3, 2, first_pairs=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [1, 16, 200, 300])
def test_launch_shapes(tuning: WgmmaTuning, num_tokens: int) -> None:
    repacked = repack(affine(1048, 4096 + 64, 64, 4))
    assert repacked is not None
    check(on_device(repacked.weight, "cuda"), num_tokens, torch.bfloat16, tuning, pdl=True)


def test_an_empty_part_of_the_inputs() -> None:
    """Three parts of four 128 inputs are two, two and none."""
    repacked = repack(affine(40, 512, 128, 4))
    assert repacked is not None
    check(on_device(repacked.weight, "cuda"), 20, torch.bfloat16, WgmmaTuning(32, 4, 1, 3, 3, 2))
