"""`--deterministic` on a GPU: the same bits alone, in a batch, in chunks, after a prefix, after a preemption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu_worker.runner_api import Runner
from tests.gpu.test_cuda_runner import load, save_model
from tests.unit.gpu_worker.invariant.workloads import (
    NUM_ROWS,
    alone,
    assert_same,
    batch_with_shared_prefixes,
    odd_chunks_and_preemption,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_TOKENS = 24


def loaded(
    directory: Path, kind: str, dtype: str, *, enforce_eager: bool = False, deterministic: bool = True
) -> Runner:
    save_model(directory, kind)
    return load(directory, dtype=dtype, max_num_seqs=NUM_ROWS, deterministic=deterministic, enforce_eager=enforce_eager)


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "window"])
def test_the_same_bits_however_a_prompt_is_run(kind: str, dtype: str, enforce_eager: bool, tmp_path: Path) -> None:
    runner = loaded(tmp_path, kind, dtype, enforce_eager=enforce_eager)
    reference = {number: alone(runner, number, NUM_TOKENS) for number in range(NUM_ROWS)}
    assert len({tuple(trace.tokens) for trace in reference.values()}) > NUM_ROWS // 2
    # Twice: first eagerly, then by the graphs that were captured meanwhile.
    for _ in range(2):
        assert_same(batch_with_shared_prefixes(runner, NUM_TOKENS), reference, NUM_TOKENS)
        assert_same(odd_chunks_and_preemption(runner, NUM_TOKENS), reference, NUM_TOKENS)


def test_without_it_results_follow_the_batch(tmp_path: Path) -> None:
    """Or the tests above would prove nothing."""
    runner = loaded(tmp_path, "llama", "bfloat16", deterministic=False)
    batch = batch_with_shared_prefixes(runner, NUM_TOKENS)
    assert any(alone(runner, number, NUM_TOKENS).bits != batch[number].bits[:NUM_TOKENS] for number in range(NUM_ROWS))
