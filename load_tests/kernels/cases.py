"""Inputs of the kernel benchmarks: paged batches at model shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from stepwire_kernels import work_list
from stepwire_kernels.attention_decode import DecodeWorkspace, allocate_decode_workspace
from stepwire_kernels.decode_list import build_decode_list
from stepwire_kernels.work_list import SharePolicy, WorkList

L2_BYTES = 60 << 20


@dataclass(frozen=True)
class Heads:
    """Attention shape of a model."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


LLAMA_8B = Heads("llama-8b", 32, 8, 128)
QWEN3_06B = Heads("qwen3-0.6b", 16, 8, 128)


@dataclass
class AttentionCase:
    """A paged batch; several caches, so that repeated launches do not find theirs in the level-2 cache."""

    q: torch.Tensor
    out: torch.Tensor
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    block_tables: torch.Tensor
    query_starts: torch.Tensor
    kv_lens: torch.Tensor
    run_rows: torch.Tensor
    scale: float
    kv_bytes: int

    def decode_work(self, heads: Heads, policy: SharePolicy, window: int = 0) -> tuple[WorkList, DecodeWorkspace]:
        runs = self.kv_lens.numel()
        work = work_list.allocate_decode_list(runs, runs, "cuda", policy)
        build_decode_list(self.query_starts, self.kv_lens, self.run_rows, work, window=window)
        return work, allocate_decode_workspace(work, heads.num_heads, heads.head_dim)

    def prefill_work(self, tile_tokens: int) -> WorkList:
        work = work_list.allocate_prefill_list(self.kv_lens.numel(), self.q.shape[0], tile_tokens, "cuda")
        work_list.build_prefill_list(
            self.query_starts, self.kv_lens, self.run_rows, work, tile_tokens=tile_tokens, min_queries=1
        )
        return work


def unlike_lengths(batch: int) -> list[int]:
    """Contexts of 100 to about 2,000 tokens, as requests have that began at different times: 1,050 on average."""
    # 37 has no factor in common with the sizes that are measured: neighbours are unlike.
    return [100 + 1900 * (row * 37 % batch) // batch for row in range(batch)]


def paged(
    heads: Heads,
    query_lens: list[int],
    kv_lens: list[int],
    *,
    block_size: int = 64,
    cache_dtype: torch.dtype = torch.bfloat16,
    num_caches: int | None = None,
) -> AttentionCase:
    """A batch with scattered blocks and random contents."""
    per_row = [-(-length // block_size) for length in kv_lens]
    num_blocks = sum(per_row) + 1
    item = torch.empty((), dtype=cache_dtype).element_size()
    kv_bytes = sum(kv_lens) * heads.num_kv_heads * heads.head_dim * 2 * item
    num_caches = num_caches or max(1, min(16, -(-8 * L2_BYTES // max(kv_bytes, 1))))
    shape = (num_blocks, heads.num_kv_heads, block_size, heads.head_dim)

    def cache() -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(cache_dtype)

    order = (torch.randperm(num_blocks - 1, device="cuda") + 1).int()
    block_tables = torch.zeros((len(kv_lens), max(per_row)), dtype=torch.int32, device="cuda")
    used = 0
    for row, count in enumerate(per_row):
        block_tables[row, :count] = order[used : used + count]
        used += count
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    q = torch.randn(sum(query_lens), heads.num_heads, heads.head_dim, device="cuda").bfloat16()
    return AttentionCase(
        q=q,
        out=torch.full_like(q, float("nan")),
        caches=[(cache(), cache()) for _ in range(num_caches)],
        block_tables=block_tables,
        query_starts=starts,
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device="cuda"),
        run_rows=torch.arange(len(kv_lens), dtype=torch.int32, device="cuda"),
        scale=heads.head_dim**-0.5,
        kv_bytes=kv_bytes,
    )


def causal_flop(heads: Heads, query_lens: list[int], kv_lens: list[int]) -> float:
    """Multiply-adds (as 2) of causal attention: what lies above the diagonal is not counted."""
    pairs = sum(q * (kv - q) + q * (q + 1) / 2 for q, kv in zip(query_lens, kv_lens, strict=True))
    return 4.0 * pairs * heads.num_heads * heads.head_dim
