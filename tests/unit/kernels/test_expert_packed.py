from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from stepwire_kernels import reference_experts
from stepwire_kernels.expert_packed import PackedExpertTuning, PackedExpertWeights
from stepwire_kernels.experts import ExpertWeights, default_packed_tuning, mix_packed_experts

from gpu_worker.quant.expert_stack import pack_expert, stack_experts
from gpu_worker.quant.weights import QuantizedWeight
from tests.unit.gpu_worker.quant.packed_cases import affine, float4, random_blocks
from tests.unit.kernels.checks import assert_close
from tests.unit.kernels.test_experts import route
from tests.unit.kernels.test_packed_linear import on_device

Make = Callable[[int, int, int], QuantizedWeight]
MAKES: dict[str, Make] = {
    "int4-g64": lambda seed, n, k: affine(n, k, 64, 4, seed=seed),
    "int4-g32-symmetric": lambda seed, n, k: affine(n, k, 32, 4, symmetric=True, seed=seed),
    "int8-channel": lambda seed, n, k: affine(n, k, k, 8, seed=seed),
    "mxfp4": lambda seed, n, k: float4(n, k, 32, seed=seed),
    "nvfp4": lambda seed, n, k: float4(n, k, 16, seed=seed),
    "Q8_0": lambda seed, n, k: random_blocks("Q8_0", n, k, seed=seed),
}
# Two levels of scales, in blocks of 256 inputs.
MAKES_K: dict[str, Make] = {
    name: (lambda seed, n, k, name=name: random_blocks(name, n, k, seed=seed)) for name in ("Q4_K", "Q5_K", "Q6_K")
}
QUICK = ("int4-g64", "mxfp4")
ROADS = {
    "stream": PackedExpertTuning(8, num_warps=2),
    "stream of 16": PackedExpertTuning(16, num_warps=2),
    "tiles": PackedExpertTuning(32, block_n=32, num_stages=2),
}


def make(
    name: str, num_experts: int, hidden: int, inner: int, dtype: torch.dtype, device: str, *, bias: bool
) -> tuple[PackedExpertWeights, ExpertWeights]:
    """Packed experts, and the same as dense float64."""
    gates, downs, dense_gates, dense_downs = [], [], [], []
    for expert in range(num_experts):
        make_weight = (MAKES | MAKES_K)[name]
        parts = [make_weight(2 * expert + part, inner, hidden) for part in range(2)]
        down = make_weight(100 + expert, hidden, inner)
        for packed, to in ((pack_expert(parts), gates), (pack_expert([down]), downs)):
            assert packed is not None
            to.append(packed)
        dense_gates.append(torch.cat([part.dequantize() for part in parts]).double())
        dense_downs.append(down.dequantize().double())
    biases = [torch.randn(num_experts, size).to(dtype) if bias else None for size in (2 * inner, hidden)]
    held = [None if one is None else one.to(device) for one in biases]
    gate_up, down = (on_device(stack_experts(one), device) for one in (gates, downs))
    wide = [None if one is None else one.double() for one in held]
    dense = ExpertWeights(torch.stack(dense_gates).to(device), torch.stack(dense_downs).to(device), *wide)
    return PackedExpertWeights(gate_up, down, *held), dense


def check(
    name: str,
    device: str,
    tuning: PackedExpertTuning | None,
    *,
    num_tokens: int = 3,
    sizes: tuple[int, int] = (64, 32),
    dtype: torch.dtype = torch.bfloat16,
    kind: str = "silu",
    bias: bool = False,
    first: int = 0,
) -> None:
    torch.manual_seed(3)
    held, dense = make(name, 2, *sizes, dtype, device, bias=bias)
    x = (torch.randn(num_tokens, sizes[0], device=device) / 8).to(dtype)
    weights, chosen = route(num_tokens, 2, 3, device)
    out = mix_packed_experts(x, weights, chosen, held, kind, num_experts=3, first_expert=first, tuning=tuning)  # type: ignore[arg-type]
    expected = reference_experts.mix_experts(x.double(), weights.double(), chosen, dense, kind, first_expert=first)
    # Rounded twice: between the products, and each pair's output before the sum.
    assert_close(out, expected, factor=2.0)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MAKES]
)
@pytest.mark.parametrize("road", ["stream", pytest.param("stream of 16", marks=pytest.mark.slow), "tiles"])
def test_every_format_matches_its_twin(device: str, name: str, road: str) -> None:
    check(name, device, ROADS[road])


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKES_K)
@pytest.mark.parametrize("road", ["stream", "tiles"])
def test_k_types(device: str, name: str, road: str) -> None:
    check(name, device, ROADS[road], sizes=(256, 256))


@pytest.mark.parametrize("road", ["stream", pytest.param("stream of 16", marks=pytest.mark.slow), "tiles"])
def test_gpt_oss(device: str, road: str) -> None:
    """Biases, clamped activation, an inner size that is no multiple of a block of rows or of two tiles."""
    check("mxfp4", device, ROADS[road], sizes=(160, 32), kind="swiglu_oai", bias=True, num_tokens=2)
    check("int4-g32-symmetric", device, ROADS[road], sizes=(40, 24), kind="swiglu_oai", bias=True, num_tokens=2)


@pytest.mark.parametrize("road", ["stream", "tiles"])
def test_a_rank_adds_up_the_experts_it_holds(device: str, road: str) -> None:
    check("int4-g64", device, ROADS[road], first=1)


@pytest.mark.parametrize("num_tokens", [1, 30])
def test_default_launches(device: str, num_tokens: int) -> None:
    check("int4-g64", device, None, num_tokens=num_tokens, dtype=torch.float32)


def test_more_pairs_mean_larger_tiles() -> None:
    rows = [default_packed_tuning(count, 8, 128, torch.bfloat16).tile_rows for count in (1, 64, 128, 512, 8192)]
    assert rows == [8, 8, 16, 64, 128]


def test_experts_keep_few_bits(device: str) -> None:
    held, dense = make("mxfp4", 3, 256, 128, torch.bfloat16, device, bias=False)
    assert held.num_bytes() < 0.3 * 2 * (dense.gate_up.numel() + dense.down.numel())


def test_misfits_are_refused(device: str) -> None:
    held, _ = make("mxfp4", 2, 64, 32, torch.bfloat16, device, bias=False)
    weights, chosen = route(2, 1, 2, device)
    with pytest.raises(ValueError, match="takes x"):
        mix_packed_experts(torch.zeros(2, 32, device=device), weights, chosen, held, "silu")
    with pytest.raises(ValueError, match="float32"):
        mix_packed_experts(torch.zeros(2, 64, device=device), weights.half(), chosen, held, "silu")
