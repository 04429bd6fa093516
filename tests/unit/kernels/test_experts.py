from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stepwire_kernels import expert_gemm, experts, reference_experts
from stepwire_kernels.activation import ACTIVATIONS
from stepwire_kernels.expert_gemm import TileTuning
from stepwire_kernels.expert_gemv import PairDownTuning, PairGateUpTuning
from stepwire_kernels.expert_routing import RouterLogits
from stepwire_kernels.experts import (
    PAIRS,
    ExpertTuning,
    ExpertWeights,
    default_expert_tuning,
    mix_experts,
    mix_routed_experts,
)

from tests.unit.kernels.checks import USUAL_DTYPES, assert_close

SMALL = TileTuning(32, 32, 4, 2)
ROADS = {
    "pairs": replace(PAIRS, pair_gate_up=PairGateUpTuning(16, 2, 1, 2), pair_down=PairDownTuning(32, 32, 1, 1)),
    "pairs, default": PAIRS,
    "tiles": ExpertTuning(16, SMALL, SMALL),
    "large tiles": ExpertTuning(64, TileTuning(64, 32, 4, 2), SMALL),
}


def make(
    num_experts: int, hidden: int, inner: int, dtype: torch.dtype, device: str, *, bias: bool = False
) -> ExpertWeights:
    def randn(*shape: int, scale: float) -> torch.Tensor:
        return (scale * torch.randn(shape, device=device)).to(dtype)

    return ExpertWeights(
        randn(num_experts, 2 * inner, hidden, scale=2 * hidden**-0.5),
        randn(num_experts, hidden, inner, scale=inner**-0.5),
        randn(num_experts, 2 * inner, scale=1.0) if bias else None,
        randn(num_experts, hidden, scale=1.0) if bias else None,
    )


def route(num_tokens: int, num_chosen: int, num_experts: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.rand(num_tokens, num_experts, device=device)
    best = scores.topk(num_chosen, dim=-1)
    return best.values, best.indices.int()


def twin(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, held: ExpertWeights, kind: str, first: int = 0
) -> torch.Tensor:
    wide = ExpertWeights(*(None if tensor is None else tensor.double() for tensor in vars(held).values()))
    return reference_experts.mix_experts(x.double(), weights.double(), chosen, wide, kind, first_expert=first)


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody wrote is NaN: a kernel that reads it shows."""

    def full_of_nan(*shape: object, **options: object) -> torch.Tensor:
        tensor = torch.zeros(*shape, **options)  # type: ignore[call-overload]
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-(2**31))

    class Torch:
        empty = staticmethod(full_of_nan)

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

    for module in (expert_gemm, experts, experts.pair_down.__globals__, experts.build_expert_tiles.__globals__):
        if isinstance(module, dict):
            monkeypatch.setitem(module, "torch", Torch())
        else:
            monkeypatch.setattr(module, "torch", Torch())


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("num_tokens", "num_chosen", "num_experts", "hidden", "inner"),
    [(1, 2, 4, 64, 96), (5, 3, 7, 60, 45), pytest.param(9, 1, 3, 33, 70, marks=pytest.mark.slow)],
)
def test_matches_twin(
    device: str,
    dtype: torch.dtype,
    road: str,
    num_tokens: int,
    num_chosen: int,
    num_experts: int,
    hidden: int,
    inner: int,
) -> None:
    held = make(num_experts, hidden, inner, dtype, device, bias=hidden != 33)
    x = torch.randn(num_tokens, hidden, device=device).to(dtype)
    weights, chosen = route(num_tokens, num_chosen, num_experts, device)
    out = mix_experts(x, weights, chosen, held, "silu", tuning=ROADS[road])
    assert_close(out, twin(x, weights, chosen, held, "silu"))


@pytest.mark.parametrize("road", ["pairs", "tiles"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(device: str, road: str, kind: str) -> None:
    held = make(4, 32, 24, torch.float32, device, bias=True)
    x = 4 * torch.randn(4, 32, device=device)
    weights, chosen = route(4, 2, 4, device)
    out = mix_experts(x, weights, chosen, held, kind, tuning=ROADS[road])
    assert_close(out, twin(x, weights, chosen, held, kind))


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("first", [0, 3, pytest.param(6, marks=pytest.mark.slow), 40])
def test_a_rank_adds_up_the_experts_it_holds(device: str, road: str, first: int) -> None:
    """Others' pairs are read from nowhere; a token without a held expert gets zeros."""
    held = make(3, 32, 48, torch.float32, device, bias=True)
    x = torch.randn(9, 32, device=device)
    weights, chosen = route(9, 2, 9, device)
    out = mix_experts(x, weights, chosen, held, "silu", num_experts=9, first_expert=first, tuning=ROADS[road])
    expected = twin(x, weights, chosen, held, "silu", first)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("road", ROADS)
def test_all_tokens_to_one_expert(device: str, road: str) -> None:
    held = make(5, 32, 32, torch.float32, device)
    x = torch.randn(19, 32, device=device)
    chosen = torch.full((19, 1), 3, dtype=torch.int32, device=device)
    weights = torch.rand(19, 1, device=device)
    out = mix_experts(x, weights, chosen, held, "silu", tuning=ROADS[road])
    assert_close(out, twin(x, weights, chosen, held, "silu"))


def test_a_token_that_is_not_finite_stays_alone(device: str) -> None:
    held = make(4, 32, 32, torch.float32, device)
    x = torch.randn(6, 32, device=device)
    weights, chosen = route(6, 2, 4, device)
    for tuning in ROADS.values():
        clean = mix_experts(x, weights, chosen, held, "silu", tuning=tuning)
        spoilt = x.clone()
        spoilt[2] = float("nan")
        out = mix_experts(spoilt, weights, chosen, held, "silu", tuning=tuning)
        others = [0, 1, 3, 4, 5]
        assert out[2].isnan().all() and torch.equal(out[others], clean[others])


def test_results_do_not_vary_and_strided_inputs_are_read(device: str) -> None:
    held = make(6, 64, 32, torch.bfloat16, device)
    x = torch.randn(14, 128, device=device).bfloat16()[:, :64]
    weights, chosen = route(14, 3, 6, device)
    first = mix_experts(x, weights, chosen, held, "silu")
    for _ in range(1 if device == "cpu" else 3):
        assert torch.equal(mix_experts(x.contiguous(), weights, chosen, held, "silu"), first)


def test_the_road_follows_the_number_of_pairs_for_an_expert() -> None:
    def rows(num_tokens: int, num_chosen: int = 8, num_experts: int = 128) -> int:
        return default_expert_tuning(num_tokens, num_chosen, num_experts, torch.bfloat16).tile_rows

    assert [rows(count) for count in (1, 4, 5, 32, 256, 512, 8192)] == [0, 0, 16, 16, 32, 64, 128]
    # Few experts: two tokens meet soon, and share what is read.
    assert [rows(count, 2, 8) for count in (1, 2, 32, 64)] == [0, 16, 16, 32]


def test_every_default_launch_shape_computes_the_same(device: str) -> None:
    held = make(2, 96, 64, torch.bfloat16, device)
    x = torch.randn(3, 96, device=device).bfloat16()
    weights, chosen = route(3, 1, 2, device)
    expected = twin(x, weights, chosen, held, "silu")
    for tuning in (PAIRS, *experts.TILES.values()):
        assert_close(mix_experts(x, weights, chosen, held, "silu", tuning=tuning), expected)


ROUTERS = {
    "softmax": {"renormalize": True},
    "softmax as it is": {"scale": 0.5},
    "sigmoid": {"sigmoid": True, "renormalize": True, "sum_eps": 1e-20, "scale": 2.5},
}


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), [(1, 12, 3), (3, 37, 8), (4, 2, 1)])
def test_products_of_pairs_choose_their_experts(
    device: str,
    name: str,
    corrects: bool,
    dtype: torch.dtype,
    num_tokens: int,
    num_experts: int,
    num_chosen: int,
) -> None:
    """As `choose_experts` does; some experts are another rank's, and logits are columns of something wider."""
    held = make(num_experts - 1, 40, 24, dtype, device, bias=corrects)
    x = torch.randn(num_tokens, 40, device=device).to(dtype)
    logits = (2 * torch.randn(num_tokens, num_experts + 3, device=device)).to(dtype)[:, :num_experts]
    correction = torch.randn(num_experts, device=device) if corrects else None
    routed = RouterLogits(logits, num_chosen, correction=correction, **ROUTERS[name])  # type: ignore[arg-type]
    out = mix_routed_experts(x, routed, held, "silu", num_experts=num_experts, first_expert=1, tuning=ROADS["pairs"])
    weights, chosen = reference_experts.choose_experts(
        logits.float(),
        num_chosen,
        correction=correction,
        **ROUTERS[name],  # type: ignore[arg-type]
    )
    assert_close(out, twin(x, weights, chosen, held, "silu", 1))


