"""Random paged batches for the attention tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from stepwire_kernels import reference


@dataclass
class PagedCase:
    q: torch.Tensor  # [num_tokens, num_heads, D]
    k_cache: torch.Tensor  # [num_blocks, num_kv_heads, block_size, D]
    v_cache: torch.Tensor
    block_tables: torch.Tensor  # int32 [num_rows, max_blocks]
    query_starts: torch.Tensor  # int32 [num_runs + 1]
    kv_lens: torch.Tensor  # int32 [num_runs]
    run_rows: torch.Tensor  # int32 [num_runs]
    softmax_scale: float

    def twin(self, **options: object) -> torch.Tensor:
        """The float64 twin's output."""
        k_cache, v_cache = (c if c.dtype == torch.float8_e4m3fn else c.double() for c in (self.k_cache, self.v_cache))
        sinks = options.pop("sinks", None)
        return reference.paged_attention(
            self.q.double(), k_cache, v_cache, self.block_tables, self.query_starts, self.kv_lens, self.run_rows,
            self.softmax_scale, sinks=None if sinks is None else sinks.double(), **options,
        )  # fmt: skip


def make_case(
    runs: list[tuple[int, int]],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: str,
    *,
    cache_dtype: torch.dtype | None = None,
    padding_tokens: int = 0,
) -> PagedCase:
    """runs: (query tokens, context before them). Blocks are scattered, and what no token wrote is NaN.

    Padding tokens form a last run of kv_len 0, as a padded bucket has.
    """
    cache_dtype = cache_dtype or dtype
    needed = [-(-(queries + context) // block_size) for queries, context in runs]
    num_rows = len(runs) + 3
    num_blocks = sum(needed) + 5
    order = torch.randperm(num_blocks - 1, device=device) + 1
    block_tables = torch.zeros((num_rows, max(needed)), dtype=torch.int32, device=device)
    rows = torch.randperm(num_rows, device=device)[: len(runs)].tolist()
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    wide = [torch.full(shape, float("nan"), device=device) for _ in range(2)]
    used = 0
    for (queries, context), row, count in zip(runs, rows, needed, strict=True):
        blocks = order[used : used + count]
        used += count
        block_tables[row, :count] = blocks.int()
        length = queries + context
        slots = blocks.repeat_interleave(block_size)[:length] * block_size
        slots = slots + torch.arange(length, device=device) % block_size
        for cache in wide:
            reference.write_cache(cache, torch.randn(length, num_kv_heads, head_dim, device=device), slots)
    starts = [0]
    for queries, _ in runs:
        starts.append(starts[-1] + queries)
    lens = [queries + context for queries, context in runs]
    if padding_tokens:
        starts.append(starts[-1] + padding_tokens)
        lens.append(0)
        rows.append(0)
    caches = [cache.to(dtype).to(cache_dtype) for cache in wide]

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return PagedCase(
        q=torch.randn(starts[-1], num_heads, head_dim, device=device).to(dtype),
        k_cache=caches[0],
        v_cache=caches[1],
        block_tables=block_tables,
        query_starts=ints(starts),
        kv_lens=ints(lens),
        run_rows=ints(rows),
        softmax_scale=head_dim**-0.5,
    )
