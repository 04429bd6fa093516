"""Layers with heads of two sizes, layers that read another's cache, values made of keys, per-layer embeddings and
experts beside an MLP (Gemma 4) on the CUDA runner against the CPU runner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpu_worker.attention.api import MixedHeads
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.cuda.inline_runner import load_inline
from tests.unit.gpu_worker.cuda.test_runner import assert_same, on_cpu, prompt
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny

# Heads of sizes that the kernels take, and few of them: the interpreter's time goes with them.
SIZES: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "global_head_dim": 128}
SMALL = SIZES | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
LARGE = SIZES | {
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
KINDS = {"gemma4": SMALL, "gemma4-large": LARGE, "gemma4-moe": LARGE}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in KINDS])
def test_prefills_decodes_and_a_shared_prefix_give_the_same_tokens(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path, **KINDS[name])
    runner = load_inline(tmp_path)
    assert isinstance(runner._program._attention, MixedHeads)
    ours, theirs = StepDriver(runner), on_cpu(tmp_path)
    for driver in (ours, theirs):
        driver.add(0, prompt(1, 37), greedy(num_logprobs=0))
        driver.add(2, prompt(2, 1), greedy(num_logprobs=0))
    steps: list[dict[int, int] | None] = [{0: 14}, {0: 23, 2: 1}, None]
    for runs in steps:
        check_step(ours, theirs, runs)
    for driver in (ours, theirs):
        driver.add(1, [*prompt(1, 37)[:32], 9, 8], greedy(num_logprobs=0), prefix_of=0, num_shared_tokens=32)
    for runs in (None, None):
        check_step(ours, theirs, runs)
    # As a preempted sequence comes back, into other blocks.
    for driver in (ours, theirs):
        tokens = driver.drop(0)
        driver.add(0, tokens, greedy(num_logprobs=0), num_prompt_tokens=37)
    check_step(ours, theirs, None)
    assert [row.tokens for row in ours.rows.values()] == [row.tokens for row in theirs.rows.values()]


def check_step(ours: StepDriver, theirs: StepDriver, runs: dict[int, int] | None) -> None:
    results = [driver.step(runs) for driver in (ours, theirs)]
    assert_same(*results)
    logprobs = [result.logprobs for result in results]
    if logprobs[0] is not None and logprobs[1] is not None:
        assert abs(logprobs[0] - logprobs[1]).max() < 1e-3


def test_an_fp8_cache_is_close(tmp_path: Path) -> None:
    """Values are normed, so that their size is the cache's best."""
    save_tiny("gemma4", tmp_path, **SMALL)
    exact, rounded = (StepDriver(load_inline(tmp_path, kv_cache_dtype=dtype)) for dtype in ("auto", "fp8"))
    for driver in (exact, rounded):
        driver.add(0, prompt(1, 20), greedy(num_logprobs=0))
    results = [driver.step() for driver in (exact, rounded)]
    logprobs = [result.logprobs for result in results]
    assert logprobs[0] is not None and logprobs[1] is not None
    assert 0 < abs(logprobs[0] - logprobs[1]).max() < 0.5
