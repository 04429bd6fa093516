"""Every architecture against transformers' own model of it, in float32, through the runner's pieces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpu_worker.assembly import attention_spec, load_model
from gpu_worker.attention.api import StepMetadata
from gpu_worker.attention.indexed_backend import torch_attention
from gpu_worker.config import WorkerSettings
from gpu_worker.kv_cache import KVCache, KVCacheShape
from gpu_worker.layers.linear import BuildContext
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.quant.none import Unquantized
from tests.unit.gpu_worker.models.tiny_checkpoints import TINY, save_tiny

BLOCK_SIZE = 4


class PagedModel:
    """A model with a cache, fed by hand: one row, whose blocks are scattered."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        spec, family = read_spec(directory)
        parallel = ParallelContext()
        build = BuildContext(parallel, Unquantized(), dtype, torch.device("cpu"))
        self.model: ModelFamily = load_model(WorkerSettings(model=directory), family, spec, build, 256)
        cache = KVCache(KVCacheShape.of(spec, parallel, BLOCK_SIZE, dtype), 80, build.device)
        self.attention = torch_attention(attention_spec(spec, parallel), cache, dtype)
        self.model.allocate_states(4)
        self.table = np.random.default_rng(0).permutation(np.arange(1, 80))[None, :]

    def plan(self, metadata: StepMetadata) -> None:
        self.attention.plan(metadata)
        if self.model.row_states is not None:
            self.model.row_states.plan(metadata)
        if self.model.states is not None:
            self.model.states.plan(metadata)

    @torch.inference_mode()
    def logits(self, token_ids: list[int], start: int) -> torch.Tensor:
        """Logits after every one of these tokens, the ones before `start` being in the cache."""
        stop = start + len(token_ids)
        metadata = StepMetadata(
            num_decodes=int(len(token_ids) == 1),
            query_lengths=np.array([len(token_ids)]),
            context_lengths=np.array([stop]),
            block_tables=self.table,
            positions=np.arange(start, stop),
            rows=np.array([0]),
        )
        self.plan(metadata)
        hidden = self.model.hidden_states(torch.tensor(token_ids), torch.arange(start, stop), self.attention)
        return self.model.logits(hidden)


@dataclass
class _Row:
    token_ids: list[int]
    table: np.ndarray
    done: int = 0


class MixedBatch:
    """Several rows in one step, as the runner lays them out: rows with one token first."""

    def __init__(self, directory: Path, sequences: list[list[int]]) -> None:
        self.paged = PagedModel(directory)
        blocks = np.random.default_rng(1).permutation(np.arange(1, 80)).reshape(-1)
        per_row = len(blocks) // len(sequences)
        self.rows = [
            _Row(ids, blocks[number * per_row : (number + 1) * per_row]) for number, ids in enumerate(sequences)
        ]

    @torch.inference_mode()
    def step(self, counts: list[int]) -> list[torch.Tensor]:
        """Run `counts[i]` tokens of row i; their logits."""
        order = sorted((row for row in range(len(counts)) if counts[row]), key=lambda row: counts[row] != 1)
        starts = {row: self.rows[row].done for row in order}
        ids, positions = [], []
        for row in order:
            span = range(starts[row], starts[row] + counts[row])
            ids += [self.rows[row].token_ids[position] for position in span]
            positions += list(span)
            self.rows[row].done += counts[row]
        metadata = StepMetadata(
            num_decodes=sum(counts[row] == 1 for row in order),
            query_lengths=np.array([counts[row] for row in order]),
            context_lengths=np.array([self.rows[row].done for row in order]),
            block_tables=np.stack([self.rows[row].table for row in order]),
            positions=np.array(positions),
            rows=np.array(order),
        )
        self.paged.plan(metadata)
        hidden = self.paged.model.hidden_states(torch.tensor(ids), torch.tensor(positions), self.paged.attention)
        parts = self.paged.model.logits(hidden).split([counts[row] for row in order])
        by_row = dict(zip(order, parts, strict=True))
        return [by_row.get(row, torch.empty(0, 301)) for row in range(len(counts))]


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    check_logits(save_tiny(name, tmp_path), tmp_path)


def check_logits(reference: Any, directory: Path) -> None:
    """Prefill, chunked prefill and decodes in a mixed batch of the checkpoint against `reference`."""
    token_ids = torch.randint(0, 301, (56,), generator=torch.Generator().manual_seed(7)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0]
    scale = expected.abs().max().item()
    assert scale > 1, "the checkpoint's logits are too flat to prove anything"

    def check(got: torch.Tensor, start: int) -> None:
        error = (got - expected[start : start + len(got)]).abs().max().item()
        assert error <= 1e-4 * scale, f"from position {start}: error {error} at scale {scale}"

    # 40 tokens at once, then 16 decodes beside a row that decodes too and one whose prompt comes in pieces of 3.
    batch = MixedBatch(directory, [token_ids, token_ids[::-1], token_ids])
    check(batch.step([40, 5, 0])[0], 0)
    for position in range(40, 56):
        check(batch.step([1, 1, 3])[0], position)
    chunked = PagedModel(directory)
    for start, stop in ((0, 13), (13, 14), (14, 31), (31, 40)):
        check(chunked.logits(token_ids[start:stop], start), start)


@pytest.mark.parametrize("name", ["llama-tied-bias", "qwen3"])
def test_bfloat16_with_packed_weights_is_close(name: str, tmp_path: Path) -> None:
    reference: Any = save_tiny(name, tmp_path)
    token_ids = list(range(3, 43))
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0]
    got = PagedModel(tmp_path, torch.bfloat16).logits(token_ids, 0).float()
    cosine = torch.nn.functional.cosine_similarity(got, expected, dim=-1)
    assert cosine.min() > 0.995
