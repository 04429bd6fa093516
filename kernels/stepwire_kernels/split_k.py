"""The tail of a product whose K is split over programs: the last one of a tile adds the parts, in their order.

Each program leaves its part in `partial` (float32, SPLIT_K parts a tile, one behind another) and counts itself in the
tile's counter, which is zero before and after: the sum does not depend on who comes last, and a captured graph runs
again without a reset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class LinearWorkspace:
    """Scratch of the split-K kernel; `counters` is zero between launches. One per stream."""

    partial: torch.Tensor  # float32 [words]
    counters: torch.Tensor  # int32 [tiles]


def allocate_linear_workspace(
    device: torch.device | str, *, max_out_features: int = 262144, partial_words: int = 1 << 23
) -> LinearWorkspace:
    """Scratch for any split that `tuned/` holds: `partial_words` float32 of partial sums."""
    return LinearWorkspace(
        partial=torch.empty(partial_words, dtype=torch.float32, device=device),
        counters=torch.zeros(triton.cdiv(max_out_features, 16), dtype=torch.int32, device=device),
    )


@triton.jit
def add_up_parts(acc, partial_ptr, counters_ptr, tile, part, SPLIT_K: tl.constexpr):
    """(the tile's sum, whether this program is the one that has it); acc: float32 [rows, columns] of this part."""
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    # The only part is the last.
    finishes = part == SPLIT_K - 1
    if SPLIT_K > 1:
        offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        words: tl.constexpr = ROWS * COLUMNS
        base = partial_ptr + tile.to(tl.int64) * (SPLIT_K * words)
        tl.store(base + part * words + offsets, acc)
        # Every thread's stores must precede the one atomic that publishes them.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
        finishes = arrived == SPLIT_K - 1
        if finishes:
            acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            for other in tl.static_range(SPLIT_K):
                acc += tl.load(base + other * words + offsets, cache_modifier=".cg")
            tl.store(counters_ptr + tile, 0)
    return acc, finishes
