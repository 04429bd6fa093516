"""Linear layers of one to four tokens that take along what stands beside them: the norm before, the gate behind.

    h       = x + residual                                     (rounded to x's dtype; without a norm: h = x)
    n[t, k] = h[t, k] * (weight_offset + g[k]) / sqrt(mean(h[t]^2) + eps)
    y       = n @ weight^T,  or  act(n @ gate^T) * (n @ up^T)  with weight = [gate; up]

x, residual: [num_tokens, K]; g: [K]; weight: [N, K], or [2 * I, K] with a gate; y: [num_tokens, N] or [num_tokens, I].
x and weight may be float8 instead, with a scale a token and a scale an output (then without norm); or the weight alone,
and every program quantizes x by token as `quantize_input.py` does, which is a launch less. All arithmetic in float32.
What is in brackets of `rsqrt` is summed up beside the products and multiplies them at the end, so that no program waits
for a norm before it multiplies.

A decode step of few tokens is a chain of kernels that each read some megabytes: half of its time is the way from one
kernel to the next. Fewer of them are less of that way. And with PDL a program has its weights on their way before the
kernel ahead has ended: `ahead` tiles of them, in registers, at best all that it multiplies.

Every program computes all of h, and the first writes it: into a buffer of its own, as the others may still read. Who
reads n as well (experts beside their router) gets it from all programs, some columns each.
"""

# ruff: noqa: RUF005 (Triton's compiler knows no stars in tuples)

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.activation import Activation, activate, num_outputs_of
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.quantize_input import as_float8, float8_scale
from stepwire_kernels.tuned_table import tuned_rows

MAX_FUSED_TOKENS = 4
# Neighbours in a row that one thread loads at once, 16 bytes; their products are added up before anything crosses
# threads.
LANE_BYTES = 16


@dataclass(frozen=True)
class FusedTuning:
    """Launch shape. A program owns `block_n` outputs; a tile is `block_k` columns of all of their rows.

    One warp loads 256 columns of a row at once: tiles as wide share rows out among the warps, wider ones columns.
    """

    block_n: int = 4
    block_k: int = 1024
    num_warps: int = 4
    ahead: int = 4


@dataclass(frozen=True)
class NormInput:
    """The norm that a linear's input goes through. `residual` None: x is the sum already."""

    residual: torch.Tensor | None  # [num_tokens, K]
    weight: torch.Tensor  # [K]
    eps: float
    weight_offset: float = 0.0


