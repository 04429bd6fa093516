from __future__ import annotations

import pytest
import torch
from stepwire_kernels import packed_in_flight
from stepwire_kernels.packed_in_flight import InFlightTuning, in_flight_linear, takes
from stepwire_kernels.packed_weight import PackedWeight
from stepwire_kernels.split_k import allocate_linear_workspace

from tests.unit.gpu_worker.quant.packed_cases import WEIGHTS
from tests.unit.kernels.few_tokens import affine_weight, check_format, check_linear
from tests.unit.kernels.gluon_on_torch import OnTorch
from tests.unit.kernels.test_packed_linear import packed


@pytest.fixture(autouse=True)
def _run_on_torch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the kernel's source runs on torch tensors."""
    if device == "cpu":
        monkeypatch.setattr(packed_in_flight, "_in_flight_kernel", OnTorch(packed_in_flight._in_flight_kernel))


def check(
    weight: PackedWeight, num_tokens: int, device: str, tuning: InFlightTuning, dtype: torch.dtype = torch.bfloat16
) -> None:
    check_linear(in_flight_linear, weight, num_tokens, device, tuning, dtype)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_format_matches_its_twin_or_is_refused(device: str, name: str, dtype: torch.dtype) -> None:
    check_format(in_flight_linear, name, dtype, device, InFlightTuning(2, 2, 2, 1))


def test_the_formats_that_linears_come_in_are_taken(device: str) -> None:
    x = torch.zeros(1, 576, dtype=torch.bfloat16)
    taken = {name for name in WEIGHTS if takes(x, packed(name, "cpu"))}
    assert {"int4-g64-odd-k", "Q4_0"} <= taken
    assert not taken & {"int8-channel", "mxfp4", "Q4_K", "Q6_K", "int4-g16"}


@pytest.mark.parametrize("group", [32, 64, 128, 256, 1 << 25])
@pytest.mark.parametrize("num_tokens", [1, 8, 13])
def test_groups_and_tokens(device: str, group: int, num_tokens: int) -> None:
    weight = affine_weight(32, 512, min(group, 512), device)
    check(weight, num_tokens, device, InFlightTuning(2, 4, 1, 1))


@pytest.mark.parametrize(
    "tuning",
    [InFlightTuning(1, 4, 3, 2), InFlightTuning(3, 2, 2, 5), InFlightTuning(2, 8, 1), InFlightTuning(4, 1, 9, 1)],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [2, 16])
def test_what_does_not_divide(device: str, tuning: InFlightTuning, num_tokens: int) -> None:
    """The last rows are half a block, the last warps have less to do, or nothing, and so have the last programs."""
    check(affine_weight(40, 1152, 128, device), num_tokens, device, tuning)


@pytest.mark.parametrize("num_tokens", [1, 16])
def test_what_divides_evenly(device: str, num_tokens: int) -> None:
    check(affine_weight(96, 2048, 128, device), num_tokens, device, InFlightTuning(2, 4, 2, 1))


def test_too_many_scales_to_keep_are_read_behind_the_products(device: str) -> None:
    check(affine_weight(64, 1024, 32, device), 3, device, InFlightTuning(4, 4, 2))


def test_misfits_are_refused(device: str) -> None:
    weight = affine_weight(32, 512, 128, device)
    x = torch.zeros(17, 512, dtype=torch.bfloat16, device=device)
    workspace = allocate_linear_workspace(device, partial_words=16)
    with pytest.raises(ValueError, match="up to 16 tokens, got 17"):
        in_flight_linear(x, weight, None, workspace, InFlightTuning(), x)
    with pytest.raises(ValueError, match="more workspace"):
        in_flight_linear(x[:1], weight, None, workspace, InFlightTuning(1, 1, 1), x)
    with pytest.raises(ValueError, match="16-bit inputs"):
        in_flight_linear(x[:1].float(), weight, None, workspace, InFlightTuning(), x)