def test_of_logits_that_are_equal_the_lower_numbers_are_chosen(device: str) -> None:
    held = make(9, 32, 16, torch.float32, device)
    x = torch.randn(3, 32, device=device)
    logits = torch.zeros(3, 9, device=device)
    logits[1, 7] = 1
    logits[2, ::2] = -0.0
    routed = RouterLogits(logits, 3, renormalize=True)
    expected = mix_experts(x, *routed.choose(), held, "silu", tuning=PAIRS)
    assert_close(mix_routed_experts(x, routed, held, "silu", tuning=PAIRS), expected)


def test_logits_that_are_not_finite_read_experts_that_exist(device: str) -> None:
    held = make(6, 32, 16, torch.float32, device)
    x = torch.randn(4, 32, device=device)
    logits = torch.randn(4, 6, device=device)
    logits[0] = float("nan")
    logits[1, 4] = -float("nan")
    logits[2, :5] = float("-inf")
    out = mix_routed_experts(x, RouterLogits(logits, 3), held, "silu", tuning=PAIRS)
    assert out[:2].isnan().all()
    weights, chosen = reference_experts.choose_experts(logits[2:], 3)
    assert_close(out[2:], twin(x[2:], weights, chosen, held, "silu"))


def test_a_road_with_tiles_chooses_by_a_launch_of_its_own(device: str) -> None:
    held = make(4, 32, 32, torch.float32, device)
    x = torch.randn(9, 32, device=device)
    logits = torch.randn(9, 4, device=device)
    out = mix_routed_experts(x, RouterLogits(logits, 2), held, "silu")
    weights, chosen = reference_experts.choose_experts(logits, 2)
    assert_close(out, twin(x, weights, chosen, held, "silu"))
    with pytest.raises(ValueError, match=r"takes logits \[9, E\]"):
        mix_routed_experts(x, RouterLogits(logits[:8], 2), held, "silu")


def test_misfits_are_refused(device: str) -> None:
    held = make(2, 32, 16, torch.float32, device)
    x, (weights, chosen) = torch.zeros(3, 32, device=device), route(3, 1, 2, device)
    with pytest.raises(ValueError, match="choose one of silu"):
        mix_experts(x, weights, chosen, held, "relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \(3, 30\)"):
        mix_experts(x[:, :30], weights, chosen, held, "silu")
    with pytest.raises(ValueError, match="int32 experts"):
        mix_experts(x, weights, chosen.long(), held, "silu")
    assert mix_experts(x[:0], weights[:0], chosen[:0], held, "silu").shape == (0, 32)
