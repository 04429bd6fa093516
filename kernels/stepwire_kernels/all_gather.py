"""Every rank's columns side by side, written by the ranks into each other's memory: logits of a split vocabulary.

    out[row, rank * columns + c] <- x_rank[row, c]

x: [num_rows, columns] on each of `size` ranks; out: [num_rows, size * columns], a view of memory that all ranks map.
`all_gather` gives every rank all rows; `deal_rows` gives each some of them whole, row r to rank r // rows_each: as many
bytes through the links as one rank receives rows.

Nothing is put together afterwards, and out is where the next call writes: between two calls every rank must have waited
for every other one, which any sum over ranks does, and by then be done with out.

Each program adds one to its row's count at every peer when its part is there; a row is complete once all parts of all
ranks are. Counts grow for ever (and wrap), so that a captured graph replays as a new round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.signals import await_round

# 32-bit words of a row that one program sends.
PART_WORDS = 4096


@dataclass(frozen=True)
class GatherBuffers:
    """One rank's view of the memory that all ranks map, theirs in rank order, alike in shape."""

    rank: int
    columns: int
    """Of a rank's part."""
    outputs: tuple[torch.Tensor, ...]  # [max_rows, size * columns] each
    counts: tuple[torch.Tensor, ...]  # int32 [size, max_rows] each: parts that came from each source
    rounds: torch.Tensor  # int32 [max_rows], this rank's own
    stop: torch.Tensor  # int32 [1]: the host's, page-locked; not zero: wait no more

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x [num_rows, columns] can be gathered here."""
        return (
            x.ndim == 2
            and x.is_contiguous()
            and x.dtype == self.outputs[0].dtype
            and x.shape[1] == self.columns
            and len(x) <= len(self.outputs[0])
        )


def gather_region_words(size: int, max_rows: int, columns: int, dtype: torch.dtype) -> int:
    """int64 words of a rank's region."""
    return -(-max_rows * size * columns * dtype.itemsize // 16) * 2 + -(-size * max_rows // 4) * 2


def gather_buffers(
    rank: int, regions: Sequence[torch.Tensor], max_rows: int, columns: int, dtype: torch.dtype, stop: torch.Tensor
) -> GatherBuffers:
    """Lay `regions` (int64 [gather_region_words], every rank's as this one maps it, all zero) out.

    Raises:
        ValueError: parts that are not whole 32-bit words.
    """
    if columns * dtype.itemsize % 4:
        raise ValueError(f"a rank's part of a row must be whole 32-bit words; got {columns} of {dtype}")
    size = len(regions)
    words = max_rows * size * columns
    middle = -(-words * dtype.itemsize // 16) * 2
    return GatherBuffers(
        rank=rank,
        columns=columns,
        outputs=tuple(region[:middle].view(dtype)[:words].view(max_rows, size * columns) for region in regions),
        counts=tuple(region[middle:].view(torch.int32)[: size * max_rows].view(size, max_rows) for region in regions),
        rounds=torch.zeros(max_rows, dtype=torch.int32, device=regions[rank].device),
        stop=stop,
    )


@triton.jit
def _send_parts_kernel(
    x_ptr,
    outputs,
    counts,
    num_words,
    row_words,
    max_rows,
    rows_each,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    DEALS: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0)
    owner = row // rows_each
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < num_words
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    words = tl.load(x_ptr + row.to(tl.int64) * num_words + cols, mask=mask, other=0)
    at = row.to(tl.int64) * row_words + RANK * num_words + cols
    for peer in tl.static_range(SIZE):
        if DEALS:
            tl.store(outputs[peer] + at, words, mask=mask & (owner == peer))
        else:
            tl.store(outputs[peer] + at, words, mask=mask)
    # Every thread's stores must precede the release that counts them.
    tl.debug_barrier()
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            if DEALS:
                if owner == peer:
                    tl.atomic_add(counts[peer] + RANK * max_rows + row, 1, sem="release", scope="sys")
            else:
                tl.atomic_add(counts[peer] + RANK * max_rows + row, 1, sem="release", scope="sys")


@triton.jit
def _await_parts_kernel(
    counts_ptr,
    rounds_ptr,
    stop_ptr,
    num_parts,
    max_rows,
    first_row,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = first_row + tl.program_id(0)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    round_ = tl.load(rounds_ptr + row) + 1
    for source in tl.static_range(SIZE):
        if source != RANK:
            await_round(counts_ptr + source * max_rows + row, round_ * num_parts, stop_ptr)
    tl.store(rounds_ptr + row, round_)


def all_gather(x: torch.Tensor, buffers: GatherBuffers, *, pdl: bool = False) -> torch.Tensor:
    """Every rank's x side by side in rank order, in memory that the next call overwrites.

    Raises:
        ValueError: `buffers.takes(x)` is not so.
    """
    return _launch(x, buffers, 0, pdl)


def deal_rows(x: torch.Tensor, buffers: GatherBuffers, rows_each: int, *, pdl: bool = False) -> torch.Tensor:
    """Every rank's part of this rank's rows of x, those from rank * rows_each on: at most rows_each, maybe none.

    All ranks call it with as many rows. What comes out is in memory that the next call overwrites.

    Raises:
        ValueError: `buffers.takes(x)` is not so, or there are rows that are nobody's.
    """
    if rows_each * len(buffers.outputs) < len(x) or rows_each < 1:
        raise ValueError(f"deal_rows: {len(x)} rows are more than {rows_each} for each of {len(buffers.outputs)} ranks")
    return _launch(x, buffers, rows_each, pdl)


def _launch(x: torch.Tensor, buffers: GatherBuffers, rows_each: int, pdl: bool) -> torch.Tensor:
    """rows_each: 0: all rows are everybody's."""
    if not buffers.takes(x):
        raise ValueError(
            f"all_gather: x is {x.dtype} {tuple(x.shape)}; it must be contiguous {buffers.outputs[0].dtype}, at most "
            f"{len(buffers.outputs[0])} rows of {buffers.columns}"
        )
    size, num_rows = len(buffers.outputs), len(x)
    first = min(num_rows, buffers.rank * rows_each)
    last = min(num_rows, first + rows_each) if rows_each else num_rows
    out = buffers.outputs[buffers.rank][first:last]
    if num_rows == 0:
        return out
    words = x.view(torch.int32)  # [num_rows, num_words]
    num_words, max_rows = words.shape[1], len(buffers.rounds)
    block = min(PART_WORDS, triton.next_power_of_2(num_words))
    num_parts = triton.cdiv(num_words, block)
    _send_parts_kernel[(num_rows, num_parts)](
        words,
        tuple(output.view(torch.int32) for output in buffers.outputs),
        buffers.counts,
        num_words,
        size * num_words,
        max_rows,
        max(1, rows_each),
        RANK=buffers.rank,
        SIZE=size,
        DEALS=rows_each > 0,
        BLOCK=block,
        USE_PDL=pdl,
        num_warps=max(1, min(8, block // 128)),
        **launch_options(pdl),
    )
    if first < last:
        _await_parts_kernel[(last - first,)](
            buffers.counts[buffers.rank],
            buffers.rounds,
            buffers.stop,
            num_parts,
            max_rows,
            first,
            RANK=buffers.rank,
            SIZE=size,
            USE_PDL=pdl,
            num_warps=1,
            **launch_options(pdl),
        )
    return out
