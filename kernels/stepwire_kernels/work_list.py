"""Work lists of the attention kernels, built on the device so that one captured grid serves any mix of lengths.

A *run* is one row's share of a step: `query_starts` int32 [num_runs + 1] says which tokens are its queries, `kv_lens`
int32 [num_runs] how many tokens of KV it sees (context and this step's tokens), `run_rows` int32 [num_runs] whose block
table it uses. A run with kv_len 0 is padding.

Decode list (runs of one query token): the visible KV is cut into chunks at multiples of the chunk size. The chunk size
is the policy's `min_chunk`, doubled until a run has at most `max_chunks`: it depends on the run's own length and on
nothing else in the batch, so results do not either, and the partial results need a bounded buffer.
Padding runs get one item per token, which makes the attention kernel write zeros there.

Prefill list: tiles of `tile_tokens` query tokens, the last tile of a run (the one with most KV) first.

Both lists hold eight int32 a record; the field names below are their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream

RECORD_WORDS = 8
DECODE_FIELDS = ("run", "row", "token", "kv_len", "kv_start", "kv_end", "first_item", "num_chunks")
PREFILL_FIELDS = ("run", "row", "token", "num_queries", "position", "kv_len", "unused0", "unused1")


@dataclass(frozen=True)
class ChunkPolicy:
    """How finely a decode run's KV is split; both numbers are powers of two.

    Two policies give results that differ in the last bits. A server whose results must not depend on the batch uses one
    policy throughout; otherwise each captured bucket may take `chunk_policy_for`.
    """

    min_chunk: int = 256
    max_chunks: int = 16

    def __post_init__(self) -> None:
        for name, value in (("min_chunk", self.min_chunk), ("max_chunks", self.max_chunks)):
            if value < 1 or value & (value - 1):
                raise ValueError(f"ChunkPolicy: {name} must be a power of two, got {value}")


THROUGHPUT = ChunkPolicy()
LATENCY = ChunkPolicy(min_chunk=64, max_chunks=64)


def chunk_policy_for(max_runs: int, num_kv_heads: int) -> ChunkPolicy:
    """The faster policy for a bucket: small batches need small chunks to reach every multiprocessor."""
    return LATENCY if max_runs * num_kv_heads <= 64 else THROUGHPUT


@dataclass(frozen=True)
class WorkList:
    """Records of one attention kernel on the device, and how many of them this step uses."""

    records: torch.Tensor  # int32 [capacity, RECORD_WORDS]
    num_records: torch.Tensor  # int32 [1]
    runs: torch.Tensor  # int32 [max_runs, 4]: token, first record, number of chunks (0: not a decode run), unused
    policy: ChunkPolicy = THROUGHPUT

    @property
    def capacity(self) -> int:
        return self.records.shape[0]


def allocate_decode_list(
    max_runs: int, num_tokens: int, device: torch.device | str, *, policy: ChunkPolicy = THROUGHPUT
) -> WorkList:
    """Room for `max_runs` decode runs and `num_tokens` padding tokens."""
    # One chunk more than the policy's: a sliding window need not start at a chunk's edge.
    capacity = max(1, max_runs * (policy.max_chunks + 1) + num_tokens)
    return _allocate(capacity, max_runs, device, policy)


def allocate_prefill_list(max_runs: int, num_tokens: int, tile_tokens: int, device: torch.device | str) -> WorkList:
    """Room for the tiles of any split of `num_tokens` query tokens over `max_runs` runs."""
    return _allocate(max(1, triton.cdiv(num_tokens, tile_tokens) + max_runs), max_runs, device, THROUGHPUT)


def _allocate(capacity: int, max_runs: int, device: torch.device | str, policy: ChunkPolicy) -> WorkList:
    return WorkList(
        records=torch.zeros((capacity, RECORD_WORDS), dtype=torch.int32, device=device),  # [capacity, 8]
        num_records=torch.zeros(1, dtype=torch.int32, device=device),  # [1]
        runs=torch.zeros((max_runs, 4), dtype=torch.int32, device=device),  # [max_runs, 4]
        policy=policy,
    )


@triton.jit
def _chunk_tokens(visible, MIN_CHUNK: tl.constexpr, CHUNK_LIMIT: tl.constexpr):
    """The chunk size for a run that sees `visible` tokens: MIN_CHUNK doubled until CHUNK_LIMIT chunks suffice."""
    chunk = visible * 0 + MIN_CHUNK
    for _ in tl.static_range(16):
        chunk = tl.where(chunk * CHUNK_LIMIT < visible, chunk * 2, chunk)
    return chunk


@triton.jit
def _decode_items(num_queries, kv_len, WINDOW: tl.constexpr, MIN_CHUNK: tl.constexpr, CHUNK_LIMIT: tl.constexpr):
    """(number of items, chunk size, first chunk) of a run; works on scalars and on tensors."""
    first_visible = kv_len * 0
    if WINDOW > 0:
        first_visible = tl.maximum(kv_len - WINDOW, 0)
    chunk = _chunk_tokens(kv_len - first_visible, MIN_CHUNK, CHUNK_LIMIT)
    first_chunk = first_visible // chunk
    num_chunks = (kv_len + chunk - 1) // chunk - first_chunk
    is_decode = (num_queries == 1) & (kv_len > 0)
    num_items = tl.where(is_decode, num_chunks, tl.where(kv_len == 0, num_queries, 0))
    return num_items, chunk, first_chunk


@triton.jit
def _decode_list_kernel(
    query_starts_ptr,
    kv_lens_ptr,
    run_rows_ptr,
    records_ptr,
    num_records_ptr,
    list_runs_ptr,
    num_runs,
    WINDOW: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    CHUNK_LIMIT: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    run = tl.program_id(0)
    runs = tl.arange(0, BLOCK_RUNS)
    in_step = runs < num_runs
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    starts = tl.load(query_starts_ptr + runs, mask=in_step, other=0)
    ends = tl.load(query_starts_ptr + runs + 1, mask=in_step, other=0)
    lens = tl.load(kv_lens_ptr + runs, mask=in_step, other=0)
    counts, _, _ = _decode_items(ends - starts, lens, WINDOW, MIN_CHUNK, CHUNK_LIMIT)
    first_item = tl.sum(tl.where(runs < run, counts, 0), axis=0)
    if run == 0:
        tl.store(num_records_ptr, tl.sum(counts, axis=0))

    token = tl.load(query_starts_ptr + run)
    num_queries = tl.load(query_starts_ptr + run + 1) - token
    kv_len = tl.load(kv_lens_ptr + run)
    row = tl.load(run_rows_ptr + run)
    num_items, chunk, first_chunk = _decode_items(num_queries, kv_len, WINDOW, MIN_CHUNK, CHUNK_LIMIT)
    is_padding = kv_len == 0
    tl.store(list_runs_ptr + run * 4, token)
    tl.store(list_runs_ptr + run * 4 + 1, first_item)
    tl.store(list_runs_ptr + run * 4 + 2, tl.where(is_padding, 0, num_items))
    for base in range(0, num_items, BLOCK_ITEMS):
        item = base + tl.arange(0, BLOCK_ITEMS)
        mask = item < num_items
        record = records_ptr + (first_item + item) * 8
        kv_start = (first_chunk + item) * chunk
        tl.store(record + 0, run + item * 0, mask=mask)
        tl.store(record + 1, row + item * 0, mask=mask)
        tl.store(record + 2, tl.where(is_padding, token + item, token + item * 0), mask=mask)
        tl.store(record + 3, kv_len + item * 0, mask=mask)
        tl.store(record + 4, tl.where(is_padding, 0, kv_start), mask=mask)
        tl.store(record + 5, tl.minimum(kv_start + chunk, kv_len), mask=mask)
        tl.store(record + 6, first_item + item * 0, mask=mask)
        tl.store(record + 7, tl.where(is_padding, 1, num_items + item * 0), mask=mask)


@triton.jit
def _prefill_list_kernel(
    query_starts_ptr,
    kv_lens_ptr,
    run_rows_ptr,
    records_ptr,
    num_records_ptr,
    num_runs,
    MIN_QUERIES: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    run = tl.program_id(0)
    runs = tl.arange(0, BLOCK_RUNS)
    in_step = runs < num_runs
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    starts = tl.load(query_starts_ptr + runs, mask=in_step, other=0)
    ends = tl.load(query_starts_ptr + runs + 1, mask=in_step, other=0)
    lens = tl.load(kv_lens_ptr + runs, mask=in_step, other=0)
    wanted = (lens > 0) & (ends - starts >= MIN_QUERIES)
    counts = tl.where(wanted, (ends - starts + TILE_TOKENS - 1) // TILE_TOKENS, 0)
    first_item = tl.sum(tl.where(runs < run, counts, 0), axis=0)
    if run == 0:
        tl.store(num_records_ptr, tl.sum(counts, axis=0))

    token = tl.load(query_starts_ptr + run)
    num_queries = tl.load(query_starts_ptr + run + 1) - token
    kv_len = tl.load(kv_lens_ptr + run)
    row = tl.load(run_rows_ptr + run)
    num_items = tl.sum(tl.where(runs == run, counts, 0), axis=0)
    for base in range(0, num_items, BLOCK_ITEMS):
        item = base + tl.arange(0, BLOCK_ITEMS)
        mask = item < num_items
        record = records_ptr + (first_item + item) * 8
        offset = (num_items - 1 - item) * TILE_TOKENS
        tl.store(record + 0, run + item * 0, mask=mask)
        tl.store(record + 1, row + item * 0, mask=mask)
        tl.store(record + 2, token + offset, mask=mask)
        tl.store(record + 3, tl.minimum(num_queries - offset, TILE_TOKENS), mask=mask)
        tl.store(record + 4, kv_len - num_queries + offset, mask=mask)
        tl.store(record + 5, kv_len + item * 0, mask=mask)
        tl.store(record + 6, item * 0, mask=mask)
        tl.store(record + 7, item * 0, mask=mask)


def _check_runs(query_starts: torch.Tensor, kv_lens: torch.Tensor, run_rows: torch.Tensor) -> int:
    num_runs = kv_lens.numel()
    if query_starts.numel() != num_runs + 1 or run_rows.numel() != num_runs:
        raise ValueError(
            f"work list: {num_runs} kv_lens need {num_runs + 1} query_starts and {num_runs} run_rows; "
            f"got {query_starts.numel()} and {run_rows.numel()}"
        )
    if not query_starts.dtype == kv_lens.dtype == run_rows.dtype == torch.int32:
        raise ValueError("work list: query_starts, kv_lens and run_rows must be int32")
    return num_runs


def build_decode_list(
    query_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    run_rows: torch.Tensor,
    work: WorkList,
    *,
    window: int = 0,
    pdl: bool = False,
) -> None:
    """Fill `work` for the decode kernel. `window`: how many last tokens a query sees, 0 for all.

    Raises:
        ValueError: array sizes or dtypes that do not fit.
    """
    num_runs = _check_runs(query_starts, kv_lens, run_rows)
    if work.runs.shape[0] != num_runs:
        raise ValueError(f"build_decode_list: the list was allocated for {work.runs.shape[0]} runs, got {num_runs}")
    _decode_list_kernel[(num_runs,)](
        query_starts,
        kv_lens,
        run_rows,
        work.records,
        work.num_records,
        work.runs,
        num_runs,
        WINDOW=window,
        MIN_CHUNK=work.policy.min_chunk,
        CHUNK_LIMIT=work.policy.max_chunks,
        BLOCK_RUNS=triton.next_power_of_2(num_runs),
        BLOCK_ITEMS=32,
        USE_PDL=pdl,
        num_warps=1 if num_runs <= 128 else 4,
        **launch_options(pdl),
    )


def build_prefill_list(
    query_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    run_rows: torch.Tensor,
    work: WorkList,
    *,
    tile_tokens: int,
    min_queries: int = 2,
    pdl: bool = False,
) -> None:
    """Fill `work` for the prefill kernel with every run of at least `min_queries` tokens.

    Use the default beside the decode kernel (which takes the runs of one token), and 1 where prefill runs alone.

    Raises:
        ValueError: array sizes or dtypes that do not fit.
    """
    num_runs = _check_runs(query_starts, kv_lens, run_rows)
    _prefill_list_kernel[(num_runs,)](
        query_starts,
        kv_lens,
        run_rows,
        work.records,
        work.num_records,
        num_runs,
        MIN_QUERIES=min_queries,
        TILE_TOKENS=tile_tokens,
        BLOCK_RUNS=triton.next_power_of_2(num_runs),
        BLOCK_ITEMS=128,
        USE_PDL=pdl,
        num_warps=1 if num_runs <= 128 else 4,
        **launch_options(pdl),
    )
