"""Linear layers whose rows do not depend on how many there are: y = x @ weight^T + bias.

x: [num_tokens, K]; weight: [N, K] row-major; bias: [N]; y: [num_tokens, N]; accumulation in float32.

One tile shape for every number of tokens, and one order of sums for every element: K is cut into `num_splits(N, K)`
spans, each summed by itself in steps of BLOCK_K, and the spans' sums are added in order. Few tokens spread the spans
over programs, so that the whole device reads the weight, and the last program of a tile adds them; many tokens have
tiles enough, and one program goes through the spans itself. Both give the same bits.

Source of the idea: He et al., "Defeating Nondeterminism in LLM Inference", Thinking Machines Lab, 2025.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.split_k import LinearWorkspace

BLOCK_M = 64
BLOCK_N = 64
BLOCK_K = 64
NUM_WARPS = 4
# Programs that few tokens should have: two on each multiprocessor of the largest device, a constant so that results
# do not change from device to device for this.
TARGET_PROGRAMS = 264
MAX_SPLITS = 16
MIN_STEPS_PER_SPLIT = 4
# Up to so many tiles of tokens the spans are spread over programs.
MAX_SPREAD_TILES = 1


@triton.jit
def _span_sum(
    x_ptr,
    weight_ptr,
    tokens,
    token_mask,
    rows,
    row_mask,
    first,
    last,
    K,
    x_stride,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Products over the inputs first .. last - 1: float32 [BLOCK_M, BLOCK_N]."""
    cols = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + tokens.to(tl.int64)[:, None] * x_stride
    weight_rows = weight_ptr + rows.to(tl.int64)[None, :] * weight_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=NUM_STAGES):
        k = start + cols
        k_mask = k < K
        x = tl.load(x_rows + k[None, :], mask=token_mask[:, None] & k_mask[None, :], other=0.0)
        w = tl.load(weight_rows + k[:, None], mask=row_mask[None, :] & k_mask[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def _invariant_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    num_tokens,
    N,
    K,
    x_stride,
    weight_stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    IS_SPREAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    # Tiles of tokens are neighbours: they read the same weights.
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    token_mask = tokens < num_tokens
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    span = tl.cdiv(tl.cdiv(K, BLOCK_K), NUM_SPLITS) * BLOCK_K
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    finishes = True
    if IS_SPREAD:
        split = tl.program_id(2)
        first = split * span
        acc = _span_sum(
            x_ptr, weight_ptr, tokens, token_mask, rows, row_mask, first, tl.minimum(first + span, K), K, x_stride,
            weight_stride, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
        )  # fmt: skip
        tile = tile_m * tl.num_programs(1) + tile_n
        offsets = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tile_words = BLOCK_M * BLOCK_N
        base = partial_ptr + tile.to(tl.int64) * (NUM_SPLITS * tile_words)
        tl.store(base + split * tile_words + offsets, acc)
        # Every thread's stores must precede the one atomic that publishes them.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
        finishes = arrived == NUM_SPLITS - 1
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        if finishes:
            for part in tl.static_range(NUM_SPLITS):
                total += tl.load(base + part * tile_words + offsets, cache_modifier=".cg")
            tl.store(counters_ptr + tile, 0)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for split in range(NUM_SPLITS):
            first = split * span
            total += _span_sum(
                x_ptr, weight_ptr, tokens, token_mask, rows, row_mask, first, tl.minimum(first + span, K), K, x_stride,
                weight_stride, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
            )  # fmt: skip
    if finishes:
        if HAS_BIAS:
            total += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[None, :]
        out_at = out_ptr + tokens.to(tl.int64)[:, None] * out_stride + rows[None, :]
        tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=token_mask[:, None] & row_mask[None, :])


def num_splits(num_outputs: int, num_inputs: int) -> int:
    """Spans that K is summed in: a function of the weight alone."""
    wanted = TARGET_PROGRAMS // triton.cdiv(num_outputs, BLOCK_N)
    most = triton.cdiv(num_inputs, BLOCK_K) // MIN_STEPS_PER_SPLIT
    return max(1, min(wanted, most, MAX_SPLITS))


def invariant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    workspace: LinearWorkspace,
    *,
    spread: bool | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """y [num_tokens, N]; any number of tokens.

    `spread`: whether spans go to programs of their own (None: where there are few tokens). The bits are the same.

    Raises:
        ValueError: shapes or strides that do not fit, or more spans than there is workspace for.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"invariant_linear: takes x [M, K] and weight [N, K], got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("invariant_linear: the K dimension of x and weight must be contiguous")
    (num_tokens, k), n = x.shape, weight.shape[0]
    if out is None:
        out = torch.empty((num_tokens, n), dtype=x.dtype, device=x.device)  # [num_tokens, N]
    if num_tokens == 0:
        return out
    splits = num_splits(n, k)
    tiles_m, tiles_n = triton.cdiv(num_tokens, BLOCK_M), triton.cdiv(n, BLOCK_N)
    is_spread = splits > 1 and (tiles_m <= MAX_SPREAD_TILES if spread is None else spread)
    words = tiles_m * tiles_n * splits * BLOCK_M * BLOCK_N
    if is_spread and (words > workspace.partial.numel() or tiles_m * tiles_n > workspace.counters.numel()):
        raise ValueError(
            f"invariant_linear: {num_tokens} tokens and N={n} in {splits} spans need {words} workspace words, there "
            f"are {workspace.partial.numel()}; allocate a larger workspace"
        )
    _invariant_kernel[(tiles_m, tiles_n, splits if is_spread else 1)](
        x,
        weight,
        x if bias is None else bias,
        out,
        workspace.partial,
        workspace.counters,
        num_tokens,
        n,
        k,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        HAS_BIAS=bias is not None,
        NUM_SPLITS=splits,
        IS_SPREAD=is_spread,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        NUM_STAGES=3 if x.dtype == torch.float32 else 4,
        USE_PDL=pdl,
        num_warps=NUM_WARPS,
        **launch_options(pdl),
    )
    return out
