"""Work lists of the attention kernels, built on the device so that one captured grid serves any mix of lengths.

A *run* is one row's share of a step: `query_starts` int32 [num_runs + 1] says which tokens are its queries, `kv_lens`
int32 [num_runs] how many tokens of KV it sees (context and this step's tokens), `run_rows` int32 [num_runs] whose block
table it uses. A run with kv_len 0 is padding.

Decode list (runs of one query token; `decode_list.py`): the visible KV of all runs of the step, one after the other,
cut into shares that are alike, so that programs which begin together end together however long each run is. Padding
runs get one item per token, which makes the attention kernel write zeros there.

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


def _is_power_of_two(value: int) -> bool:
    return value >= 1 and not value & (value - 1)


@dataclass(frozen=True)
class SharePolicy:
    """All KV of a step in shares that are alike, one after the other, each a program's work for a KV head.

    A run that goes over a share's end is cut there, so that a step of n runs has fewer than n + num_shares pieces.
    Results differ in the last bits with what else is in the step: where they must not, the prefill kernel serves.
    """

    num_shares: int
    """At most."""
    cut: int = 32
    """Pieces begin at multiples of so many tokens; a power of two."""
    min_share: int = 64
    """Tokens, a multiple of `cut`: a smaller share is not worth a program."""
    short_share: int = 256
    """Tokens. Where shares would be no longer, a second piece takes a program longer than what equal shares save: so
    each run is cut by itself then, into pieces that are alike, and every piece is a share."""
    most_pieces: int = 256
    """Of a run, or one more: what adds them up takes longer with each, and has no help. Shares grow until they do."""

    def __post_init__(self) -> None:
        if self.num_shares < 1:
            raise ValueError(f"SharePolicy: num_shares must be 1 or more, got {self.num_shares}")
        if self.most_pieces < 1:
            raise ValueError(f"SharePolicy: most_pieces must be 1 or more, got {self.most_pieces}")
        if not _is_power_of_two(self.cut):
            raise ValueError(f"SharePolicy: cut must be a power of two, got {self.cut}")
        if self.min_share < self.cut or self.min_share % self.cut:
            raise ValueError(f"SharePolicy: min_share must be a multiple of {self.cut}, got {self.min_share}")

    def most_records(self, num_runs: int) -> int:
        """The most records of `num_runs` runs of one token, or padding of one."""
        return num_runs + self.num_shares - 1


@dataclass(frozen=True)
class WorkList:
    """Records of one attention kernel on the device, and how many of them this step uses."""

    records: torch.Tensor  # int32 [capacity, RECORD_WORDS]
    num_records: torch.Tensor  # int32 [2]: of all, of which these first ones are pieces of shares
    runs: torch.Tensor  # int32 [max_runs, 4]: token, first record, number of chunks (0: not a decode run), unused
    shares: torch.Tensor  # int32 [>= num_shares + 1]: the first record of each, and one past the last's
    policy: SharePolicy | None = None
    """Of a decode list."""

    @property
    def capacity(self) -> int:
        return self.records.shape[0]


def allocate_decode_list(max_runs: int, num_tokens: int, device: torch.device | str, policy: SharePolicy) -> WorkList:
    """Room for `max_runs` decode runs and `num_tokens` padding tokens."""
    return _allocate(max(1, policy.most_records(max_runs) + num_tokens), max_runs, device, policy)


def allocate_prefill_list(max_runs: int, num_tokens: int, tile_tokens: int, device: torch.device | str) -> WorkList:
    """Room for the tiles of any split of `num_tokens` query tokens over `max_runs` runs."""
    return _allocate(max(1, triton.cdiv(num_tokens, tile_tokens) + max_runs), max_runs, device, None)


def _allocate(capacity: int, max_runs: int, device: torch.device | str, policy: SharePolicy | None) -> WorkList:
    num_shares = policy.num_shares if policy else 0
    return WorkList(
        records=torch.zeros((capacity, RECORD_WORDS), dtype=torch.int32, device=device),  # [capacity, 8]
        num_records=torch.zeros(2, dtype=torch.int32, device=device),  # [2]
        runs=torch.zeros((max_runs, 4), dtype=torch.int32, device=device),  # [max_runs, 4]
        shares=torch.zeros(num_shares + 1, dtype=torch.int32, device=device),  # [num_shares + 1]
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


def check_runs(query_starts: torch.Tensor, kv_lens: torch.Tensor, run_rows: torch.Tensor) -> int:
    num_runs = kv_lens.numel()
    if query_starts.numel() != num_runs + 1 or run_rows.numel() != num_runs:
        raise ValueError(
            f"work list: {num_runs} kv_lens need {num_runs + 1} query_starts and {num_runs} run_rows; "
            f"got {query_starts.numel()} and {run_rows.numel()}"
        )
    if not query_starts.dtype == kv_lens.dtype == run_rows.dtype == torch.int32:
        raise ValueError("work list: query_starts, kv_lens and run_rows must be int32")
    return num_runs


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
    num_runs = check_runs(query_starts, kv_lens, run_rows)
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
