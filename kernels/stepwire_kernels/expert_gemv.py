"""Products of one or few tokens with their experts: each (token, expert) pair reads its expert's weights by itself.

The formulas of `expert_gemm.py`, without a work list: a program owns a few rows of one pair's gate and up, then a few
rows of a token's sum over its experts, whose products run one after another through the same accumulator. No matrix
units; nothing to bring together, nothing to add up afterwards. Tokens that share an expert read it twice, so this is
for token counts at which that is rare.

inner: [num_pairs, I], by pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.activation import Activation, activate
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream


@dataclass(frozen=True)
class PairTuning:
    """Launch shape of one product of pairs."""

    block_n: int = 4
    block_k: int = 1024
    num_warps: int = 4


@triton.jit
def _gate_up_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    inner_ptr,
    experts_ptr,
    first_expert,
    num_held,
    INNER,
    K,
    x_stride,
    expert_stride,
    NUM_CHOSEN: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pair = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    col_mask = cols < INNER
    x_row = x_ptr + (pair // NUM_CHOSEN).to(tl.int64) * x_stride
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    expert = (tl.load(experts_ptr + pair) - first_expert).to(tl.int64)
    if (expert >= 0) & (expert < num_held):
        gate_at = weight_ptr + expert * expert_stride + cols.to(tl.int64)[:, None] * K + lanes[None, :]
        up_at = gate_at + tl.cast(INNER, tl.int64) * K
        mask = col_mask[:, None] & (lanes < K)[None, :]
        w = tl.load(gate_at, mask=mask, other=0.0, eviction_policy="evict_first")  # [BLOCK_N, BLOCK_K]
        v = tl.load(up_at, mask=mask, other=0.0, eviction_policy="evict_first")
        gate_acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        up_acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            after = start + BLOCK_K
            mask = col_mask[:, None] & (after + lanes < K)[None, :]
            next_w = tl.load(gate_at + after, mask=mask, other=0.0, eviction_policy="evict_first")
            next_v = tl.load(up_at + after, mask=mask, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_row + start + lanes, mask=start + lanes < K, other=0.0).to(tl.float32)[None, :]
            gate_acc += w.to(tl.float32) * x
            up_acc += v.to(tl.float32) * x
            w = next_w
            v = next_v
        gate = tl.sum(gate_acc, axis=1)
        up = tl.sum(up_acc, axis=1)
        if HAS_BIAS:
            bias_at = bias_ptr + expert * (2 * INNER) + cols
            gate += tl.load(bias_at, mask=col_mask, other=0.0).to(tl.float32)
            up += tl.load(bias_at + INNER, mask=col_mask, other=0.0).to(tl.float32)
        activated = activate(gate, up, KIND).to(inner_ptr.dtype.element_ty)
        tl.store(inner_ptr + pair.to(tl.int64) * INNER + cols, activated, mask=col_mask)


@triton.jit
def _step_tile(
    weight_ptr, experts_ptr, first_pair, step, cols, lanes, first_expert, num_held, num_cols, K, expert_stride,
    CHUNKS: tl.constexpr, NUM_CHOSEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weights of step `step` of a token's walk over its experts' rows; zeros where there are none."""
    place = step // CHUNKS
    k = (step % CHUNKS) * BLOCK_K + lanes
    expert = (tl.load(experts_ptr + first_pair + place, mask=place < NUM_CHOSEN, other=-1) - first_expert).to(tl.int64)
    is_held = (place < NUM_CHOSEN) & (expert >= 0) & (expert < num_held)
    at = weight_ptr + expert * expert_stride + cols.to(tl.int64)[:, None] * K + k[None, :]
    mask = (cols < num_cols)[:, None] & (k < K)[None, :] & is_held
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")  # [BLOCK_N, BLOCK_K]


