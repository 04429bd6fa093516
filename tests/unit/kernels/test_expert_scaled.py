from __future__ import annotations

import pytest
import torch
from stepwire_kernels import reference_experts
from stepwire_kernels.expert_gemm import TileTuning
from stepwire_kernels.expert_scaled import (
    ScaledExpertTuning,
    ScaledExpertWeights,
    ScaledStack,
    default_scaled_tuning,
    mix_scaled_experts,
    quantize_by_expert,
)

from tests.unit.kernels.checks import assert_close, relative_error
from tests.unit.kernels.test_experts import route

SMALL = TileTuning(32, 64, 4, 2)
ROADS = {"few": ScaledExpertTuning(16, SMALL, SMALL), "many": ScaledExpertTuning(64, TileTuning(64, 32, 4, 2), SMALL)}
FLOAT8, INT8 = torch.float8_e4m3fn, torch.int8
# A last bit that falls the other way before values are rounded to 8 bits moves one of them by a step.
FLOAT32_LIMIT = 1e-3


def make_stack(
    num_experts: int, n: int, k: int, kind: torch.dtype, block: tuple[int, int] | None, device: str, *, bias: bool
) -> ScaledStack:
    values = (torch.randn(num_experts, n, k, device=device) * 40).clamp(-127, 127).to(kind)
    block_n, block_k = block or (1, k)
    shape = (num_experts, -(-n // block_n), -(-k // block_k))
    scales = (torch.rand(shape, device=device) + 0.5) / (40 * k**0.5)
    return ScaledStack(values, scales, block_n, block_k, torch.randn(num_experts, n, device=device) if bias else None)


def make(
    kind: torch.dtype,
    sizes: tuple[int, int],
    device: str,
    *,
    block: tuple[int, int] | None = None,
    quantizes: bool = True,
    group: int | None = None,
    static: bool = False,
    bias: bool = False,
    num_experts: int = 3,
) -> ScaledExpertWeights:
    hidden, inner = sizes
    torch.manual_seed(hidden + inner)

    def scales() -> torch.Tensor | None:
        step = 0.02 if kind == INT8 else 0.006
        return (torch.rand(num_experts, device=device) + 0.5) * step if static else None

    return ScaledExpertWeights(
        make_stack(num_experts, 2 * inner, hidden, kind, block, device, bias=bias),
        make_stack(num_experts, hidden, inner, kind, block, device, bias=bias),
        quantizes,
        group,
        scales(),
        scales(),
    )


def check(
    held: ScaledExpertWeights,
    device: str,
    tuning: ScaledExpertTuning | None,
    *,
    num_tokens: int = 5,
    num_experts: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    kind: str = "silu",
    first: int = 0,
) -> None:
    hidden = held.down.values.shape[1]
    x = torch.randn(num_tokens, hidden, device=device).to(dtype)
    weights, chosen = route(num_tokens, 2, num_experts, device)
    out = mix_scaled_experts(
        x,
        weights,
        chosen,
        held,
        kind,
        num_experts=num_experts,
        first_expert=first,
        tuning=tuning,  # type: ignore[arg-type]
    )
    expected = reference_experts.mix_scaled_experts(x, weights, chosen, held, kind, first_expert=first)
    if dtype == torch.float32:
        assert relative_error(out, expected) < FLOAT32_LIMIT
    else:
        assert_close(out, expected, factor=2.0)


@pytest.mark.parametrize(
    ("kind", "road", "static"),
    [
        (FLOAT8, "few", False),
        (INT8, "many", True),
        *(
            pytest.param(kind, road, static, marks=pytest.mark.slow)
            for kind, road, static in ((INT8, "few", False), (FLOAT8, "many", True), (FLOAT8, "few", True))
        ),
    ],
)
def test_a_scale_for_every_output(device: str, kind: torch.dtype, road: str, static: bool) -> None:
    check(make(kind, (96, 48), device, static=static), device, ROADS[road])


@pytest.mark.parametrize("road", ["few", pytest.param("many", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("block", "group"),
    [
        ((32, 64), 64),
        pytest.param((32, 64), None, marks=pytest.mark.slow),
        pytest.param(None, 64, marks=pytest.mark.slow),
        ((1, 32), 64),
        pytest.param((32, 64), 32, marks=pytest.mark.slow),
    ],
    ids=["blocks", "blocks and tokens", "outputs and groups", "share of a block", "finer inputs"],
)
def test_scales_of_blocks(device: str, road: str, block: tuple[int, int] | None, group: int | None) -> None:
    """Down's last block is a part of one, in both directions."""
    check(make(FLOAT8, (160, 96), device, block=block, group=group), device, ROADS[road])


@pytest.mark.parametrize(
    ("kind", "block"), [(FLOAT8, (32, 64)), (INT8, None), pytest.param(FLOAT8, None, marks=pytest.mark.slow)]
)
def test_inputs_as_they_are(device: str, kind: torch.dtype, block: tuple[int, int] | None) -> None:
    held = make(kind, (96, 64), device, block=block, quantizes=False)
    check(held, device, ROADS["few"], dtype=torch.float16 if kind == INT8 else torch.bfloat16)
    x, (weights, chosen) = torch.randn(4, 96, device=device), route(4, 2, 3, device)
    out = mix_scaled_experts(x, weights, chosen, held, "silu")
    assert_close(out, reference_experts.mix_scaled_experts(x, weights, chosen, held, "silu"), factor=2.0)


def test_biases_and_a_clamped_activation(device: str) -> None:
    check(make(FLOAT8, (80, 40), device, bias=True), device, ROADS["few"], kind="swiglu_oai")


@pytest.mark.parametrize("static", [False, True])
def test_a_rank_adds_up_the_experts_it_holds(device: str, static: bool) -> None:
    check(make(FLOAT8, (64, 32), device, static=static, num_experts=2), device, ROADS["few"], num_experts=5, first=2)


@pytest.mark.parametrize("num_tokens", [1, pytest.param(70, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_default_launches(device: str, num_tokens: int, dtype: torch.dtype) -> None:
    check(make(FLOAT8, (128, 128), device, block=(64, 64), group=64), device, None, num_tokens=num_tokens, dtype=dtype)


def test_values_by_expert_are_those_of_its_scale(device: str) -> None:
    x = torch.randn(3, 40, device=device) * 3
    static = torch.tensor([0.02, 0.5], device=device)
    chosen = torch.tensor([[0, 2], [1, 0], [2, 1]], dtype=torch.int32, device=device)
    values, scales = quantize_by_expert(x, chosen, static, INT8, row_share=2, first_expert=1)
    for pair, expert in enumerate(chosen.flatten().tolist()):
        if expert == 0:
            continue
        assert scales[pair].item() == static[expert - 1].item()
        expected = (x[pair // 2] / static[expert - 1]).round().clamp(-128, 127)
        assert torch.equal(values[pair].float(), expected)


def test_more_pairs_mean_larger_tiles() -> None:
    rows = [default_scaled_tuning(count, 8, 128, torch.bfloat16).tile_rows for count in (1, 128, 256, 512, 8192)]
    assert rows == [16, 16, 32, 64, 128]


def test_misfits_are_refused(device: str) -> None:
    held = make(FLOAT8, (64, 32), device)
    weights, chosen = route(2, 1, 3, device)
    x = torch.zeros(2, 64, device=device)
    with pytest.raises(ValueError, match="takes x"):
        mix_scaled_experts(torch.zeros(2, 32, device=device), weights, chosen, held, "silu")
    with pytest.raises(ValueError, match="float32"):
        mix_scaled_experts(x, weights.half(), chosen, held, "silu")
    with pytest.raises(ValueError, match="unknown activation"):
        mix_scaled_experts(x, weights, chosen, held, "relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="up begins inside"):
        mix_scaled_experts(x, weights, chosen, make(FLOAT8, (64, 48), device, block=(32, 32)), "silu")
    with pytest.raises(ValueError, match="powers of two"):
        mix_scaled_experts(x, weights, chosen, make(FLOAT8, (64, 32), device, block=(32, 24)), "silu")
