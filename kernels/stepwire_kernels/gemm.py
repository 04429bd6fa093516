"""Linear layers for few tokens: y = x @ weight^T + bias.

x: [num_tokens, K]; weight: [N, K] row-major; bias: [N]; y: [num_tokens, N]; accumulation in float32.

Decoding reads every weight once, so the job is to keep the memory busy:

* `gemv` (1 to 4 tokens): a program owns a few rows of the weight and walks K; no matrix units. With PDL its first
  weight tile is on the way before the previous kernel has ended.
* `skinny_gemm` (up to 64 tokens): matrix units with the weight as the tall operand; K is split over programs where N
  alone does not fill the device, and the last program of a tile adds the parts in order, so that results do not vary
  between runs.

Others with more ahead of them or for more tokens: `fused_linear`, `tile_linear`. Which is used: `linear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.split_k import LinearWorkspace, add_up_parts

MAX_GEMV_TOKENS = 4
MAX_SKINNY_TOKENS = 64


@dataclass(frozen=True)
class GemvTuning:
    """Launch shape of `gemv`."""

    block_n: int = 8
    block_k: int = 512
    num_warps: int = 4


@dataclass(frozen=True)
class SkinnyTuning:
    """Launch shape of `skinny_gemm`."""

    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4


@triton.jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    x_stride,
    weight_stride,
    out_stride,
    NUM_TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    cols = tl.arange(0, BLOCK_K)
    weight_at = weight_ptr + rows.to(tl.int64)[:, None] * weight_stride + cols[None, :]
    mask = row_mask[:, None]
    first_mask = mask if EVEN_K else mask & (cols < K)[None, :]
    # The weight does not depend on earlier kernels: fetch it before waiting for them.
    w = tl.load(weight_at, mask=first_mask, other=0.0, eviction_policy="evict_first")  # [BLOCK_N, BLOCK_K]
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    acc0 = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    acc2 = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    acc3 = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + cols
        after = start + BLOCK_K + cols
        after_mask = mask & (after < K)[None, :]
        following = tl.load(weight_at + start + BLOCK_K, mask=after_mask, other=0.0, eviction_policy="evict_first")
        wide = w.to(tl.float32)
        k_mask = k < K
        acc0 += wide * tl.load(x_ptr + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
        if NUM_TOKENS > 1:
            acc1 += wide * tl.load(x_ptr + x_stride + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
        if NUM_TOKENS > 2:
            acc2 += wide * tl.load(x_ptr + 2 * x_stride + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
        if NUM_TOKENS > 3:
            acc3 += wide * tl.load(x_ptr + 3 * x_stride + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
        w = following
    bias = tl.zeros([BLOCK_N], dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
    out_type = out_ptr.dtype.element_ty
    tl.store(out_ptr + rows, (tl.sum(acc0, axis=1) + bias).to(out_type), mask=row_mask)
    if NUM_TOKENS > 1:
        tl.store(out_ptr + out_stride + rows, (tl.sum(acc1, axis=1) + bias).to(out_type), mask=row_mask)
    if NUM_TOKENS > 2:
        tl.store(out_ptr + 2 * out_stride + rows, (tl.sum(acc2, axis=1) + bias).to(out_type), mask=row_mask)
    if NUM_TOKENS > 3:
        tl.store(out_ptr + 3 * out_stride + rows, (tl.sum(acc3, axis=1) + bias).to(out_type), mask=row_mask)


@triton.jit
def _skinny_kernel(
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
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    tokens = tl.arange(0, BLOCK_M)
    token_mask = tokens < num_tokens
    cols = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    first = split * steps * BLOCK_K
    last = tl.minimum(first + steps * BLOCK_K, K)
    weight_rows = weight_ptr + rows.to(tl.int64)[:, None] * weight_stride
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=NUM_STAGES):
        k = start + cols
        k_mask = k < K
        w = tl.load(
            weight_rows + k[None, :],
            mask=row_mask[:, None] & k_mask[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )  # [BLOCK_N, BLOCK_K]
        x = tl.load(
            x_ptr + tokens[:, None] * x_stride + k[None, :], mask=token_mask[:, None] & k_mask[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    acc, finishes = add_up_parts(acc, partial_ptr, counters_ptr, tile, split, SPLIT_K)
    if finishes:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        out_at = out_ptr + tokens[None, :] * out_stride + rows[:, None]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])


def _check(name: str, x: torch.Tensor, weight: torch.Tensor, limit: int) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or not 1 <= x.shape[0] <= limit:
        raise ValueError(
            f"{name}: takes x [1..{limit}, K] and weight [N, K], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(f"{name}: the K dimension of x and weight must be contiguous")


def _block_m(num_tokens: int) -> int:
    return max(16, triton.next_power_of_2(num_tokens))


def has_room(workspace: LinearWorkspace, tuning: SkinnyTuning, num_tokens: int, n: int) -> bool:
    """Whether the parts of `skinny_gemm`'s sums fit into the workspace."""
    tiles = triton.cdiv(n, tuning.block_n)
    words = tiles * tuning.split_k * tuning.block_n * _block_m(num_tokens)
    return tuning.split_k == 1 or (words <= workspace.partial.numel() and tiles <= workspace.counters.numel())


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tuning: GemvTuning | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """y for 1 to 4 tokens, [num_tokens, N].

    Raises:
        ValueError: shapes or strides that do not fit.
    """
    _check("gemv", x, weight, MAX_GEMV_TOKENS)
    tuning = tuning or GemvTuning()
    num_tokens, k = x.shape
    n = weight.shape[0]
    if out is None:
        out = torch.empty((num_tokens, n), dtype=x.dtype, device=x.device)  # [num_tokens, N]
    _gemv_kernel[(triton.cdiv(n, tuning.block_n),)](
        x,
        weight,
        x if bias is None else bias,
        out,
        n,
        k,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        NUM_TOKENS=num_tokens,
        HAS_BIAS=bias is not None,
        EVEN_K=k % tuning.block_k == 0,
        BLOCK_N=tuning.block_n,
        BLOCK_K=tuning.block_k,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out


def skinny_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    workspace: LinearWorkspace,
    *,
    tuning: SkinnyTuning | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """y for up to 64 tokens, [num_tokens, N].

    Raises:
        ValueError: shapes or strides that do not fit, or a split that needs more workspace than there is.
    """
    _check("skinny_gemm", x, weight, MAX_SKINNY_TOKENS)
    tuning = tuning or SkinnyTuning()
    num_tokens, k = x.shape
    n = weight.shape[0]
    block_m = _block_m(num_tokens)
    tiles = triton.cdiv(n, tuning.block_n)
    if not has_room(workspace, tuning, num_tokens, n):
        raise ValueError(
            f"skinny_gemm: N={n} split {tuning.split_k} ways for {num_tokens} tokens does not fit into "
            f"{workspace.partial.numel()} words and {workspace.counters.numel()} counters; allocate a larger workspace"
        )
    if out is None:
        out = torch.empty((num_tokens, n), dtype=x.dtype, device=x.device)  # [num_tokens, N]
    _skinny_kernel[(tiles, tuning.split_k)](
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
        SPLIT_K=tuning.split_k,
        BLOCK_M=block_m,
        BLOCK_N=tuning.block_n,
        BLOCK_K=tuning.block_k,
        NUM_STAGES=tuning.num_stages,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out
