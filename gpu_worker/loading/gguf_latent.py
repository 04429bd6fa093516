"""Latent attention's `kv_b_proj`, which a GGUF file has in two parts.

`attn_k_b` [heads, kv_rank, nope_dim] is transposed, `attn_v_b` [heads, value_dim, kv_rank] is not (llama.cpp,
`conversion/deepseek.py`); a checkpoint has both parts of a head, one head after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu_worker.loading.gguf_file import GgufTensor

KEYS, VALUES = "self_attn.k_b_proj.weight", "self_attn.v_b_proj.weight"
WHOLE = "self_attn.kv_b_proj.weight"


@dataclass(frozen=True, slots=True)
class HeadParts:
    """`kv_b_proj` [heads * (nope_dim + value_dim), kv_rank] of one layer."""

    keys: GgufTensor
    values: GgufTensor

    @property
    def is_valid(self) -> bool:
        """Whether both parts have the same heads and rank."""
        return (
            len(self.keys.shape) == len(self.values.shape) == 3
            and self.keys.shape[0] == self.values.shape[0]
            and self.keys.shape[1] == self.values.shape[2]
        )

    @property
    def shape(self) -> tuple[int, int]:
        num_heads, kv_rank, nope_dim = self.keys.shape
        return num_heads * (nope_dim + self.values.shape[1]), kv_rank

    def read(self, start: int, stop: int, rows_of: Callable[[GgufTensor, int, int], torch.Tensor]) -> torch.Tensor:
        """Rows `start` to `stop`, float32.

        Args:
            rows_of: decodes rows `start` to `stop` of a tensor whose last dimension alone is no row.
        """
        _, kv_rank, nope_dim = self.keys.shape
        value_dim = self.values.shape[1]
        each = nope_dim + value_dim
        first, last = start // each, -(-stop // each)
        keys = rows_of(self.keys, first * kv_rank, last * kv_rank).view(-1, kv_rank, nope_dim)
        values = rows_of(self.values, first * value_dim, last * value_dim).view(-1, value_dim, kv_rank)
        rows = torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)
        return rows[start - first * each : stop - first * each]
