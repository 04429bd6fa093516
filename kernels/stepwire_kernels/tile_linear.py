"""Linear layers of some to some hundred tokens, through tensor descriptors (Hopper and later).

    y[t, n] = sum_k x[t, k] * w[n, k] (* x_scales[t] * w_scales[n]) + bias[n]
    y[t, i] = act(sum_k x[t, k] * w[i, k]) * sum_k x[t, k] * w[I + i, k]      with an activation, w = [gate; up]

x: [num_tokens, K]; weight: [N, K] ([2 * I, K] with an activation); both of one type: 16 bits, or 8 bits with a scale a
token and a scale an output. With an activation there is no bias, no int8, and K is not split.

The weight is the tall operand and is read once for every `block_m` tokens. Tiles of both operands come by descriptor
(one instruction a tile, nothing computed by the threads), several iterations ahead. Where N does not fill the device K
is split over programs, and the last one of a tile adds the parts in their order.

With PDL a program begins to fetch its weights into the level-2 cache before the kernel ahead of it has ended: `ahead`
bytes of each of its rows, for what is fetched then need not be waited for later.

The matrix units round sums of float8 products to some 14 bits. Up to `EXACT_TOKENS` tokens, where memory is the limit,
sums leave them after every iteration and go on in float32; beyond that it would take as long as the products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from stepwire_kernels.activation import Activation, activate, num_outputs_of
from stepwire_kernels.dependent_launch import launch_options, prefetch_lines, release_downstream, wait_upstream
from stepwire_kernels.device_limits import stages_that_fit
from stepwire_kernels.split_k import LinearWorkspace, add_up_parts

MIN_BLOCK_M = 16
EXACT_TOKENS = 64
# What a line of the level-2 cache holds, in bytes.
_LINE = 128


@dataclass(frozen=True)
class TileLinearTuning:
    """Launch shape. `block_m`: tokens of a tile at most. `ahead`: bytes of each row fetched before the wait."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    split_k: int = 1
    num_warps: int = 8
    num_stages: int = 4
    ahead: int = 1024

    def is_filled_by(self, num_tokens: int) -> bool:
        """Whether every tile has all its tokens.

        Rows past the end of x take a descriptor longer than rows that are there: on an H200 a tile of 128 with 72 takes
        1.3 to 1.7 times as long as a full one.
        """
        return num_tokens % self.block_m == 0


