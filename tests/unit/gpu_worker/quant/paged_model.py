"""A model with its checkpoint's own quantization and a KV cache, fed by hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from gpu_worker.assembly import attention_spec, load_model
from gpu_worker.attention.api import StepMetadata
from gpu_worker.attention.indexed_backend import torch_attention
from gpu_worker.config import WorkerSettings
from gpu_worker.kv_cache import KVCache, KVCacheShape
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.ops import TORCH_OPS
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.quant.products import PackedKernels
from gpu_worker.quant.scheme import make_scheme

BLOCK_SIZE = 16
NUM_BLOCKS = 16
ROOT = Path(__file__).resolve().parents[4]
# Checkpoints that other projects' tools wrote; they lie beside the repository and are too large to be in it.
FIXTURES = Path(os.environ.get("STEPWIRE_TEST_FIXTURES", ROOT.parent / "shared" / "fixtures"))


def fixture(name: str) -> Path:
    """The directory of a real quantized checkpoint."""
    for base in (FIXTURES, *(parent / "shared" / "fixtures" for parent in ROOT.parents)):
        if (base / name / "config.json").exists():
            return base / name
    pytest.skip(f"the checkpoint {name} is not there: {FIXTURES} (STEPWIRE_TEST_FIXTURES names another directory)")


class QuantizedModel:
    """One sequence; logits of its tokens."""

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype = torch.float32,
        *,
        parallel: ParallelContext | None = None,
        setting: Literal["auto", "fp8", "int8"] = "auto",
        kernels: PackedKernels | None = None,
    ) -> None:
        parallel = parallel or ParallelContext()
        spec, family = read_spec(directory)
        scheme = make_scheme(
            directory, family.name_rules, setting=setting, kernels=kernels, canonical_name=family.canonical_name
        )
        build = BuildContext(parallel, scheme, dtype, torch.device("cpu"), TORCH_OPS)
        self.model: ModelFamily = load_model(
            WorkerSettings(model=directory), family, spec, build, BLOCK_SIZE * NUM_BLOCKS
        )
        cache = KVCache(KVCacheShape.of(spec, parallel, BLOCK_SIZE, dtype), NUM_BLOCKS + 1, build.device)
        self.attention = torch_attention(attention_spec(spec, parallel), cache, dtype)
        self.model.allocate_states(1)
        self.table = np.random.default_rng(0).permutation(np.arange(1, NUM_BLOCKS + 1))[None, :]

    def plan(self, start: int, stop: int) -> None:
        """A step of these tokens."""
        count, positions = stop - start, np.arange(start, stop)
        metadata = StepMetadata(
            int(count == 1), np.array([count]), np.array([stop]), self.table, positions, np.array([0])
        )
        self.attention.plan(metadata)
        if self.model.states is not None:
            self.model.states.plan(metadata)

    @torch.inference_mode()
    def logits(self, token_ids: list[int], start: int = 0) -> torch.Tensor:
        """[num_tokens, vocab_size] after every one of these tokens, those before `start` being in the cache."""
        stop = start + len(token_ids)
        self.plan(start, stop)
        hidden = self.model.hidden_states(torch.tensor(token_ids), torch.arange(start, stop), self.attention)
        return self.model.logits(hidden)
