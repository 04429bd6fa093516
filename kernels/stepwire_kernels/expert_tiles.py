"""Work of a grouped product: (token, expert) pairs brought together by expert and cut into tiles, on the device.

Pair p is the (p % num_chosen)-th expert of token p // num_chosen. Of the experts first_expert .. first_expert + held:

    order    int32 [num_pairs]: the pairs by expert, each expert's in rising order; what follows the last held expert's
             pairs is not written
    records  int32 [capacity, 4]: (expert, counted from first_expert; first place in `order`; number of pairs; unused)

A tile is up to `tile_rows` pairs of one expert. Expert e's tiles begin at record pairs_before(e) // tile_rows + e:
disjoint whatever the counts are, so that no expert needs to know how many tiles the others have. Records between are
tiles of no pairs. Few pairs take one launch, in which each expert reads all of them; many take two: a histogram of each
chunk of pairs, then every chunk finds its experts' places from the histograms before it. The grid that reads them is
fixed by the number of pairs alone, and a captured graph serves any routing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream

TILE_WORDS = 4
# From here on an expert that reads all pairs is slower than a second launch.
CHUNKED_FROM_PAIRS = 4096
CHUNK_PAIRS = 512


@dataclass(frozen=True)
class ExpertTiles:
    """The work list of one layer's experts."""

    order: torch.Tensor  # int32 [num_pairs]
    records: torch.Tensor  # int32 [capacity, TILE_WORDS]
    tile_rows: int

    @property
    def capacity(self) -> int:
        return self.records.shape[0]


