"""Embeddings and scores on the CUDA runner: its kernels' states, pooled, against the CPU runner's vectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from transformers.models.llama import LlamaConfig

from gpu_worker.config import WorkerSettings
from gpu_worker.runner import TorchRunner
from gpu_worker.runner_api import PoolingKind, RowFaultCode, RowPooling
from tests.unit.gpu_worker.cuda.inline_runner import load_inline
from tests.unit.gpu_worker.cuda.test_runner import VOCAB_SIZE, save_model
from tests.unit.gpu_worker.step_builder import Run, row_add, step
from tests.unit.gpu_worker.test_pooling import embed, run, save

TEXTS = [list(range(5, 5 + length)) for length in (1, 9, 19, 9)]


def on_cpu(directory: Path, **changes: Any) -> TorchRunner:
    values: dict[str, Any] = {"device": "cpu", "dtype": "float32", "block_size": 16, "num_threads": 1}
    return TorchRunner.load(WorkerSettings(model=directory, cpu_kv_cache_gib=0.01, max_num_seqs=4, **values, **changes))


@pytest.mark.parametrize(
    ("method", "piece"),
    [
        ("mean", 8),
        ("last", None),
        pytest.param("mean", None, marks=pytest.mark.slow),
        pytest.param("last", 8, marks=pytest.mark.slow),
        pytest.param("cls", 8, marks=pytest.mark.slow),
    ],
)
def test_vectors_are_those_of_the_cpu_runner(tmp_path: Path, method: Any, piece: int | None) -> None:
    """Prompts whole and in pieces; a text of one token makes a step of single tokens too."""
    save_model(tmp_path, "llama", num_heads=2)
    ours = load_inline(tmp_path, task="embed", pooling=method)
    facts = ours.describe().pooling
    assert facts is not None and facts.kind == PoolingKind.EMBEDDING and facts.only
    expected = embed(on_cpu(tmp_path, task="embed", pooling=method), TEXTS, piece=piece)
    np.testing.assert_allclose(embed(ours, TEXTS, piece=piece), expected, atol=1e-5)
    # A second session begins anew.
    np.testing.assert_allclose(embed(ours, TEXTS[:1]), expected[:1], atol=1e-5)


def test_a_classifier_scores(tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, num_key_value_heads=1, head_dim=64, pad_token_id=0, num_labels=1, **sizes
    )
    torch.manual_seed(1)
    save(AutoModelForSequenceClassification.from_config(config), tmp_path)
    expected = embed(on_cpu(tmp_path), TEXTS[:2])
    np.testing.assert_allclose(embed(load_inline(tmp_path), TEXTS[:2]), expected, atol=1e-5)


def test_a_row_without_a_finite_vector_fails_alone(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", num_heads=2)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    runner = load_inline(tmp_path, task="embed", pooling="mean")
    adds = [
        replace(row_add(row, tokens, [row + 1]), pooling=RowPooling()) for row, tokens in enumerate(([3, 7], [3, 4]))
    ]
    result = run(runner, step(1, [Run(0, 0, 2), Run(1, 0, 2)], adds=adds))
    assert [(fault.row, fault.code) for fault in result.faults] == [(0, RowFaultCode.NOT_FINITE)]
    assert result.pooled_rows is not None and result.pooled_rows.tolist() == [1]
    # The row is free again.
    again = replace(row_add(0, [3, 4], [1]), pooling=RowPooling())
    result = run(runner, step(2, [Run(0, 0, 2)], adds=[again]))
    assert not result.faults and result.pooled_rows is not None and result.pooled_rows.tolist() == [0]