@triton.jit
def _tile_linear_kernel(
    x_descriptor,
    weight_descriptor,
    weight_ptr,
    x_scales_ptr,
    w_scales_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    num_tokens,
    N,
    K,
    weight_stride,
    out_stride,
    SCALED: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINES_AHEAD: tl.constexpr,
    LINE_COLS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    # Token blocks of the same weights are neighbours: all but the first find them in the level-2 cache.
    token = tl.program_id(0) * BLOCK_M
    column = tl.program_id(1)
    split = tl.program_id(2)
    # Outputs of a program: of gate and of up it multiplies as many rows.
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    num_outputs = N // 2 if GATED else N
    row = column * OUTPUTS
    steps_each = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    first = split * steps_each * BLOCK_K
    last = tl.minimum(first + steps_each * BLOCK_K, K)
    release_downstream(USE_PDL)
    if USE_PDL and LINES_AHEAD > 0:
        places = tl.arange(0, BLOCK_N)
        # The second half of a gated tile's rows are up's.
        places = places % OUTPUTS + (places // OUTPUTS) * num_outputs
        weight_rows = tl.minimum(row + places, N - 1).to(tl.int64) * weight_stride
        weight_cols = tl.minimum(first + tl.arange(0, LINES_AHEAD) * LINE_COLS, last - 1)
        prefetch_lines(weight_ptr + weight_rows[:, None] + weight_cols[None, :])
    wait_upstream(USE_PDL)
    IS_INT: tl.constexpr = x_descriptor.dtype == tl.int8
    acc = tl.zeros([OUTPUTS, BLOCK_M], dtype=tl.int32 if IS_INT else tl.float32)
    up = acc
    for k in tl.range(first, last, BLOCK_K, num_stages=NUM_STAGES):
        w = weight_descriptor.load([row, k])  # [OUTPUTS, BLOCK_K]
        x = x_descriptor.load([token, k])  # [BLOCK_M, BLOCK_K]
        if GATED and EXACT:
            up_w = weight_descriptor.load([num_outputs + row, k])
            up = tl.dot(up_w, tl.trans(x), up, max_num_imprecise_acc=BLOCK_K)
        elif GATED:
            up = tl.dot(weight_descriptor.load([num_outputs + row, k]), tl.trans(x), up)
        if IS_INT:
            acc = tl.dot(w, tl.trans(x), acc, out_dtype=tl.int32)
        elif EXACT:
            acc = tl.dot(w, tl.trans(x), acc, max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(w, tl.trans(x), acc)
    place = tl.program_id(0) * tl.num_programs(1) + column
    sums, finishes = add_up_parts(acc.to(tl.float32), partial_ptr, counters_ptr, place, split, SPLIT_K)
    if finishes:
        rows = row + tl.arange(0, OUTPUTS)
        tokens = token + tl.arange(0, BLOCK_M)
        row_mask = rows < num_outputs
        token_mask = tokens < num_tokens
        if SCALED:
            w_scale = tl.load(w_scales_ptr + rows, mask=row_mask, other=0.0)
            x_scale = tl.load(x_scales_ptr + tokens, mask=token_mask, other=0.0)
            sums *= w_scale[:, None] * x_scale[None, :]
            if GATED:
                up_scale = tl.load(w_scales_ptr + num_outputs + rows, mask=row_mask, other=0.0)
                up *= up_scale[:, None] * x_scale[None, :]
        if HAS_BIAS:
            sums += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        if GATED:
            sums = activate(sums, up.to(tl.float32), KIND)
        out_at = out_ptr + tokens.to(tl.int64)[None, :] * out_stride + rows[:, None]
        tl.store(out_at, sums.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether tiles of both can be read through descriptors: 16-byte rows, on a device that has them."""
    return all(
        operand.stride(1) == 1 and operand.stride(0) * operand.element_size() % 16 == 0 and operand.data_ptr() % 16 == 0
        for operand in (x, weight)
    ) and (not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] >= 9)


def tile_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    workspace: LinearWorkspace,
    *,
    activation: Activation | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    tuning: TileLinearTuning | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """y [num_tokens, N], or [num_tokens, N / 2] with an activation, in `out_dtype` (that of x where it is None).

    Args:
        scales: float32, of each token [num_tokens] or [num_tokens, 1], and of each output [N] or [N, 1]; contiguous.

    Raises:
        ValueError: operands that do not fit together, or that descriptors cannot read.
    """
    num_tokens, k = x.shape
    n = weight.shape[0]
    if weight.shape[1] != k or x.dtype != weight.dtype or not serves(x, weight):
        raise ValueError(
            f"tile_linear: takes x [num_tokens, K] and weight [N, K] of one type with rows of whole 16 bytes, got "
            f"{tuple(x.shape)} {x.dtype} and {tuple(weight.shape)} {weight.dtype}"
        )
    if scales is not None and (scales[0].numel(), scales[1].numel()) != (num_tokens, n):
        raise ValueError(
            f"tile_linear: {num_tokens} tokens and {n} outputs need as many scales, got {tuple(scales[0].shape)} and "
            f"{tuple(scales[1].shape)}"
        )
    num_outputs = num_outputs_of("tile_linear", weight, activation)
    if activation is not None and (bias is not None or x.dtype == torch.int8):
        raise ValueError("tile_linear: with an activation it takes neither a bias nor int8")
    tuning = tuning or TileLinearTuning()
    if out is None:
        out = torch.empty((num_tokens, num_outputs), dtype=out_dtype or x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    size = x.element_size()
    block_m = min(tuning.block_m, max(MIN_BLOCK_M, triton.next_power_of_2(num_tokens)))
    block_outputs = tuning.block_n if activation is None else tuning.block_n // 2
    columns, token_blocks = triton.cdiv(num_outputs, block_outputs), triton.cdiv(num_tokens, block_m)
    places = columns * token_blocks
    fitting = workspace.partial.numel() // (places * tuning.block_n * block_m)
    splits = min(tuning.split_k, triton.cdiv(k, tuning.block_k), fitting if places <= workspace.counters.numel() else 1)
    if activation is not None:
        splits = 1
    stage = (tuning.block_n + block_m) * tuning.block_k * size
    _tile_linear_kernel[(token_blocks, columns, max(1, splits))](
        TensorDescriptor(x, [num_tokens, k], [x.stride(0), 1], [block_m, tuning.block_k]),
        TensorDescriptor(weight, [n, k], [weight.stride(0), 1], [block_outputs, tuning.block_k]),
        weight,
        out if scales is None else scales[0],
        out if scales is None else scales[1],
        out if bias is None else bias,
        out,
        workspace.partial,
        workspace.counters,
        num_tokens,
        n,
        k,
        weight.stride(0),
        out.stride(0),
        SCALED=scales is not None,
        EXACT=size == 1 and num_tokens <= EXACT_TOKENS,
        HAS_BIAS=bias is not None,
        GATED=activation is not None,
        KIND=activation,
        SPLIT_K=max(1, splits),
        BLOCK_M=block_m,
        BLOCK_N=tuning.block_n,
        BLOCK_K=tuning.block_k,
        LINES_AHEAD=triton.next_power_of_2(tuning.ahead // _LINE) if tuning.ahead else 0,
        LINE_COLS=_LINE // size,
        NUM_STAGES=stages_that_fit(tuning.num_stages, stage, x.device, by_descriptor=True),
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out
