from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference
from stepwire_kernels.packed_choice import choose_linear
from stepwire_kernels.packed_linear import PackedTuning, StreamTuning, packed_linear
from stepwire_kernels.packed_weight import PackedWeight, unpack
from stepwire_kernels.split_k import allocate_linear_workspace

from gpu_worker.quant.repack import repack
from tests.unit.gpu_worker.quant.packed_cases import WEIGHTS, affine
from tests.unit.kernels.checks import USUAL_DTYPES, assert_close, poison


def packed(name: str, device: str) -> PackedWeight:
    repacked = repack(WEIGHTS[name]())
    assert repacked is not None and repacked.order is None
    return on_device(repacked.weight, device)


def on_device(weight: PackedWeight, device: str) -> PackedWeight:
    fields = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in vars(weight).items()
    }
    return PackedWeight(**fields)


# One of each road through the kernels; the rest are slow.
QUICK = ("int4-g64-odd-k", "int4-g16", "int8-channel", "mxfp4", "Q4_K", "Q5_0")
Tuning = StreamTuning | PackedTuning | None
STREAM, TILE = StreamTuning(1, 2, 1), PackedTuning(block_n=16, block_m=16, split_k=1, num_stages=2)


def check(weight: PackedWeight, num_tokens: int, dtype: torch.dtype, device: str, tuning: Tuning = None) -> None:
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, weight.num_inputs, device=device).to(dtype)
    bias = torch.randn(weight.num_outputs, device=device).to(dtype)
    workspace = allocate_linear_workspace(device, partial_words=1 << 17)
    workspace.partial.fill_(float("nan"))
    out = poison(num_tokens, weight.num_outputs, dtype=dtype, device=device)
    packed_linear(x, weight, bias, workspace, tuning=tuning or choose_linear(x, weight), out=out)
    # Many tokens: weights are rounded to the activations' type, each by half a unit, which averages out.
    assert_close(out, reference.linear(x.double(), unpack(weight), bias.double()), factor=2.0)
    assert not workspace.counters.any()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WEIGHTS]
)
@pytest.mark.parametrize(("num_tokens", "tuning"), [(3, STREAM), (35, TILE)])
def test_every_format_matches_its_twin(device: str, name: str, num_tokens: int, tuning: Tuning) -> None:
    check(packed(name, device), num_tokens, torch.bfloat16, device, tuning)


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize(
    "name",
    [
        "int4-g64-odd-k",
        "nvfp4",
        pytest.param("Q6_K", marks=pytest.mark.slow),
        pytest.param("MXFP4", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("num_tokens", "tuning"), [(1, STREAM), (17, TILE)])
def test_every_activation_type(device: str, dtype: torch.dtype, name: str, num_tokens: int, tuning: Tuning) -> None:
    check(packed(name, device), num_tokens, dtype, device, tuning)


@pytest.mark.parametrize("row_blocks", [1, 2])
@pytest.mark.parametrize("warps", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("num_tokens", [1, pytest.param(8, marks=pytest.mark.slow), 13])
@pytest.mark.parametrize("ahead", [0, 9])
def test_any_stream(device: str, row_blocks: int, warps: int, num_tokens: int, ahead: int) -> None:
    """The last row block is half full, the last warps have less to do, or nothing."""
    repacked = repack(affine(40, 1152, 128, 4))
    assert repacked is not None
    tuning = StreamTuning(row_blocks, warps, 1, ahead)
    check(on_device(repacked.weight, device), num_tokens, torch.bfloat16, device, tuning)


@pytest.mark.parametrize("name", ["int4-g64-odd-k", "nvfp4", "Q4_K", "Q6_K", "MXFP4"])
def test_all_of_a_weight_ahead(device: str, name: str) -> None:
    """Scales of every kind, and upper bits of codes, fetched before the kernel waits."""
    check(packed(name, device), 3, torch.bfloat16, device, StreamTuning(2, 2, 1, 8))


@pytest.mark.parametrize(
    "split_k", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("streams", [True, False])
def test_split_inputs_add_up(device: str, split_k: int, streams: bool) -> None:
    repacked = repack(affine(40, 1280, 64, 4))
    assert repacked is not None
    weight = on_device(repacked.weight, device)
    tuning = StreamTuning(2, 2, split_k) if streams else PackedTuning(32, 16, split_k, 4, 2)
    check(weight, 2 if streams else 17, torch.bfloat16, device, tuning)


@pytest.mark.parametrize("bits", [5, 6])
def test_codes_between_four_and_eight_bits(device: str, bits: int) -> None:
    repacked = repack(affine(16, 256, 128, bits))
    assert repacked is not None
    check(on_device(repacked.weight, device), 2, torch.bfloat16, device)


def test_more_tokens_than_a_block(device: str) -> None:
    check(packed("int4-g64-odd-k", device), 70, torch.bfloat16, device, PackedTuning(32, 32, 2, 4, 2))


def test_the_default_launch(device: str) -> None:
    check(packed("Q4_K", device), 2, torch.bfloat16, device)


def test_a_workspace_that_is_too_small_means_fewer_parts(device: str) -> None:
    weight = packed("int4-g64-odd-k", device)
    x = torch.randn(2, 576, device=device)
    workspace = allocate_linear_workspace(device, partial_words=16)
    assert_close(
        packed_linear(x, weight, None, workspace, tuning=StreamTuning()),
        reference.linear(x.double(), unpack(weight)),
        factor=2.0,
    )


def test_misfits_are_refused(device: str) -> None:
    workspace = allocate_linear_workspace(device, partial_words=16)
    weight = packed("int4-g64-odd-k", device)
    with pytest.raises(ValueError, match=r"takes x \[num_tokens, 576\]"):
        packed_linear(torch.zeros(2, 512, device=device), weight, None, workspace, tuning=STREAM)
    with pytest.raises(ValueError, match="contiguous columns"):
        packed_linear(torch.zeros(576, 2, device=device).T, weight, None, workspace, tuning=STREAM)