@triton.jit
def _write_records(
    records_ptr, expert, place, count, num_held, capacity, TILE_ROWS: tl.constexpr, BLOCK_TILES: tl.constexpr
):
    """The records of an expert whose `count` pairs begin at `place`, up to the next expert's."""
    first_tile = place // TILE_ROWS + expert
    # The last expert clears what is left.
    next_tile = tl.where(expert == num_held - 1, capacity, (place + count) // TILE_ROWS + expert + 1)
    for start in range(first_tile, next_tile, BLOCK_TILES):
        tiles = start + tl.arange(0, BLOCK_TILES)
        mask = tiles < next_tile
        offsets = (tiles - first_tile) * TILE_ROWS
        record = records_ptr + tiles * 4
        tl.store(record, expert + tiles * 0, mask=mask)
        tl.store(record + 1, place + offsets, mask=mask)
        tl.store(record + 2, tl.maximum(tl.minimum(count - offsets, TILE_ROWS), 0), mask=mask)
        tl.store(record + 3, tiles * 0, mask=mask)


@triton.jit
def _count_kernel(
    experts_ptr,
    counts_ptr,
    num_pairs,
    first_expert,
    num_held,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Pairs of each expert in one chunk; those of others are counted behind the last."""
    pairs = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    numbers = tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=-1) - first_expert
    is_held = (numbers >= 0) & (numbers < num_held) & (pairs < num_pairs)
    counts = tl.histogram(tl.where(is_held, numbers, num_held), BINS)
    tl.store(counts_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _place_kernel(
    experts_ptr,
    counts_ptr,
    places_ptr,
    order_ptr,
    records_ptr,
    num_pairs,
    first_expert,
    num_held,
    capacity,
    TILE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program a chunk: its pairs' places in `order`, and the records of some experts."""
    chunk = tl.program_id(0)
    num_chunks = tl.num_programs(0)
    bins = tl.arange(0, BINS)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    total = tl.zeros([BINS], dtype=tl.int32)
    before = tl.zeros([BINS], dtype=tl.int32)
    for start in range(0, num_chunks, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        counts = tl.load(
            counts_ptr + rows[:, None] * BINS + bins[None, :], mask=(rows < num_chunks)[:, None], other=0
        )  # [BLOCK_ROWS, BINS]
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((rows < chunk)[:, None], counts, 0), axis=0)
    starts = tl.cumsum(total, axis=0) - total
    for expert in range(chunk, num_held, num_chunks):
        place = tl.sum(tl.where(bins == expert, starts, 0), axis=0)
        count = tl.sum(tl.where(bins == expert, total, 0), axis=0)
        _write_records(records_ptr, expert, place, count, num_held, capacity, TILE_ROWS, BLOCK_TILES)
    # Through memory, so that every pair can look up its expert's place.
    own_places = places_ptr + chunk * BINS
    tl.store(own_places + bins, starts + before)
    tl.debug_barrier()
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    numbers = tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=-1) - first_expert
    is_held = (numbers >= 0) & (numbers < num_held) & (pairs < num_pairs)
    rank = tl.zeros([CHUNK], dtype=tl.int32)
    for start in range(chunk * CHUNK, chunk * CHUNK + CHUNK, BLOCK_OTHERS):
        others = start + tl.arange(0, BLOCK_OTHERS)
        other_numbers = tl.load(experts_ptr + others, mask=others < num_pairs, other=-1) - first_expert
        is_before = (numbers[:, None] == other_numbers[None, :]) & (others[None, :] < pairs[:, None])
        rank += tl.sum(is_before.to(tl.int32), axis=1)
    place = tl.load(own_places + numbers, mask=is_held, other=0)
    tl.store(order_ptr + place + rank, pairs, mask=is_held)


@triton.jit
def _tiles_kernel(
    experts_ptr,
    order_ptr,
    records_ptr,
    num_pairs,
    first_expert,
    num_held,
    capacity,
    TILE_ROWS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program an expert: it reads all pairs twice, to count those before its own and to place its own."""
    expert = tl.program_id(0)
    lanes = tl.arange(0, BLOCK_PAIRS)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    lower = tl.zeros([BLOCK_PAIRS], dtype=tl.int32)
    own = tl.zeros([BLOCK_PAIRS], dtype=tl.int32)
    for start in range(0, num_pairs, BLOCK_PAIRS):
        pairs = start + lanes
        numbers = tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=-1) - first_expert
        lower += ((numbers >= 0) & (numbers < expert)).to(tl.int32)
        own += (numbers == expert).to(tl.int32)
    place = tl.sum(lower, axis=0)
    count = tl.sum(own, axis=0)
    _write_records(records_ptr, expert, place, count, num_held, capacity, TILE_ROWS, BLOCK_TILES)
    if count > 0:
        for start in range(0, num_pairs, BLOCK_PAIRS):
            pairs = start + lanes
            numbers = tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=-1) - first_expert
            is_own = numbers == expert
            rank = tl.cumsum(is_own.to(tl.int32), axis=0)
            tl.store(order_ptr + place + rank - 1, pairs, mask=is_own)
            place += tl.sum(is_own.to(tl.int32), axis=0)


def max_tiles(num_pairs: int, num_held: int, tile_rows: int) -> int:
    """Records for any routing of so many pairs."""
    return num_pairs // tile_rows + num_held


def build_expert_tiles(
    experts: torch.Tensor, num_held: int, tile_rows: int, *, first_expert: int = 0, pdl: bool = False
) -> ExpertTiles:
    """The tiles of `num_held` experts from `first_expert` on; experts: int32 [num_tokens, num_chosen].

    Raises:
        ValueError: experts are not contiguous int32, or there is none.
    """
    if experts.dtype != torch.int32 or not experts.is_contiguous() or num_held < 1:
        raise ValueError(
            f"build_expert_tiles: takes contiguous int32 experts and at least one held expert, got {experts.dtype} and "
            f"{num_held}"
        )
    num_pairs = experts.numel()
    capacity = max_tiles(num_pairs, num_held, tile_rows)
    order = torch.empty(max(1, num_pairs), dtype=torch.int32, device=experts.device)  # [num_pairs]
    records = torch.empty((capacity, TILE_WORDS), dtype=torch.int32, device=experts.device)  # [capacity, 4]
    if num_pairs >= CHUNKED_FROM_PAIRS:
        _build_by_chunks(experts, order, records, first_expert, num_held, tile_rows, pdl=pdl)
        return ExpertTiles(order, records, tile_rows)
    block = triton.next_power_of_2(max(128, num_pairs))
    _tiles_kernel[(num_held,)](
        experts,
        order,
        records,
        num_pairs,
        first_expert,
        num_held,
        capacity,
        TILE_ROWS=tile_rows,
        BLOCK_PAIRS=block,
        BLOCK_TILES=32,
        USE_PDL=pdl,
        num_warps=1 if block <= 256 else 4 if block <= 2048 else 8,
        **launch_options(pdl),
    )
    return ExpertTiles(order, records, tile_rows)


def _build_by_chunks(
    experts: torch.Tensor,
    order: torch.Tensor,
    records: torch.Tensor,
    first_expert: int,
    num_held: int,
    tile_rows: int,
    *,
    pdl: bool,
) -> None:
    num_pairs = experts.numel()
    num_chunks, bins = triton.cdiv(num_pairs, CHUNK_PAIRS), triton.next_power_of_2(max(32, num_held + 1))
    counts, places = torch.empty((2, num_chunks, bins), dtype=torch.int32, device=experts.device)  # [chunks, bins] each
    _count_kernel[(num_chunks,)](
        experts,
        counts,
        num_pairs,
        first_expert,
        num_held,
        CHUNK=CHUNK_PAIRS,
        BINS=bins,
        USE_PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    _place_kernel[(num_chunks,)](
        experts,
        counts,
        places,
        order,
        records,
        num_pairs,
        first_expert,
        num_held,
        records.shape[0],
        TILE_ROWS=tile_rows,
        CHUNK=CHUNK_PAIRS,
        BINS=bins,
        BLOCK_ROWS=max(1, 4096 // bins),
        BLOCK_OTHERS=32,
        BLOCK_TILES=32,
        USE_PDL=pdl,
        num_warps=8,
        **launch_options(pdl),
    )
