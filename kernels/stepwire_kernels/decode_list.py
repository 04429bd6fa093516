"""The decode list, built on the device: pieces of the visible KV of every run of one token (fields in `work_list.py`).

Each run is as many cuts long as it sees, begun ones counted, and the runs of a step are laid one behind the other. That
line of T cuts is dealt out in order: of n shares, share i holds cuts i * T // n to (i + 1) * T // n, so that none has
more than one cut more than another. Where a share ends within a run, the run is cut. Few runs, or short ones, are cut
one by one instead, so that no program has two pieces (`short_share`). Pieces stand in the order of the line, so that
those of a share are neighbours. Padding stands behind all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.work_list import SharePolicy, WorkList, check_runs, first_visible


@triton.jit
def _store_records(
    records_ptr, first_record, item, mask, run, row, token, kv_len, kv_start, kv_end, first_item, num_chunks
):  # fmt: skip
    """One record an item, at first_record + item."""
    record = records_ptr + (first_record + item) * 8
    tl.store(record + 0, run + item * 0, mask=mask)
    tl.store(record + 1, row + item * 0, mask=mask)
    tl.store(record + 2, token, mask=mask)
    tl.store(record + 3, kv_len + item * 0, mask=mask)
    tl.store(record + 4, kv_start, mask=mask)
    tl.store(record + 5, kv_end, mask=mask)
    tl.store(record + 6, first_item + item * 0, mask=mask)
    tl.store(record + 7, num_chunks + item * 0, mask=mask)


@triton.jit
def _length_in_cuts(num_queries, kv_len, WINDOW: tl.constexpr, ALIGNED: tl.constexpr, CUT: tl.constexpr):
    """(cuts that a run of one token is long and 0 for others, the cut in which what it sees begins)."""
    first_cut = first_visible(kv_len - 1, WINDOW, ALIGNED) // CUT
    is_decode = (num_queries == 1) & (kv_len > 0)
    return tl.where(is_decode, (kv_len + CUT - 1) // CUT - first_cut, 0), first_cut


@triton.jit
def _share_at(cut, total, num_shares):
    """The share that holds a cut of the line: the last that begins at it or before."""
    # Rows that see the same prefix count it each: there may be more tokens than a cache holds, and more than 32 bits.
    products = cut.to(tl.int64) * num_shares + num_shares - 1
    return (products // tl.maximum(total, 1)).to(tl.int32)


@triton.jit
def _share_begin(share, total, num_shares):
    """The cut of the line at which a share begins."""
    return (share.to(tl.int64) * total // num_shares).to(tl.int32)


@triton.jit
def _share_list_kernel(
    query_starts_ptr,
    kv_lens_ptr,
    run_rows_ptr,
    records_ptr,
    num_records_ptr,
    list_runs_ptr,
    shares_ptr,
    num_runs,
    WINDOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    CUT: tl.constexpr,
    MIN_CUTS: tl.constexpr,
    SHORT_CUTS: tl.constexpr,
    MOST_PIECES: tl.constexpr,
    NUM_SHARES: tl.constexpr,
    BLOCK_SHARES: tl.constexpr,
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
    lengths, _ = _length_in_cuts(ends - starts, lens, WINDOW, ALIGNED, CUT)
    to_cuts = tl.cumsum(lengths, axis=0)
    from_cuts = to_cuts - lengths
    total = tl.sum(lengths, axis=0)
    most_shares = MOST_PIECES * total.to(tl.int64) // tl.maximum(tl.max(lengths, axis=0), 1)
    num_shares = tl.maximum(tl.minimum(tl.minimum(total // MIN_CUTS, NUM_SHARES), most_shares.to(tl.int32)), 1)
    counts = _share_at(to_cuts - 1, total, num_shares) - _share_at(from_cuts, total, num_shares) + 1
    # Runs cut one by one: in proportion and rounded up, for which a share a run is held back. So pieces are at most a
    # third longer than shares.
    num_decodes = tl.sum((lengths > 0).to(tl.int32), axis=0)
    is_short = (total <= SHORT_CUTS * NUM_SHARES) & (4 * num_decodes <= NUM_SHARES)
    spare = NUM_SHARES - num_decodes
    wanted = tl.minimum((lengths * spare + total - 1) // tl.maximum(total, 1), lengths // MIN_CUTS)
    wanted = tl.minimum(wanted, MOST_PIECES)
    piece = (lengths + tl.maximum(wanted, 1) - 1) // tl.maximum(wanted, 1)
    counts = tl.where(is_short, (lengths + piece - 1) // tl.maximum(piece, 1), counts)
    counts = tl.where(lengths > 0, counts, 0)
    num_pieces = tl.sum(counts, axis=0)
    padding = tl.where(in_step & (lens == 0), ends - starts, 0)
    if run == 0:
        tl.store(num_records_ptr, num_pieces + tl.sum(padding, axis=0))
        tl.store(num_records_ptr + 1, num_pieces)
        # Where a share begins, a piece does, which says so below. These hold nothing, and the last ends the list.
        shares = tl.arange(0, BLOCK_SHARES)
        holds_nothing = (shares >= tl.where(is_short, num_pieces, num_shares)) | (total == 0)
        tl.store(shares_ptr + shares, num_pieces, mask=(shares <= NUM_SHARES) & holds_nothing)

    token = tl.load(query_starts_ptr + run)
    kv_len = tl.load(kv_lens_ptr + run)
    row = tl.load(run_rows_ptr + run)
    num_queries = tl.load(query_starts_ptr + run + 1) - token
    length, first_cut = _length_in_cuts(num_queries, kv_len, WINDOW, ALIGNED, CUT)
    is_own = runs == run
    from_cut = tl.sum(tl.where(is_own, from_cuts, 0), axis=0)
    first_item = tl.sum(tl.where(runs < run, counts, 0), axis=0)
    num_items = tl.sum(tl.where(is_own, counts, 0), axis=0)
    own_piece = tl.sum(tl.where(is_own, piece, 0), axis=0)
    tl.store(list_runs_ptr + run * 4, token)
    tl.store(list_runs_ptr + run * 4 + 1, first_item)
    tl.store(list_runs_ptr + run * 4 + 2, num_items)
    for base in range(0, num_items, BLOCK_ITEMS):
        item = base + tl.arange(0, BLOCK_ITEMS)
        mask = item < num_items
        share = tl.where(is_short, first_item, _share_at(from_cut, total, num_shares)) + item
        share_begin = tl.where(is_short, from_cut + item * own_piece, _share_begin(share, total, num_shares))
        share_end = tl.where(is_short, share_begin + own_piece, _share_begin(share + 1, total, num_shares))
        begin = tl.maximum(share_begin, from_cut)
        end = tl.minimum(share_end, from_cut + length)
        kv_start = (first_cut + begin - from_cut) * CUT
        kv_end = tl.minimum((first_cut + end - from_cut) * CUT, kv_len)
        _store_records(
            records_ptr, first_item, item, mask, run, row, token + item * 0, kv_len, kv_start, kv_end, first_item,
            num_items,
        )  # fmt: skip
        tl.store(shares_ptr + share, first_item + item, mask=mask & (begin == share_begin))
    if kv_len == 0:
        first_padding = num_pieces + tl.sum(tl.where(runs < run, padding, 0), axis=0)
        for base in range(0, num_queries, BLOCK_ITEMS):
            item = base + tl.arange(0, BLOCK_ITEMS)
            zero = item * 0
            _store_records(
                records_ptr, first_padding, item, item < num_queries, run, row, token + item, 0, zero, zero,
                first_padding, 1,
            )  # fmt: skip


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
    """Fill `work` for the decode kernels. `window`: how many last tokens a query sees, 0 for all.

    `aligned`: windows begin at multiples of their size instead, and a query sees those of its own up to itself.

    Raises:
        ValueError: array sizes or dtypes that do not fit.
    """
    num_runs = check_runs(query_starts, kv_lens, run_rows)
    if work.runs.shape[0] != num_runs:
        raise ValueError(f"build_decode_list: the list was allocated for {work.runs.shape[0]} runs, got {num_runs}")
    policy = decode_policy_of(work)
    _share_list_kernel[(num_runs,)](
        query_starts,
        kv_lens,
        run_rows,
        work.records,
        work.num_records,
        work.runs,
        work.shares,
        num_runs,
        WINDOW=window,
        ALIGNED=aligned,
        CUT=policy.cut,
        MIN_CUTS=policy.min_share // policy.cut,
        SHORT_CUTS=policy.short_share // policy.cut,
        MOST_PIECES=policy.most_pieces,
        NUM_SHARES=policy.num_shares,
        BLOCK_SHARES=triton.next_power_of_2(policy.num_shares + 1),
        BLOCK_RUNS=triton.next_power_of_2(num_runs),
        BLOCK_ITEMS=32,
        USE_PDL=pdl,
        num_warps=1 if num_runs <= 128 else 4,
        **launch_options(pdl),
    )


def decode_policy_of(work: WorkList) -> SharePolicy:
    """By which a decode list was cut.

    Raises:
        ValueError: a list of prefill tiles.
    """
    if work.policy is None:
        raise ValueError("this work list is for prefill: allocate_decode_list makes those of decodes")
    return work.policy
