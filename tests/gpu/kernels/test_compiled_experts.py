"""The checks of tests/unit/kernels/test_experts.py, compiled; and launches that begin before those ahead have ended."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stepwire_kernels.expert_gemv import PairDownTuning
from stepwire_kernels.expert_routing import RouterLogits
from stepwire_kernels.experts import PAIRS, ExpertWeights, mix_routed_experts
from stepwire_kernels.fused_linear import FusedTuning, fused_linear
from stepwire_kernels.norm import add_rms_norm

from tests.unit.kernels.test_experts import *  # noqa: F403
from tests.unit.kernels.test_experts import make

pytestmark = pytest.mark.gpu


def _layers(
    x: torch.Tensor, routers: list[torch.Tensor], held: ExpertWeights, tuning: PairDownTuning, *, pdl: bool
) -> torch.Tensor:
    """Mixtures of 4 of the experts, one after another, each with its norm and router: what a decode step launches."""
    residual, weight = x.clone(), torch.ones_like(x[0])
    normed = add_rms_norm(residual, None, weight, 1e-5, pdl=pdl)
    for router in routers:
        logits, _ = fused_linear(normed, router, tuning=FusedTuning(1, 1024, 4, 1), pdl=pdl)
        routed = RouterLogits(logits, 4, renormalize=True)
        mixed = mix_routed_experts(normed, routed, held, "silu", tuning=replace(PAIRS, pair_down=tuning), pdl=pdl)
        normed = add_rms_norm(mixed, residual, weight, 1e-5, pdl=pdl)
    return normed


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_products_that_begin_early_read_what_is_there(num_tokens: int) -> None:
    """In a graph, whose launches overlap; each layer's logits lie where those of other layers and replays did."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("dependent launches need capability 9.0")
    held = make(32, 1024, 512, torch.bfloat16, "cuda")
    routers = [torch.randn(32, 1024, device="cuda").bfloat16() for _ in range(6)]
    x = torch.zeros(num_tokens, 1024, device="cuda", dtype=torch.bfloat16)
    tuning = PairDownTuning(8, 256, 8, 2)
    _layers(x, routers, held, tuning, pdl=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _layers(x, routers, held, tuning, pdl=True)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        expected = _layers(x, routers, held, tuning, pdl=False)
        graph.replay()
        assert torch.equal(out, expected)
