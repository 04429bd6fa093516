"""Products of many tokens with their experts: a tile of one expert's tokens at a time (see `expert_tiles.py`).

With e the expert of pair p, and t its token:

    inner[place, i] = act(x[t] . gate_up[e, i] + gate_up_bias[e, i],  x[t] . gate_up[e, I + i] + gate_up_bias[e, I + i])
    out[p, h]       = inner[place] . down[e, h] + down_bias[e, h]
    mixed[t, h]     = sum over t's pairs of held experts, in order: weights[p] * out[p, h]

x: [num_tokens, H]; gate_up: [experts, 2 * I, H]; down: [experts, H, I]; inner: [num_pairs, I], by place in
`ExpertTiles.order`, so that the second product reads its rows one after another; out: [num_pairs, H]; all in the
model's dtype, sums in float32. `act` as in `activation.py`.

Tiles are small where memory is the limit (a tile that covers all of an expert's tokens reads its weights once) and
large where matrix units are. The expert's weights are the tall operand. Sums over K and over a token's experts run in a
fixed order: results do not vary between runs.

Source: Gale et al., "MegaBlocks", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.activation import Activation, activate
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.device_limits import stages_that_fit
from stepwire_kernels.expert_tiles import ExpertTiles


@dataclass(frozen=True)
class TileTuning:
    """Launch shape of one grouped product."""

    block_n: int = 64
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3

    def stage_bytes(self, tile_rows: int, num_weights: int, element_size: int) -> int:
        """What one iteration multiplies: a tile of inputs, and one of each of the weights."""
        return (tile_rows + num_weights * self.block_n) * self.block_k * element_size


@triton.jit
def _gate_up_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    inner_ptr,
    order_ptr,
    records_ptr,
    INNER,
    K,
    x_stride,
    expert_stride,
    NUM_CHOSEN: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    record = records_ptr + tl.program_id(1) * 4
    rows = tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_K)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    expert = tl.load(record).to(tl.int64)
    first = tl.load(record + 1)
    count = tl.load(record + 2)
    if count > 0:
        col_mask = cols < INNER
        row_mask = rows < count
        tokens = tl.load(order_ptr + first + rows, mask=row_mask, other=0) // NUM_CHOSEN
        gate_at = weight_ptr + expert * expert_stride + cols.to(tl.int64)[:, None] * K + lanes[None, :]
        up_at = gate_at + tl.cast(INNER, tl.int64) * K
        x_at = x_ptr + tokens.to(tl.int64)[:, None] * x_stride + lanes[None, :]
        gate = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
            w_mask = col_mask[:, None]
            x_mask = row_mask[:, None]
            if not EVEN_K:
                w_mask = w_mask & (start + lanes < K)[None, :]
                x_mask = x_mask & (start + lanes < K)[None, :]
            x = tl.load(x_at + start, mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(gate_at + start, mask=w_mask, other=0.0)  # [BLOCK_N, BLOCK_K]
            v = tl.load(up_at + start, mask=w_mask, other=0.0)
            gate = tl.dot(w, tl.trans(x), gate, input_precision="ieee")
            up = tl.dot(v, tl.trans(x), up, input_precision="ieee")
        if HAS_BIAS:
            bias_at = bias_ptr + expert * (2 * INNER) + cols
            gate += tl.load(bias_at, mask=col_mask, other=0.0).to(tl.float32)[:, None]
            up += tl.load(bias_at + INNER, mask=col_mask, other=0.0).to(tl.float32)[:, None]
        inner_at = inner_ptr + (first + rows).to(tl.int64)[None, :] * INNER + cols[:, None]
        activated = activate(gate, up, KIND).to(inner_ptr.dtype.element_ty)
        tl.store(inner_at, activated, mask=col_mask[:, None] & row_mask[None, :])


@triton.jit
def _down_kernel(
    inner_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    order_ptr,
    records_ptr,
    N,
    K,
    expert_stride,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    record = records_ptr + tl.program_id(1) * 4
    rows = tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_K)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    expert = tl.load(record).to(tl.int64)
    first = tl.load(record + 1)
    count = tl.load(record + 2)
    if count > 0:
        col_mask = cols < N
        row_mask = rows < count
        pairs = tl.load(order_ptr + first + rows, mask=row_mask, other=0).to(tl.int64)
        weight_at = weight_ptr + expert * expert_stride + cols.to(tl.int64)[:, None] * K + lanes[None, :]
        inner_at = inner_ptr + (first + rows).to(tl.int64)[:, None] * K + lanes[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
            w_mask = col_mask[:, None]
            x_mask = row_mask[:, None]
            if not EVEN_K:
                w_mask = w_mask & (start + lanes < K)[None, :]
                x_mask = x_mask & (start + lanes < K)[None, :]
            x = tl.load(inner_at + start, mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(weight_at + start, mask=w_mask, other=0.0)  # [BLOCK_N, BLOCK_K]
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        if HAS_BIAS:
            acc += tl.load(bias_ptr + expert * N + cols, mask=col_mask, other=0.0).to(tl.float32)[:, None]
        out_at = out_ptr + pairs[None, :] * N + cols[:, None]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=col_mask[:, None] & row_mask[None, :])


@triton.jit
def _sum_kernel(
    pair_out_ptr,
    weights_ptr,
    experts_ptr,
    out_ptr,
    first_expert,
    num_held,
    num_cols,
    NUM_CHOSEN: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = cols < num_cols
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    acc = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    for place in tl.static_range(NUM_CHOSEN):
        pair = token * NUM_CHOSEN + place
        expert = tl.load(experts_ptr + pair) - first_expert
        # Nobody wrote the rows of experts that are held elsewhere.
        is_held = (expert >= 0) & (expert < num_held)
        values = tl.load(pair_out_ptr + pair * num_cols + cols, mask=mask & is_held, other=0.0)
        acc += tl.load(weights_ptr + pair) * values.to(tl.float32)
    tl.store(out_ptr + token * num_cols + cols, acc.to(out_ptr.dtype.element_ty), mask=mask)


def expert_gate_up(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: ExpertTiles,
    num_chosen: int,
    kind: Activation,
    *,
    tuning: TileTuning,
    pdl: bool = False,
) -> torch.Tensor:
    """The activated inner values of every pair of a held expert, by place in `tiles.order`: [num_pairs, I].

    gate_up: [experts, 2 * I, H] contiguous, bias: [experts, 2 * I] contiguous.
    """
    k = x.shape[1]
    inner_size = gate_up.shape[1] // 2
    inner = torch.empty((x.shape[0] * num_chosen, inner_size), dtype=x.dtype, device=x.device)  # [num_pairs, I]
    _gate_up_kernel[(triton.cdiv(inner_size, tuning.block_n), tiles.capacity)](
        x,
        gate_up,
        gate_up if bias is None else bias,
        inner,
        tiles.order,
        tiles.records,
        inner_size,
        k,
        x.stride(0),
        gate_up.stride(0),
        NUM_CHOSEN=num_chosen,
        KIND=kind,
        HAS_BIAS=bias is not None,
        EVEN_K=k % tuning.block_k == 0,
        BLOCK_M=tiles.tile_rows,
        BLOCK_N=tuning.block_n,
        BLOCK_K=tuning.block_k,
        NUM_STAGES=stages_that_fit(
            tuning.num_stages, tuning.stage_bytes(tiles.tile_rows, 2, x.element_size()), x.device
        ),
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return inner


def expert_down(
    inner: torch.Tensor,
    down: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: ExpertTiles,
    *,
    tuning: TileTuning,
    pdl: bool = False,
) -> torch.Tensor:
    """Every pair's output, [num_pairs, H]; rows of experts that are not held stay unwritten.

    down: [experts, H, I] contiguous, bias: [experts, H] contiguous.
    """
    num_pairs, k = inner.shape
    n = down.shape[1]
    out = torch.empty((num_pairs, n), dtype=inner.dtype, device=inner.device)  # [num_pairs, H]
    _down_kernel[(triton.cdiv(n, tuning.block_n), tiles.capacity)](
        inner,
        down,
        down if bias is None else bias,
        out,
        tiles.order,
        tiles.records,
        n,
        k,
        down.stride(0),
        HAS_BIAS=bias is not None,
        EVEN_K=k % tuning.block_k == 0,
        BLOCK_M=tiles.tile_rows,
        BLOCK_N=tuning.block_n,
        BLOCK_K=tuning.block_k,
        NUM_STAGES=stages_that_fit(
            tuning.num_stages, tuning.stage_bytes(tiles.tile_rows, 1, inner.element_size()), inner.device
        ),
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out


def sum_experts(
    pair_out: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    num_held: int,
    *,
    first_expert: int = 0,
    pdl: bool = False,
) -> torch.Tensor:
    """Each token's weighted sum, [num_tokens, H]; weights float32 and experts int32 [num_tokens, num_chosen]."""
    num_tokens, num_chosen = experts.shape
    num_cols = pair_out.shape[1]
    out = torch.empty((num_tokens, num_cols), dtype=pair_out.dtype, device=pair_out.device)  # [num_tokens, H]
    block = min(1024, triton.next_power_of_2(num_cols))
    _sum_kernel[(triton.cdiv(num_cols, block), num_tokens)](
        pair_out,
        weights,
        experts,
        out,
        first_expert,
        num_held,
        num_cols,
        NUM_CHOSEN=num_chosen,
        BLOCK_COLS=block,
        USE_PDL=pdl,
        num_warps=max(1, min(4, block // 256)),
        **launch_options(pdl),
    )
    return out
