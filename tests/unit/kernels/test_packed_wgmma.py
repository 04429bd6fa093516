"""`packed_wgmma`'s source on torch tensors; compiled: tests/gpu/kernels/test_compiled_packed_wgmma.py."""

from __future__ import annotations

import pytest
import torch
from stepwire_kernels import packed_wgmma, reference
from stepwire_kernels.packed_weight import PackedWeight
from stepwire_kernels.packed_wgmma import WgmmaTuning, wgmma_linear
from stepwire_kernels.reference_packed import rounded
from stepwire_kernels.split_k import allocate_linear_workspace

from tests.unit.gpu_worker.quant.packed_cases import WEIGHTS
from tests.unit.kernels.checks import assert_close, poison
from tests.unit.kernels.few_tokens import affine_weight
from tests.unit.kernels.gluon_on_torch import OnTorch
from tests.unit.kernels.test_packed_linear import packed


@pytest.fixture(autouse=True)
def _run_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_wgmma, "_wgmma_kernel", OnTorch(packed_wgmma._wgmma_kernel))
    monkeypatch.setattr(packed_wgmma, "serves", lambda x, weight: True)


def check(weight: PackedWeight, num_tokens: int, dtype: torch.dtype, tuning: WgmmaTuning) -> None:
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, weight.num_inputs).to(dtype)
    bias = torch.randn(weight.num_outputs).to(dtype)
    workspace = allocate_linear_workspace("cpu", partial_words=1 << 19)
    workspace.partial.fill_(float("nan"))
    out = poison(num_tokens, weight.num_outputs, dtype=dtype, device="cpu")
    wgmma_linear(x, weight, bias, workspace, tuning, out)
    # Only sums and outputs are rounded: the weights are those of the twin.
    assert_close(out, reference.linear(x.double(), rounded(weight, dtype), bias.double()), factor=0.5)
    assert not workspace.counters.any()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_format_matches_its_twin(name: str, dtype: torch.dtype) -> None:
    weight = packed(name, "cpu")
    if weight.num_inputs % 16 == 0 and (weight.high_words is None or weight.offset % 16 == 0):
        check(weight, 21, dtype, WgmmaTuning(16, 4, 1, 1, 3, 2))


@pytest.mark.parametrize(
    "tuning",
    [
        WgmmaTuning(16, 4, 1, 1, 4, 3),
        WgmmaTuning(32, 4, 2, 3, 3, 2),
        WgmmaTuning(16, 4, 1, 2, 3, 2, first_pairs=7),
        WgmmaTuning(16, 4, 1, 3, 3, 2, first_pairs=4),
        WgmmaTuning(16, 4, 1, 2, 3, 2, first_pairs=12),
    ],
    ids=str,
)
def test_parts_alike_and_unlike(tuning: WgmmaTuning) -> None:
    check(affine_weight(72, 1152, 128, "cpu"), 19, torch.bfloat16, tuning)
