"""Embeddings on a GPU: the CUDA runner's vectors against transformers' states in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_worker.config import WorkerSettings
from gpu_worker.cuda.loading import load_cuda_runner
from gpu_worker.cuda.runner import CudaRunner
from tests.gpu.test_cuda_runner import save_model
from tests.unit.gpu_worker.test_pooling import embed, pooled, states_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TEXTS = [[3 + (7 * index) % 1900 for index in range(length)] for length in (1, 90, 300, 33)]


@pytest.mark.parametrize("method", ["mean", "last"])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_vectors_are_those_of_transformers(tmp_path: Path, method: str, dtype: str, atol: float) -> None:
    from transformers import AutoModelForCausalLM

    save_model(tmp_path, "qwen3")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    settings = WorkerSettings(
        model=tmp_path, device="cuda", dtype=dtype, task="embed", pooling=method, max_num_seqs=8, max_model_len=512,
        gpu_memory_utilization=0.05,
    )  # fmt: skip
    runner = load_cuda_runner(settings, torch.device("cuda", 0))
    assert isinstance(runner, CudaRunner)
    expected = torch.stack([pooled(states_of(reference.model, text), method) for text in TEXTS])
    expected = torch.nn.functional.normalize(expected, dim=-1)
    for piece in (None, 64):
        np.testing.assert_allclose(embed(runner, TEXTS, piece=piece), expected, atol=atol)
