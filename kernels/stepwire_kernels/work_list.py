"""Work lists of the attention kernels, built on the device so that one captured grid serves any mix of lengths.

A *run* is one row's share of a step: `query_starts` int32 [num_runs + 1] says which tokens are its queries, `kv_lens`
int32 [num_runs] how many tokens of KV it sees (context and this step's tokens), `run_rows` int32 [num_runs] whose block
table it uses. A run with kv_len 0 is padding.

Decode list (runs of one query token): the visible KV is cut into chunks at multiples of the run's chunk size. Where
the policy has `wanted_records`, that many chunks are shared out over the runs by their lengths, and a run's chunks are
alike: as many as keep the device busy, and no more, since each leaves a partial result. Without, the chunk size is the
policy's `min_chunk`. Either is doubled until a run has at most `max_chunks`, so that the partial results need a bounded
buffer.
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
    """How finely a decode run's KV is split.

    Two policies give results that differ in the last bits. A server whose results must not depend on the batch uses one
    policy throughout, without `wanted_records`; otherwise each captured bucket may take `chunk_policy_for`.
    """

    min_chunk: int = 256
    """Tokens; a power of two. Chunks that are shared out are multiples of it."""
    max_chunks: int = 16
    """Of a run; a power of two."""
    wanted_records: int = 0
    """Chunks that a step is to have in all; 0: a run's chunks depend on its own length alone."""

    def __post_init__(self) -> None:
        if self.wanted_records < 0:
            raise ValueError(f"ChunkPolicy: wanted_records must be 0 or more, got {self.wanted_records}")
        for name, value in (("min_chunk", self.min_chunk), ("max_chunks", self.max_chunks)):
            if value < 1 or value & (value - 1):
                raise ValueError(f"ChunkPolicy: {name} must be a power of two, got {value}")

    def most_records(self, num_runs: int, max_visible: int) -> int:
        """The most records of `num_runs` runs of one token (or padding), none of which sees more than `max_visible`."""
        # One chunk more than the policy's: a sliding window need not start at a chunk's edge.
        most = num_runs * (self.max_chunks + 1)
        if self.wanted_records == 0:
            return most
        # What is shared out is rounded down to whole tokens: the smaller the chunk, the more chunks that makes.
        finest = self.wanted_records + -(-self.wanted_records // self.min_chunk)
        shared = max(finest, -(-num_runs * max_visible // LONGEST_CHUNK.value))
        # Each run's share is rounded up, and may begin within a chunk.
        return min(most, shared + 2 * num_runs)


THROUGHPUT = ChunkPolicy()
LATENCY = ChunkPolicy(min_chunk=64, max_chunks=64)


# Programs of the decode kernel that keep an H100's memory busy: measured best between 256 and 512.
WANTED_PROGRAMS = 384
# Beyond this a program that has its chunk alone makes the others wait.
LONGEST_CHUNK = tl.constexpr(2048)
# Of shared chunks, unless the policy says otherwise: the tiles of every kernel divide it.
CHUNK_MULTIPLE = 64


def chunk_policy_for(max_runs: int, num_kv_heads: int) -> ChunkPolicy:
    """The policy for a bucket: chunks as large as keep the device busy."""
    max_chunks = LATENCY.max_chunks if max_runs * num_kv_heads <= 64 else THROUGHPUT.max_chunks
    return ChunkPolicy(CHUNK_MULTIPLE, max_chunks, max(1, WANTED_PROGRAMS // num_kv_heads))


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
def first_visible(position, WINDOW: tl.constexpr, ALIGNED: tl.constexpr):
    """Position of the first token that a query sees: the window slides with it, or stands at multiples of its size."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(position, 0) // WINDOW * WINDOW if ALIGNED else tl.maximum(position - WINDOW + 1, 0)
    return first


@triton.jit
def _even_chunk(total_visible, MIN_CHUNK: tl.constexpr, WANTED_RECORDS: tl.constexpr):
    """Tokens of a chunk if `total_visible` tokens made WANTED_RECORDS of them; 0 where runs are cut by themselves."""
    even_chunk = total_visible * 0
    if WANTED_RECORDS > 0:
        even_chunk = tl.minimum(tl.maximum(total_visible // WANTED_RECORDS, MIN_CHUNK), LONGEST_CHUNK)
    return even_chunk


@triton.jit
def _chunk_tokens(visible, even_chunk, MIN_CHUNK: tl.constexpr, CHUNK_LIMIT: tl.constexpr, IS_SHARED: tl.constexpr):
    """The chunk size for a run that sees `visible` tokens, doubled until CHUNK_LIMIT chunks suffice."""
    chunk = visible * 0 + MIN_CHUNK
    if IS_SHARED:
        num_parts = tl.maximum((visible + even_chunk // 2) // even_chunk, 1)
        part = (visible + num_parts - 1) // num_parts
        chunk = tl.maximum((part + MIN_CHUNK - 1) // MIN_CHUNK, 1) * MIN_CHUNK
    for _ in tl.static_range(16):
        chunk = tl.where(chunk * CHUNK_LIMIT < visible, chunk * 2, chunk)
    return chunk


@triton.jit
def _decode_items(
    num_queries,
    kv_len,
    even_chunk,
    WINDOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    CHUNK_LIMIT: tl.constexpr,
    IS_SHARED: tl.constexpr,
):
    """(number of items, chunk size, first chunk) of a run; works on scalars and on tensors."""
    visible_from = first_visible(kv_len - 1, WINDOW, ALIGNED)
    chunk = _chunk_tokens(kv_len - visible_from, even_chunk, MIN_CHUNK, CHUNK_LIMIT, IS_SHARED)
    first_chunk = visible_from // chunk
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
    ALIGNED: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    CHUNK_LIMIT: tl.constexpr,
    WANTED_RECORDS: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    IS_SHARED: tl.constexpr = WANTED_RECORDS > 0
    run = tl.program_id(0)
    runs = tl.arange(0, BLOCK_RUNS)
    in_step = runs < num_runs
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    starts = tl.load(query_starts_ptr + runs, mask=in_step, other=0)
    ends = tl.load(query_starts_ptr + runs + 1, mask=in_step, other=0)
    lens = tl.load(kv_lens_ptr + runs, mask=in_step, other=0)
    visible = tl.where(ends - starts == 1, lens - first_visible(lens - 1, WINDOW, ALIGNED), 0)
    even_chunk = _even_chunk(tl.sum(visible, axis=0), MIN_CHUNK, WANTED_RECORDS)
    counts, _, _ = _decode_items(ends - starts, lens, even_chunk, WINDOW, ALIGNED, MIN_CHUNK, CHUNK_LIMIT, IS_SHARED)
    first_item = tl.sum(tl.where(runs < run, counts, 0), axis=0)
    if run == 0:
        tl.store(num_records_ptr, tl.sum(counts, axis=0))

    token = tl.load(query_starts_ptr + run)
    num_queries = tl.load(query_starts_ptr + run + 1) - token
    kv_len = tl.load(kv_lens_ptr + run)
    row = tl.load(run_rows_ptr + run)
    num_items, chunk, first_chunk = _decode_items(
        num_queries, kv_len, even_chunk, WINDOW, ALIGNED, MIN_CHUNK, CHUNK_LIMIT, IS_SHARED
    )
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
    aligned: bool = False,
    pdl: bool = False,
) -> None:
    """Fill `work` for the decode kernel. `window`: how many last tokens a query sees, 0 for all.

    `aligned`: windows begin at multiples of their size instead, and a query sees those of its own up to itself.

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
        ALIGNED=aligned,
        MIN_CHUNK=work.policy.min_chunk,
        CHUNK_LIMIT=work.policy.max_chunks,
        WANTED_RECORDS=work.policy.wanted_records,
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
