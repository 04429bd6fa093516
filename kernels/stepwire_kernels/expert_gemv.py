"""Products of one or few tokens with their experts: each (token, expert) pair reads its expert's weights by itself.

The formulas of `expert_gemm.py`, without a work list: no matrix units, nothing to bring together, nothing to add up
afterwards. Tokens that share an expert read it twice, so this is for token counts at which that is rare.

At one token the two products are a chain in which memory must never rest:

* `pair_gate_up`: a program owns some outputs of one pair, whose rows it copies to shared memory some steps ahead. It
  takes the router's logits and finds its expert itself.
* `pair_down`: a program owns some outputs of a token, and sums over all of its experts. It begins while the product
  ahead still runs (which lets it in as soon as it has the logits itself), chooses as well, and has most of its weights
  in registers when the inner values are ready.

So a mixture is two launches after its router. inner: [num_pairs, I], by pair.
"""

# ruff: noqa: RUF005 (Triton's compiler knows no stars in tuples)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from stepwire_kernels.activation import Activation, activate
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.expert_routing import RouterLogits, best_experts, nth_expert

# Neighbours in a row that one thread loads at once, 16 bytes.
LANE_BYTES = 16

Chosen = tuple[torch.Tensor, torch.Tensor]
"""Weights float32 and experts int32, [num_tokens, num_chosen] each, both contiguous."""


@dataclass(frozen=True)
class PairGateUpTuning:
    """Launch shape: a program has `block_n` outputs at a time, `turns` times."""

    block_n: int = 2
    turns: int = 12
    num_warps: int = 4
    num_stages: int = 4


@dataclass(frozen=True)
class PairDownTuning:
    """Launch shape: a program has `block_n` outputs; a tile is `block_k` inputs of all of a token's experts.

    `ahead`: tiles on their way before the inner values are there.
    """

    block_n: int = 8
    block_k: int = 256
    num_warps: int = 8
    ahead: int = 3


# Elements of a tile in 16 bits: what a program of the tunings' warps has in a stage or in registers at once. With eight
# experts and three tiles a program of the second product takes 128 registers: one has room on a multiprocessor beside
# four of the first product, and two, which are all of a token's, have when those are gone.
GATE_UP_TILE = 8192
DOWN_TILE = 16384
# Programs of gate and up, about as many as run at once; and the least turns that are worth finding one's expert.
GATE_UP_PROGRAMS = 512
MIN_TURNS = 6
MAX_STEPS = 8
# Of a program's shared memory, which holds one stage less than it has: what every device since 8.6 gives it.
STAGED_BYTES = 96 << 10


