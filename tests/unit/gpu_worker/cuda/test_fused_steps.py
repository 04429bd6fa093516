"""Decode steps whose kernels are brought together against the CPU runner, which has none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stepwire_kernels import scaled_choice
from stepwire_kernels.fused_linear import MAX_FUSED_TOKENS, FusedTuning
from stepwire_kernels.tile_linear import TileLinearTuning

from gpu_worker.cuda.ops import TritonOps
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.cuda.inline_runner import load_inline
from tests.unit.gpu_worker.cuda.test_mixtures import KINDS, save_mixture
from tests.unit.gpu_worker.cuda.test_runner import assert_same, on_cpu, prompt, save_model


class FusingOps(TritonOps):
    """Fuses wherever the kernel can, as a device does whose table says so."""

    def __init__(self, device: torch.device, *, pdl: bool) -> None:
        super().__init__(device, pdl=pdl)
        self.num_fused = self.num_gated = 0

    def fused_tuning(self, x: torch.Tensor, weight: torch.Tensor, *, gated: bool) -> FusedTuning | None:
        if x.shape[0] > MAX_FUSED_TOKENS:
            return None
        self.num_fused += 1
        return FusedTuning(block_n=16, block_k=256, num_warps=1, ahead=1)

    def gated_tuning(self, x: torch.Tensor, weight: torch.Tensor) -> TileLinearTuning | None:
        self.num_gated += 1
        return TileLinearTuning(block_m=32, block_n=64, block_k=64, num_warps=4, num_stages=2)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-moe", pytest.param("llama", marks=pytest.mark.slow)])
def test_fused_decodes_give_the_same_tokens(tmp_path: Path, kind: str) -> None:
    (save_mixture if kind in KINDS else save_model)(tmp_path, kind)
    made: list[FusingOps] = []

    def make_ops(device: torch.device, *, pdl: bool) -> FusingOps:
        made.append(FusingOps(device, pdl=pdl))
        return made[-1]

    ours, theirs = StepDriver(load_inline(tmp_path, make_ops=make_ops)), on_cpu(tmp_path)
    for driver in (ours, theirs):
        driver.add(0, prompt(1, 9), greedy(num_logprobs=0))
        driver.add(2, prompt(2, 5), greedy(num_logprobs=0))
    for number in range(4):
        before, gated_before = made[0].num_fused, made[0].num_gated
        results = [driver.step({0: 1} if number == 2 else None) for driver in (ours, theirs)]
        # Two layers, two norms each (a mixture's goes with its router); the prompts' step has too many tokens.
        assert made[0].num_fused - before == (0 if number == 0 else 4)
        # There a product takes its gate along all the same, where a layer has one (a mixture's experts do otherwise).
        assert made[0].num_gated - gated_before == (2 if number == 0 and kind not in KINDS else 0)
        assert_same(*results)
        assert abs(results[0].logprobs - results[1].logprobs).max() < 1e-3
    assert [row.tokens for row in ours.rows.values()] == [row.tokens for row in theirs.rows.values()]


class GatedOps(FusingOps):
    """Only gates are brought together with their products."""

    def fused_tuning(self, x: torch.Tensor, weight: torch.Tensor, *, gated: bool) -> FusedTuning | None:
        return None


@pytest.mark.parametrize("mlp_bias", [False, True])
def test_gates_go_with_products_that_have_no_bias(tmp_path: Path, mlp_bias: bool) -> None:
    save_model(tmp_path, "llama", num_heads=2, mlp_bias=mlp_bias)
    made: list[GatedOps] = []

    def make_ops(device: torch.device, *, pdl: bool) -> GatedOps:
        made.append(GatedOps(device, pdl=pdl))
        return made[-1]

    ours, theirs = StepDriver(load_inline(tmp_path, make_ops=make_ops)), on_cpu(tmp_path)
    for driver in (ours, theirs):
        driver.add(0, prompt(1, 9), greedy(num_logprobs=0))
    for _ in range(2):
        before = made[0].num_gated
        results = [driver.step() for driver in (ours, theirs)]
        assert made[0].num_gated - before == (0 if mlp_bias else 2)
        assert_same(*results)


def test_float8_products_take_their_gate_and_the_quantization_of_their_inputs_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As launches of their own compute it, but for the order of sums, and roundings that such a difference tips."""
    save_model(tmp_path, "llama", num_heads=2)
    tuning = FusedTuning(block_n=8, block_k=128, num_warps=1, ahead=1)
    calls: list[str] = []

    def chosen(name: str, limit: int) -> Callable[..., FusedTuning | None]:
        def choose(x: torch.Tensor, weight: torch.Tensor) -> FusedTuning | None:
            calls.append(name)
            return tuning if x.shape[0] <= limit else None

        return choose

    apart, ours = (StepDriver(load_inline(tmp_path, quantization="fp8")) for _ in range(2))
    for driver in (apart, ours):
        driver.add(0, prompt(1, 9), greedy(num_logprobs=0))
    for number in range(3):
        expected = apart.step()
        with monkeypatch.context() as patched:
            if number:
                patched.setattr(scaled_choice, "choose_scaled", chosen("scaled", 4))
                patched.setattr(scaled_choice, "choose_quantizing", chosen("quantizing", 1))
            result = ours.step()
        assert abs(result.logprobs - expected.logprobs).max() < 2e-2
    # In each of two layers: qkv and gate_up after their norms, the output and down with inputs that they quantize.
    assert calls == ["scaled", "quantizing", "scaled", "quantizing"] * 4