@triton.jit
def _weight_tile(
    weight_ptr, row_offsets, row_mask, step, K, BLOCK_K: tl.constexpr, LANE: tl.constexpr, EVEN_K: tl.constexpr
):  # fmt: skip
    """The columns of one step of some rows [ABREAST, ROWS]: [ABREAST, ROWS, BLOCK_K]."""
    cols = step * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = row_mask[:, :, None]
    if not EVEN_K:
        mask = mask & (cols < K)[None, None, :]
    at = weight_ptr + row_offsets[:, :, None] + cols[None, None, :]
    at = tl.max_contiguous(at, (1, 1, LANE))
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _lane_sums(products, ABREAST: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, LANE: tl.constexpr):
    """[ABREAST, ROWS, BLOCK_K] -> [ABREAST, ROWS, BLOCK_K / LANE]: sums of neighbours, which one thread has."""
    return tl.sum(tl.reshape(products, (ABREAST, ROWS, BLOCK_K // LANE, LANE)), axis=3)


@triton.jit
def _fused_linear_kernel(
    x_ptr,
    residual_ptr,
    norm_ptr,
    weight_ptr,
    out_ptr,
    residual_out_ptr,
    normed_ptr,
    x_scales_ptr,
    w_scales_ptr,
    num_outputs,
    K,
    x_stride,
    residual_stride,
    weight_stride,
    out_stride,
    eps,
    weight_offset,
    NUM_TOKENS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORMED: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    QUANTIZES: tl.constexpr,
    KIND: tl.constexpr,
    EVEN_K: tl.constexpr,
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    ABREAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORMED_COLS: tl.constexpr,
    LANE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    program = tl.program_id(0)
    # ABREAST rows share a tile's threads; the inputs have that dimension too, so that both lie on the same threads.
    places = tl.arange(0, ABREAST)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    rows = program * (ROWS * ABREAST) + places  # [ABREAST, ROWS]
    row_mask = rows < num_outputs
    offsets = rows.to(tl.int64) * weight_stride
    up_offsets = offsets + tl.cast(num_outputs, tl.int64) * weight_stride
    tiles = ()
    up_tiles = ()
    for step in tl.static_range(AHEAD):
        tiles = tiles + (_weight_tile(weight_ptr, offsets, row_mask, step, K, BLOCK_K, LANE, EVEN_K),)
        if GATED:
            up_tiles = up_tiles + (_weight_tile(weight_ptr, up_offsets, row_mask, step, K, BLOCK_K, LANE, EVEN_K),)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    # Tiles of inputs that are to be quantized, those of a token one behind another, and each token's scale.
    inputs = ()
    x_scales = ()
    if QUANTIZES:
        for token in tl.static_range(NUM_TOKENS):
            top = tl.zeros([ABREAST, 1, BLOCK_K], dtype=tl.float32)
            for step in tl.static_range(STEPS):
                cols = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :] + tl.zeros([ABREAST, 1, 1], dtype=tl.int32)
                tile = tl.load(x_ptr + token * x_stride + cols, mask=cols < K, other=0.0)
                inputs = inputs + (tile,)
                top = tl.maximum(top, tl.abs(tile.to(tl.float32)))
            x_scales = x_scales + (float8_scale(tl.max(top, axis=2)),)  # [ABREAST, 1], all the same
    sums = ()
    up_sums = ()
    squares = ()
    for _ in tl.static_range(NUM_TOKENS):
        sums = sums + (tl.zeros([ABREAST, ROWS, BLOCK_K // LANE], dtype=tl.float32),)
        up_sums = up_sums + (tl.zeros([ABREAST, ROWS, BLOCK_K // LANE], dtype=tl.float32),)
        squares = squares + (tl.zeros([ABREAST, 1, BLOCK_K // LANE], dtype=tl.float32),)
    for step in tl.static_range(STEPS):
        if step + AHEAD < STEPS:
            tiles = tiles + (_weight_tile(weight_ptr, offsets, row_mask, step + AHEAD, K, BLOCK_K, LANE, EVEN_K),)
            if GATED:
                up_tiles = up_tiles + (
                    _weight_tile(weight_ptr, up_offsets, row_mask, step + AHEAD, K, BLOCK_K, LANE, EVEN_K),
                )
        cols = (step * BLOCK_K + tl.arange(0, BLOCK_K))[None, None, :] + tl.zeros([ABREAST, 1, BLOCK_K], dtype=tl.int32)
        col_mask = cols < K
        if HAS_NORM:
            gain = tl.load(norm_ptr + cols, mask=col_mask, other=0.0).to(tl.float32) + weight_offset
        new_sums = ()
        new_up_sums = ()
        new_squares = ()
        for token in tl.static_range(NUM_TOKENS):
            if QUANTIZES:
                h = inputs[token * STEPS + step].to(tl.float32) / x_scales[token][:, :, None]
                h = as_float8(h, weight_ptr.dtype.element_ty).to(tl.float32)
            else:
                h = tl.load(x_ptr + token * x_stride + cols, mask=col_mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                h += tl.load(residual_ptr + token * residual_stride + cols, mask=col_mask, other=0.0).to(tl.float32)
                rounded = h.to(residual_out_ptr.dtype.element_ty)
                first = (program == 0) & (tl.arange(0, ABREAST) == 0)[:, None, None]
                tl.store(residual_out_ptr + token * K + cols, rounded, mask=col_mask & first)
                h = rounded.to(tl.float32)
            if HAS_NORM:
                new_squares = new_squares + (squares[token] + _lane_sums(h * h, ABREAST, 1, BLOCK_K, LANE),)
                h = h * gain
            products = tiles[step].to(tl.float32) * h
            new_sums = new_sums + (sums[token] + _lane_sums(products, ABREAST, ROWS, BLOCK_K, LANE),)
            if GATED:
                products = up_tiles[step].to(tl.float32) * h
                new_up_sums = new_up_sums + (up_sums[token] + _lane_sums(products, ABREAST, ROWS, BLOCK_K, LANE),)
        sums = new_sums
        up_sums = new_up_sums
        squares = new_squares
    for token in tl.static_range(NUM_TOKENS):
        scale = 1.0
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(squares[token], axis=2) / K + eps)  # [ABREAST, 1], all the same
        if QUANTIZES:
            scale = x_scales[token]
        elif SCALED:
            scale = tl.load(x_scales_ptr + token)
        y = tl.sum(sums[token], axis=2) * scale  # [ABREAST, ROWS]
        if SCALED:
            y *= tl.load(w_scales_ptr + rows, mask=row_mask, other=0.0)
        if GATED:
            up = tl.sum(up_sums[token], axis=2) * scale
            if SCALED:
                up *= tl.load(w_scales_ptr + num_outputs + rows, mask=row_mask, other=0.0)
            y = activate(y, up, KIND)
        tl.store(out_ptr + token * out_stride + rows, y.to(out_ptr.dtype.element_ty), mask=row_mask)
        if HAS_NORMED:
            cols = (program * NORMED_COLS + tl.arange(0, NORMED_COLS))[None, :]
            col_mask = cols < K
            h = tl.load(x_ptr + token * x_stride + cols, mask=col_mask, other=0.0).to(tl.float32)  # [1, NORMED_COLS]
            if HAS_RESIDUAL:
                h += tl.load(residual_ptr + token * residual_stride + cols, mask=col_mask, other=0.0).to(tl.float32)
                h = h.to(residual_out_ptr.dtype.element_ty).to(tl.float32)
            gain = tl.load(norm_ptr + cols, mask=col_mask, other=0.0).to(tl.float32) + weight_offset
            normed = h * tl.max(scale, axis=0)[:, None] * gain
            tl.store(normed_ptr + token * K + cols, normed.to(normed_ptr.dtype.element_ty), mask=col_mask)


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: NormInput | None = None,
    activation: Activation | None = None,
    scales: tuple[torch.Tensor | None, torch.Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    tuning: FusedTuning | None = None,
    out: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    normed_out: torch.Tensor | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and the sum h: a new tensor [num_tokens, K], or x where nothing was added to it.

    `normed_out` and `residual_out`, [num_tokens, K], are contiguous; the former gets n where it is given. `scales`:
    float32, of each token and of each output, contiguous; without those of tokens x is quantized here. y is in
    `out_dtype` (None: that of x).

    Raises:
        ValueError: shapes or strides that do not fit.
    """
    _check(x, weight, norm)
    if scales is not None:
        _check_scales(x, weight, scales, norm is None)
    tuning = tuning or FusedTuning()
    num_tokens, k = x.shape
    num_outputs = num_outputs_of("fused_linear", weight, activation)
    if out is None:
        out = torch.empty((num_tokens, num_outputs), dtype=out_dtype or x.dtype, device=x.device)  # [num_tokens, N]
    residual = None if norm is None else norm.residual
    if residual is None:
        residual_out = x
    elif residual_out is None:
        residual_out = torch.empty((num_tokens, k), dtype=residual.dtype, device=x.device)  # [num_tokens, K]
    # As many weights as inputs, so that both lie on the same threads.
    lane = LANE_BYTES // max(weight.element_size(), x.element_size())
    block_k = min(tuning.block_k, max(lane, triton.next_power_of_2(k)))
    steps = triton.cdiv(k, block_k)
    abreast = min(tuning.block_n, max(1, 32 * lane * tuning.num_warps // block_k))
    programs = triton.cdiv(num_outputs, tuning.block_n)
    _fused_linear_kernel[(programs,)](
        x,
        x if residual is None else residual,
        x if norm is None else norm.weight,
        weight,
        out,
        residual_out,
        x if normed_out is None else normed_out,
        x if scales is None or scales[0] is None else scales[0],
        x if scales is None else scales[1],
        num_outputs,
        k,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        weight.stride(0),
        out.stride(0),
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.weight_offset,
        NUM_TOKENS=num_tokens,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_NORMED=norm is not None and normed_out is not None,
        GATED=activation is not None,
        SCALED=scales is not None,
        QUANTIZES=scales is not None and scales[0] is None,
        KIND=activation,
        EVEN_K=k % block_k == 0,
        STEPS=steps,
        AHEAD=min(tuning.ahead, steps),
        ROWS=tuning.block_n // abreast,
        ABREAST=abreast,
        BLOCK_K=block_k,
        NORMED_COLS=1 if normed_out is None else triton.next_power_of_2(triton.cdiv(k, programs)),
        LANE=lane,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out, residual_out


@functools.cache
def load_fused_table(device_name: str) -> dict[tuple[int, int, int, bool], FusedTuning]:
    """Where one launch measured faster than norm, product (and gate): (token bucket, N, K, gated) to its shape."""
    return {
        (row["num_tokens"], row["n"], row["k"], row["gated"]): FusedTuning(**row["tuning"])
        for row in tuned_rows(device_name, "fused", ("num_tokens", "n", "k", "gated"))
    }


def choose_fused(x: torch.Tensor, weight: torch.Tensor, *, gated: bool) -> FusedTuning | None:
    """The launch shape for a norm (and gate) in one with the product; None: separate launches are faster."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or not 1 <= x.shape[0] <= MAX_FUSED_TOKENS:
        return None
    table = load_fused_table(torch.cuda.get_device_name(x.device))
    return table.get((triton.next_power_of_2(x.shape[0]), weight.shape[0], weight.shape[1], gated))


def _check_scales(
    x: torch.Tensor, weight: torch.Tensor, scales: tuple[torch.Tensor | None, torch.Tensor], is_plain: bool
) -> None:
    num_token_scales = x.shape[0] if scales[0] is None else scales[0].numel()
    if not is_plain or (num_token_scales, scales[1].numel()) != (x.shape[0], weight.shape[0]):
        raise ValueError(
            f"fused_linear: without a norm, {x.shape[0]} tokens and {weight.shape[0]} outputs need as many scales, got "
            f"{num_token_scales} and {scales[1].numel()}"
        )
    if (scales[0] is None) != (x.dtype != weight.dtype):
        raise ValueError(f"fused_linear: quantizes {x.dtype} for {weight.dtype} only, and only without scales of x")


def _check(x: torch.Tensor, weight: torch.Tensor, norm: NormInput | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or not 1 <= x.shape[0] <= MAX_FUSED_TOKENS:
        raise ValueError(
            f"fused_linear: takes x [1..{MAX_FUSED_TOKENS}, K] and weight [N, K], got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if norm is not None and norm.weight.shape != (x.shape[1],):
        raise ValueError(f"fused_linear: x is {tuple(x.shape)}, the norm's weight {tuple(norm.weight.shape)}")
    residual = None if norm is None else norm.residual
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(1) != 1):
        raise ValueError(
            f"fused_linear: the residual must be {tuple(x.shape)} {x.dtype} with contiguous columns, got "
            f"{tuple(residual.shape)} {residual.dtype}"
        )
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("fused_linear: the K dimension of x and weight must be contiguous")
