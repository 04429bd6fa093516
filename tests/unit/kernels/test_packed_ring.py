from __future__ import annotations

import pytest
import torch
from stepwire_kernels import packed_ring, reference
from stepwire_kernels.packed_ring import RingTuning, ring_linear
from stepwire_kernels.packed_weight import PackedWeight, unpack
from stepwire_kernels.split_k import allocate_linear_workspace

from tests.unit.gpu_worker.quant.packed_cases import WEIGHTS
from tests.unit.kernels.checks import assert_close, poison
from tests.unit.kernels.few_tokens import affine_weight, check_format, check_linear
from tests.unit.kernels.gluon_on_torch import OnTorch


@pytest.fixture(autouse=True)
def _run_on_torch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the kernel's source runs on torch tensors."""
    if device == "cpu":
        monkeypatch.setattr(packed_ring, "_ring_kernel", OnTorch(packed_ring._ring_kernel))


def check(
    weight: PackedWeight, num_tokens: int, device: str, tuning: RingTuning, dtype: torch.dtype = torch.bfloat16
) -> None:
    check_linear(ring_linear, weight, num_tokens, device, tuning, dtype)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_format_matches_its_twin_or_is_refused(device: str, name: str, dtype: torch.dtype) -> None:
    check_format(ring_linear, name, dtype, device, RingTuning(1, 1, 2, 2, 2))


@pytest.mark.parametrize("group", [32, 64, 128, 256, 1 << 25])
@pytest.mark.parametrize("num_tokens", [1, 8, 13])
def test_groups_and_tokens(device: str, group: int, num_tokens: int) -> None:
    weight = affine_weight(64, 512, min(group, 512), device)
    check(weight, num_tokens, device, RingTuning(2, 1, 4, 1, 2))


@pytest.mark.parametrize(
    "tuning",
    [RingTuning(2, 1, 4, 3, 2), RingTuning(1, 3, 2, 2, 4), RingTuning(3, 2, 8, 1, 2), RingTuning(9, 1, 1, 9, 3)],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [2, 16])
def test_what_does_not_divide(device: str, tuning: RingTuning, num_tokens: int) -> None:
    """The last rows are half a block, the last warps have less to do, or nothing, and so have the last programs."""
    check(affine_weight(104, 1152, 128, device), num_tokens, device, tuning)


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("num_turns", [1, 6, 7, 9, 10, 13, 14])
def test_turns_as_a_loop_and_one_behind_another(device: str, num_turns: int, slots: int) -> None:
    weight = affine_weight(2 * num_turns * 16, 512, 128, device)
    check(weight, 3, device, RingTuning(2, 1, 2, 1, slots))


@pytest.mark.parametrize("num_tokens", [1, 16])
def test_what_divides_evenly(device: str, num_tokens: int) -> None:
    check(affine_weight(192, 2048, 128, device), num_tokens, device, RingTuning(2, 2, 4, 2, 2))


def test_bfloat16_of_any_size(device: str) -> None:
    """Inputs are scaled: neither large ones nor small ones may be lost."""
    weight = affine_weight(32, 256, 128, device)
    workspace = allocate_linear_workspace(device, partial_words=1 << 12)
    for exponent in (-60, 60 - 36):
        x = torch.randn(4, 256, device=device).mul(2.0**exponent).bfloat16()
        out = poison(4, 32, dtype=x.dtype, device=device)
        ring_linear(x, weight, None, workspace, RingTuning(1, 1, 2, 1, 2), out)
        scale = 2.0**-exponent
        assert_close(out * scale, reference.linear(x.double() * scale, unpack(weight)))


def test_misfits_are_refused(device: str) -> None:
    weight = affine_weight(32, 512, 128, device)
    x = torch.zeros(17, 512, dtype=torch.bfloat16, device=device)
    workspace = allocate_linear_workspace(device, partial_words=16)
    with pytest.raises(ValueError, match="up to 16 tokens, got 17"):
        ring_linear(x, weight, None, workspace, RingTuning(), x)
    with pytest.raises(ValueError, match="one slot"):
        ring_linear(x[:1], weight, None, workspace, RingTuning(slots=1), x)
    with pytest.raises(ValueError, match="more workspace"):
        ring_linear(x[:1], weight, None, workspace, RingTuning(2, 1, 1, 1), x)
    with pytest.raises(ValueError, match="16-bit inputs"):
        ring_linear(x[:1].float(), weight, None, workspace, RingTuning(), x)
