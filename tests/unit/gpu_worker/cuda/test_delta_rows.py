"""Models of the gated delta rule on the CUDA runner against the CPU runner: states in prompts, decodes and graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.cuda.inline_runner import load_inline
from tests.unit.gpu_worker.cuda.test_graph_use import _RelaunchGraphs
from tests.unit.gpu_worker.cuda.test_runner import assert_same, on_cpu, prompt
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny

# Heads of attention that its kernels take; few of everything, since the interpreter's time goes with them.
SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def run(directory: Path, steps: list[dict[int, int] | None], *, with_graphs: bool = False) -> None:
    """Two rows; after the steps the first is dropped, and another sequence has its place."""
    runner = load_inline(directory, with_graphs=with_graphs)
    graphs = _RelaunchGraphs()
    if with_graphs:
        runner._graphs = graphs  # type: ignore[assignment]
    ours, theirs = StepDriver(runner), on_cpu(directory)
    for driver in (ours, theirs):
        driver.add(0, prompt(1, 70), greedy(num_logprobs=0))
        driver.add(2, prompt(2, 4), greedy(num_logprobs=0))

    def step(runs: dict[int, int] | None) -> None:
        results = [driver.step(runs) for driver in (ours, theirs)]
        assert_same(*results)
        if results[0].logprobs is not None and results[1].logprobs is not None:
            assert abs(results[0].logprobs - results[1].logprobs).max() < 1e-3

    for runs in steps:
        step(runs)
    for driver in (ours, theirs):
        driver.drop(0)
        driver.add(0, prompt(3, 6), greedy(num_logprobs=0))
    for _ in range(3):
        step(None)
    assert [row.tokens for row in ours.rows.values()] == [row.tokens for row in theirs.rows.values()]
    if with_graphs:
        assert any(captured.graph.num_replays for captured in graphs.captured.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["qwen3.5", pytest.param("qwen3-next", marks=pytest.mark.slow)])
def test_prompts_in_pieces_beside_decodes_give_the_same_tokens(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path, **SIZES)
    run(tmp_path, [{0: 66, 2: 3}, {0: 1, 2: 1}, {0: 3, 2: 1}, None, {2: 1}, {0: 1}])


@pytest.mark.slow
def test_decodes_from_graphs_go_on_from_their_states(tmp_path: Path) -> None:
    save_tiny("qwen3.5", tmp_path, **SIZES)
    run(tmp_path, [{0: 70, 2: 4}, *[None] * 6], with_graphs=True)