def default_pair_tunings(
    num_tokens: int, num_chosen: int, hidden: int, inner_size: int, dtype: torch.dtype
) -> tuple[PairGateUpTuning, PairDownTuning]:
    """Launch shapes that keep tiles as large as those measured for Qwen3-30B-A3B."""
    scale = max(1, dtype.itemsize // 2)
    block_n = max(1, GATE_UP_TILE // scale // (2 * triton.next_power_of_2(hidden)))
    tile_bytes = block_n * 2 * triton.next_power_of_2(hidden) * dtype.itemsize
    stages = max(2, min(4, 1 + STAGED_BYTES // tile_bytes))
    turns = max(MIN_TURNS, triton.cdiv(num_tokens * num_chosen * inner_size, block_n * GATE_UP_PROGRAMS))
    block_k = max(256, triton.next_power_of_2(triton.cdiv(inner_size, MAX_STEPS)))
    rows = max(1, DOWN_TILE // scale // (triton.next_power_of_2(num_chosen) * block_k))
    return PairGateUpTuning(block_n, turns, num_stages=stages), PairDownTuning(rows, block_k)


@triton.jit
def _gate_up_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    inner_ptr,
    logits_ptr,
    correction_ptr,
    experts_ptr,
    first_expert,
    num_held,
    INNER,
    K,
    x_stride,
    logits_stride,
    expert_stride,
    NUM_CHOSEN: tl.constexpr,
    CHOOSES: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pair = tl.program_id(1)
    token = (pair // NUM_CHOSEN).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    lane_mask = lanes < K
    wait_upstream(USE_PDL)
    # The product behind this one reads what the kernels ahead of this one have written: not before they have.
    release_downstream(USE_PDL)
    x = tl.load(x_ptr + token * x_stride + lanes, mask=lane_mask, other=0.0).to(tl.float32)[None, None, :]
    if CHOOSES:
        expert = nth_expert(
            logits_ptr + token * logits_stride, correction_ptr, pair % NUM_CHOSEN, NUM_EXPERTS, SIGMOID, HAS_CORRECTION,
            WARPS, BLOCK_EXPERTS,
        )  # fmt: skip
    else:
        expert = tl.load(experts_ptr + pair)
    expert = (expert - first_expert).to(tl.int64)
    if (expert >= 0) & (expert < num_held):
        first = tl.program_id(0) * (TURNS * BLOCK_N)
        half = tl.arange(0, 2)[None, :, None]
        for turn in tl.range(0, TURNS, num_stages=NUM_STAGES):
            cols = first + turn * BLOCK_N + tl.arange(0, BLOCK_N)
            col_mask = cols < INNER
            rows = (half * INNER + cols[:, None, None]).to(tl.int64)
            w = tl.load(
                weight_ptr + expert * expert_stride + rows * K + lanes[None, None, :],
                mask=col_mask[:, None, None] & lane_mask[None, None, :],
                other=0.0,
                eviction_policy="evict_first",
            )  # [BLOCK_N, 2, BLOCK_K]
            gate, up = tl.split(tl.sum(w.to(tl.float32) * x, axis=2))
            if HAS_BIAS:
                bias_at = bias_ptr + expert * (2 * INNER) + cols
                gate += tl.load(bias_at, mask=col_mask, other=0.0).to(tl.float32)
                up += tl.load(bias_at + INNER, mask=col_mask, other=0.0).to(tl.float32)
            activated = activate(gate, up, KIND).to(inner_ptr.dtype.element_ty)
            tl.store(inner_ptr + pair.to(tl.int64) * INNER + cols, activated, mask=col_mask)


@triton.jit
def _down_tile(
    weight_ptr, row_offsets, expert_offsets, mask, step, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The inputs of one step, [BLOCK_CHOSEN, ABREAST, ROWS, BLOCK_K]; zeros where an expert is not here."""
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, None, :]
    if K % BLOCK_K != 0:
        mask = mask & (k < K)
    at = weight_ptr + expert_offsets + row_offsets + k
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _down_kernel(
    inner_ptr,
    weight_ptr,
    bias_ptr,
    logits_ptr,
    correction_ptr,
    weights_ptr,
    experts_ptr,
    out_ptr,
    scale,
    sum_eps,
    first_expert,
    num_held,
    num_cols,
    logits_stride,
    K: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    CHOOSES: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    ABREAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANE: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_CHOSEN: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    # ABREAST rows share a tile's threads; inner values have that dimension too, so that both lie on the same threads.
    # Warps lie along the first dimensions: the fewer experts one has, the fewer inner values it loads.
    cols = tl.arange(0, ABREAST)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    cols += tl.program_id(0) * (ROWS * ABREAST)  # [ABREAST, ROWS]
    col_mask = cols < num_cols
    places = tl.arange(0, BLOCK_CHOSEN)
    is_place = places < NUM_CHOSEN
    release_downstream(USE_PDL)
    # Logits, or what was chosen of them, are there: the kernel ahead had waited for them before it let this one in.
    if CHOOSES:
        experts, weights = best_experts(
            logits_ptr + token * logits_stride, correction_ptr, scale, sum_eps, NUM_EXPERTS, NUM_CHOSEN, SIGMOID,
            RENORMALIZE, HAS_CORRECTION, WARPS, BLOCK_EXPERTS, BLOCK_CHOSEN,
        )  # fmt: skip
    else:
        chosen = token * NUM_CHOSEN + places
        experts = tl.load(experts_ptr + chosen, mask=is_place, other=0, cache_modifier=".cg")
        weights = tl.load(weights_ptr + chosen, mask=is_place, other=0.0, cache_modifier=".cg")
    experts = experts - first_expert
    is_held = is_place & (experts >= 0) & (experts < num_held)
    expert_offsets = (experts.to(tl.int64) * num_cols * K)[:, None, None, None]
    row_offsets = (cols.to(tl.int64) * K)[None, :, :, None]
    mask = is_held[:, None, None, None] & col_mask[None, :, :, None]
    tiles = ()
    for step in tl.static_range(AHEAD):
        tiles = tiles + (_down_tile(weight_ptr, row_offsets, expert_offsets, mask, step, K, BLOCK_K),)
    wait_upstream(USE_PDL)
    sums = tl.zeros([BLOCK_CHOSEN, ABREAST, ROWS, BLOCK_K // LANE], dtype=tl.float32)
    for step in tl.static_range(STEPS):
        if step + AHEAD < STEPS:
            tiles = tiles + (_down_tile(weight_ptr, row_offsets, expert_offsets, mask, step + AHEAD, K, BLOCK_K),)
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, None, :]
        # Nobody wrote the values of experts that are held elsewhere.
        x_mask = is_held[:, None, None, None] & (k < K)
        pairs = (token * NUM_CHOSEN + places)[:, None, None, None] + tl.zeros([1, ABREAST, 1, 1], dtype=tl.int32)
        x = tl.load(inner_ptr + pairs * K + k, mask=x_mask, other=0.0).to(tl.float32)
        products = tiles[step].to(tl.float32) * x
        sums += tl.sum(tl.reshape(products, (BLOCK_CHOSEN, ABREAST, ROWS, BLOCK_K // LANE, LANE)), axis=4)
    totals = tl.sum(sums, axis=3)  # [BLOCK_CHOSEN, ABREAST, ROWS]
    is_held = is_held[:, None, None]
    if HAS_BIAS:
        bias_at = bias_ptr + experts.to(tl.int64)[:, None, None] * num_cols + cols[None, :, :]
        totals += tl.load(bias_at, mask=col_mask[None, :, :] & is_held, other=0.0).to(tl.float32)
    total = tl.sum(tl.where(is_held, totals * weights[:, None, None], 0.0), axis=0)  # [ABREAST, ROWS]
    tl.store(out_ptr + token * num_cols + cols, total.to(out_ptr.dtype.element_ty), mask=col_mask)


def _choice_constants(routed: RouterLogits | Chosen, num_warps: int) -> dict[str, Any]:
    """Constants of both kernels that say how experts are chosen, or that they have been."""
    if isinstance(routed, tuple):
        return {
            "NUM_CHOSEN": routed[1].shape[1], "CHOOSES": False, "NUM_EXPERTS": 1, "SIGMOID": False,
            "HAS_CORRECTION": False, "WARPS": num_warps, "BLOCK_EXPERTS": 1,
        }  # fmt: skip
    num_experts = routed.logits.shape[1]
    return {
        "NUM_CHOSEN": routed.num_chosen,
        "CHOOSES": True,
        "NUM_EXPERTS": num_experts,
        "SIGMOID": routed.sigmoid,
        "HAS_CORRECTION": routed.correction is not None,
        "WARPS": num_warps,
        "BLOCK_EXPERTS": triton.next_power_of_2(num_experts),
    }


def pair_gate_up(
    x: torch.Tensor,
    routed: RouterLogits | Chosen,
    gate_up: torch.Tensor,
    bias: torch.Tensor | None,
    kind: Activation,
    *,
    first_expert: int = 0,
    tuning: PairGateUpTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """The activated inner values of every pair of a held expert, [num_pairs, I]; other rows stay unwritten."""
    tuning = tuning or PairGateUpTuning()
    num_tokens, k = x.shape
    inner_size = gate_up.shape[1] // 2
    constants = _choice_constants(routed, tuning.num_warps)
    logits = routed.logits if isinstance(routed, RouterLogits) else x
    correction = routed.correction if isinstance(routed, RouterLogits) else None
    num_pairs = num_tokens * constants["NUM_CHOSEN"]
    inner = torch.empty((num_pairs, inner_size), dtype=x.dtype, device=x.device)  # [num_pairs, I]
    _gate_up_kernel[(triton.cdiv(inner_size, tuning.block_n * tuning.turns), num_pairs)](
        x,
        gate_up,
        gate_up if bias is None else bias,
        inner,
        logits,
        x if correction is None else correction,
        x if isinstance(routed, RouterLogits) else routed[1],
        first_expert,
        gate_up.shape[0],
        inner_size,
        k,
        x.stride(0),
        logits.stride(0),
        gate_up.stride(0),
        **constants,
        KIND=kind,
        HAS_BIAS=bias is not None,
        TURNS=tuning.turns,
        BLOCK_N=tuning.block_n,
        BLOCK_K=triton.next_power_of_2(k),
        NUM_STAGES=tuning.num_stages,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return inner


def pair_down(
    inner: torch.Tensor,
    routed: RouterLogits | Chosen,
    down: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    first_expert: int = 0,
    tuning: PairDownTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Each token's weighted sum over its held experts, [num_tokens, H]; `routed` as `pair_gate_up`, ahead of this, had
    it.
    """
    tuning = tuning or PairDownTuning()
    k, n = inner.shape[1], down.shape[1]
    constants = _choice_constants(routed, tuning.num_warps)
    num_tokens = inner.shape[0] // constants["NUM_CHOSEN"]
    out = torch.empty((num_tokens, n), dtype=inner.dtype, device=inner.device)  # [num_tokens, H]
    lane = LANE_BYTES // down.element_size()
    block_k = max(lane, min(tuning.block_k, triton.next_power_of_2(k)))
    steps = triton.cdiv(k, block_k)
    block_chosen = triton.next_power_of_2(constants["NUM_CHOSEN"])
    abreast = min(tuning.block_n, max(1, 32 * lane * tuning.num_warps // (block_chosen * block_k)))
    chooses = isinstance(routed, RouterLogits)
    logits = routed.logits if isinstance(routed, RouterLogits) else inner
    correction = routed.correction if isinstance(routed, RouterLogits) else None
    weights, experts = (inner, inner) if isinstance(routed, RouterLogits) else routed
    _down_kernel[(triton.cdiv(n, tuning.block_n), num_tokens)](
        inner,
        down,
        down if bias is None else bias,
        logits,
        inner if correction is None else correction,
        weights,
        experts,
        out,
        routed.scale if isinstance(routed, RouterLogits) else 1.0,
        routed.sum_eps if isinstance(routed, RouterLogits) else 0.0,
        first_expert,
        down.shape[0],
        n,
        logits.stride(0),
        K=k,
        **constants,
        RENORMALIZE=chooses and routed.renormalize,
        HAS_BIAS=bias is not None,
        STEPS=steps,
        AHEAD=min(tuning.ahead, steps),
        ROWS=tuning.block_n // abreast,
        ABREAST=abreast,
        BLOCK_K=block_k,
        LANE=lane,
        BLOCK_CHOSEN=block_chosen,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out