@triton.jit
def _down_kernel(
    inner_ptr,
    weight_ptr,
    bias_ptr,
    weights_ptr,
    experts_ptr,
    out_ptr,
    first_expert,
    num_held,
    num_cols,
    K,
    expert_stride,
    CHUNKS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    col_mask = cols < num_cols
    first_pair = token * NUM_CHOSEN
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    w = _step_tile(
        weight_ptr, experts_ptr, first_pair, 0, cols, lanes, first_expert, num_held, num_cols, K, expert_stride,
        CHUNKS, NUM_CHOSEN, BLOCK_K,
    )  # fmt: skip
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for step in range(NUM_CHOSEN * CHUNKS):
        following = _step_tile(
            weight_ptr, experts_ptr, first_pair, step + 1, cols, lanes, first_expert, num_held, num_cols, K,
            expert_stride, CHUNKS, NUM_CHOSEN, BLOCK_K,
        )  # fmt: skip
        pair = first_pair + step // CHUNKS
        k = (step % CHUNKS) * BLOCK_K + lanes
        expert = tl.load(experts_ptr + pair) - first_expert
        is_held = (expert >= 0) & (expert < num_held)
        # Nobody wrote the values of experts that are held elsewhere.
        x = tl.load(inner_ptr + pair * K + k, mask=(k < K) & is_held, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * (x * tl.load(weights_ptr + pair))[None, :]
        w = following
    total = tl.sum(acc, axis=1)
    if HAS_BIAS:
        for place in tl.static_range(NUM_CHOSEN):
            expert = tl.load(experts_ptr + first_pair + place) - first_expert
            is_held = (expert >= 0) & (expert < num_held)
            bias_at = bias_ptr + expert.to(tl.int64) * num_cols + cols
            bias = tl.load(bias_at, mask=col_mask & is_held, other=0.0).to(tl.float32)
            total += bias * tl.load(weights_ptr + first_pair + place)
    tl.store(out_ptr + token * num_cols + cols, total.to(out_ptr.dtype.element_ty), mask=col_mask)


def pair_gate_up(
    x: torch.Tensor,
    experts: torch.Tensor,
    gate_up: torch.Tensor,
    bias: torch.Tensor | None,
    kind: Activation,
    *,
    first_expert: int = 0,
    tuning: PairTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """The activated inner values of every pair of a held expert, [num_pairs, I]; other rows stay unwritten."""
    tuning = tuning or PairTuning()
    k = x.shape[1]
    inner_size = gate_up.shape[1] // 2
    num_pairs, num_chosen = experts.numel(), experts.shape[1]
    inner = torch.empty((num_pairs, inner_size), dtype=x.dtype, device=x.device)  # [num_pairs, I]
    _gate_up_kernel[(triton.cdiv(inner_size, tuning.block_n), num_pairs)](
        x,
        gate_up,
        gate_up if bias is None else bias,
        inner,
        experts,
        first_expert,
        gate_up.shape[0],
        inner_size,
        k,
        x.stride(0),
        gate_up.stride(0),
        NUM_CHOSEN=num_chosen,
        KIND=kind,
        HAS_BIAS=bias is not None,
        BLOCK_N=tuning.block_n,
        BLOCK_K=min(tuning.block_k, triton.next_power_of_2(k)),
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return inner


def pair_down(
    inner: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    down: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    first_expert: int = 0,
    tuning: PairTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Each token's weighted sum over its held experts, [num_tokens, H]."""
    tuning = tuning or PairTuning()
    k, n = inner.shape[1], down.shape[1]
    num_tokens, num_chosen = experts.shape
    out = torch.empty((num_tokens, n), dtype=inner.dtype, device=inner.device)  # [num_tokens, H]
    block_k = min(tuning.block_k, triton.next_power_of_2(k))
    _down_kernel[(triton.cdiv(n, tuning.block_n), num_tokens)](
        inner,
        down,
        down if bias is None else bias,
        weights,
        experts,
        out,
        first_expert,
        down.shape[0],
        n,
        k,
        down.stride(0),
        CHUNKS=triton.cdiv(k, block_k),
        NUM_CHOSEN=num_chosen,
        HAS_BIAS=bias is not None,
        BLOCK_N=tuning.block_n,
        BLOCK_K=block_k,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out
