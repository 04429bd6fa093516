from __future__ import annotations

from typing import Any

import pytest
import torch
from stepwire_kernels import reference_experts
from stepwire_kernels.expert_routing import choose_experts

from tests.unit.kernels.checks import USUAL_DTYPES

ROUTERS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "mixtral": (8, 2, {"renormalize": True}),
    "qwen2-moe": (60, 4, {}),
    "qwen3-moe": (128, 8, {"renormalize": True}),
    "gpt-oss": (32, 4, {"renormalize": True}),
    "deepseek-v2": (160, 6, {"num_groups": 8, "num_chosen_groups": 3, "scale": 16.0}),
    "deepseek-v3": (
        256,
        8,
        {"sigmoid": True, "renormalize": True, "sum_eps": 1e-20, "scale": 2.5, "num_groups": 8,
         "num_chosen_groups": 4, "top_two": True},
    ),
    "odd": (21, 3, {"sigmoid": True, "num_groups": 7, "num_chosen_groups": 2, "top_two": True}),
    "all": (3, 3, {}),
    "one": (1, 1, {"renormalize": True}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", USUAL_DTYPES)
@pytest.mark.parametrize("name", ROUTERS)
def test_matches_twin(device: str, name: str, dtype: torch.dtype) -> None:
    num_experts, num_chosen, options = ROUTERS[name]
    logits = (2 * torch.randn(5, num_experts, device=device)).to(dtype)
    correction = 0.3 * torch.randn(num_experts, device=device) if options.get("sigmoid") else None
    weights, experts = choose_experts(logits, num_chosen, correction=correction, **options)
    # Rounding of float32 may not decide: rank what the kernel ranks, in its own precision.
    twin_weights, twin_experts = reference_experts.choose_experts(
        logits.float(), num_chosen, correction=correction, **options
    )
    assert torch.equal(experts, twin_experts)
    torch.testing.assert_close(weights, twin_weights, rtol=1e-5, atol=1e-7)


def test_the_lower_number_wins_a_tie(device: str) -> None:
    logits = torch.zeros(2, 12, device=device)
    logits[1, 7] = 1
    _, experts = choose_experts(logits, 3)
    assert experts.tolist() == [[0, 1, 2], [7, 0, 1]]
    _, experts = choose_experts(logits, 3, num_groups=4, num_chosen_groups=2)
    assert experts.tolist() == [[0, 1, 2], [7, 0, 1]]


@pytest.mark.parametrize("sigmoid", [False, True])
def test_logits_that_are_not_finite_choose_experts_that_exist(device: str, sigmoid: bool) -> None:
    logits = torch.randn(3, 20, device=device)
    logits[0] = float("nan")
    logits[1, 4] = float("nan")
    weights, experts = choose_experts(logits, 4, sigmoid=sigmoid, renormalize=True, num_groups=5, num_chosen_groups=2)
    assert ((experts >= 0) & (experts < 20)).all()
    assert weights[0].isnan().all()
    assert sigmoid or weights[1].isnan().all()
    twin_weights, twin_experts = reference_experts.choose_experts(
        logits[2:], 4, sigmoid=sigmoid, renormalize=True, num_groups=5, num_chosen_groups=2
    )
    assert torch.equal(experts[2:], twin_experts)
    torch.testing.assert_close(weights[2:], twin_weights)


def test_strided_logits_and_no_tokens(device: str) -> None:
    logits = torch.randn(4, 50, device=device)
    weights, experts = choose_experts(logits[:, :16], 2)
    again = choose_experts(logits[:, :16].contiguous(), 2)
    assert torch.equal(weights, again[0]) and torch.equal(experts, again[1])
    assert choose_experts(logits[:0], 2)[1].shape == (0, 2)


def test_misfits_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="5 of 16 experts cannot be chosen from 1 of 4 groups"):
        choose_experts(torch.zeros(1, 16, device=device), 5, num_groups=4)
