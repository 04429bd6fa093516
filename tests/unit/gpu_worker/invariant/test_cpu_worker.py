"""`--deterministic` on a CPU: the same bits alone, in a batch, in chunks, after a prefix, after a preemption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from gpu_worker.config import WorkerSettings
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.runner import TorchRunner
from tests.unit.gpu_worker.invariant.workloads import (
    NUM_ROWS,
    NUM_TOP,
    Trace,
    alone,
    assert_same,
    batch_with_shared_prefixes,
    odd_chunks_and_preemption,
)
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny

NUM_TOKENS = 6


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(directory: Path, dtype: str, **changes: Any) -> TorchRunner:
    values: dict[str, Any] = {"cpu_kv_cache_gib": 0.1, "num_threads": 1, "deterministic": True}
    return TorchRunner.load(WorkerSettings(model=directory, device="cpu", dtype=dtype, **(values | changes)))


def all_alone(runner: TorchRunner, num_tokens: int) -> dict[int, Trace]:
    return {number: alone(runner, number, num_tokens) for number in range(NUM_ROWS)}


def check(runner: TorchRunner, num_tokens: int = NUM_TOKENS) -> None:
    reference = all_alone(runner, num_tokens)
    assert len({tuple(trace.tokens) for trace in reference.values()}) > NUM_ROWS // 2
    assert_same(batch_with_shared_prefixes(runner, num_tokens), reference, num_tokens)
    assert_same(odd_chunks_and_preemption(runner, num_tokens), reference, num_tokens)


@pytest.mark.parametrize(
    ("name", "dtype", "num_threads"),
    [
        ("llama", "float32", 1),
        ("qwen3", "bfloat16", 1),
        pytest.param("llama", "bfloat16", 1, marks=pytest.mark.slow),
        pytest.param("qwen3", "float32", 1, marks=pytest.mark.slow),
        pytest.param("qwen3", "float32", 4, marks=pytest.mark.slow),
    ],
)
def test_the_same_bits_however_a_prompt_is_run(name: str, dtype: str, num_threads: int, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    check(load(tmp_path, dtype, num_threads=num_threads))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "mistral-window", "olmo2", "cohere", "starcoder2", "llama-gelu-mha"])
def test_other_families(name: str, tmp_path: Path) -> None:
    """Soft-caps, windows, other norms, biases, activations."""
    save_tiny(name, tmp_path)
    check(load(tmp_path, "bfloat16"), num_tokens=12)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "num_threads"), [("float32", 2), ("bfloat16", 2), ("float32", 3)])
def test_sizes_that_torch_cuts_into_a_piece_a_thread(dtype: str, num_threads: int, tmp_path: Path) -> None:
    save_wide(tmp_path)
    check(load(tmp_path, dtype, num_threads=num_threads, max_model_len=256), num_tokens=2)


def save_wide(directory: Path) -> None:
    """Few layers, but more than 32,768 elements in an activation of 16 rows, and none in the vectors' rest."""
    config = LlamaConfig(
        vocab_size=3000,
        hidden_size=576,
        intermediate_size=2560,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=256,
    )
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("qwen3", "bfloat16")])
def test_without_it_results_follow_the_batch(name: str, dtype: str, tmp_path: Path) -> None:
    """Or the tests above would prove nothing. Of one prompt, rounding to bfloat16 may hide it: any of them counts."""
    save_tiny(name, tmp_path)
    runner = load(tmp_path, dtype, deterministic=False, cpu_kernels="off")
    together = odd_chunks_and_preemption(runner, 4)
    different = [number for number in range(NUM_ROWS) if alone(runner, number, 4).bits != together[number].bits[:4]]
    assert different


def test_tokens_are_those_of_the_ordinary_worker(tmp_path: Path) -> None:
    """Other sums, the same model: float32 log-probabilities within their rounding."""
    save_tiny("qwen3", tmp_path)
    ours, usual = load(tmp_path, "float32"), load(tmp_path, "float32", deterministic=False)
    for number in (2, 8, 9):
        one, other = alone(ours, number, 6), alone(usual, number, 6)
        assert one.tokens == other.tokens
        bits = [np.array([trace.bits[0][:NUM_TOP]], dtype=np.uint32).view(np.float32) for trace in (one, other)]
        np.testing.assert_allclose(*bits, atol=2e-5)


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_what_is_not_covered_is_refused(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    with pytest.raises(ModelConfigError, match=r"--deterministic does not cover .* leave it out"):
        load(tmp_path, "float32")
