"""Products of tokens with experts of 8-bit weights (float8_e4m3fn or int8), a tile of one expert's pairs at a time.

The formulas of `expert_gemm.py` on values that have scales:

    x[r, k]    = x_values[r, k] * x_scales[r, k / group]
    w[e, n, k] = values[e, n, k] * scales[e, n / block_n, k / group]

Three kinds of inputs: quantized by token or by group of inputs on the way (`quantize_input.py`), quantized with a scale
that the checkpoint has for each expert (`quantize_by_expert`: a row of values for each pair then, since a token means
other 8-bit values to every expert), or left as they are, with weights made as wide in registers. Scales for the whole
row multiply the whole sum, scales of groups the sums of each group. Sums leave the matrix units every step, as in
`scaled_linear.py`: within 128 inputs those round float8's to some 14 bits.

Inner values are kept by pair, not by place: their scales are found without the order of the tiles. gate_up and down as
in `expert_gemm.py`, both products from the same kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from stepwire_kernels.activation import ACTIVATIONS, Activation, activate
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.expert_gemm import TileTuning, sum_experts
from stepwire_kernels.expert_tiles import ExpertTiles, build_expert_tiles
from stepwire_kernels.quantize_input import quantize_input, quantized_rows, store_quantized

EIGHT_BIT = (torch.float8_e4m3fn, torch.int8)
MIN_GROUP = 16
# Inputs that share a scale where all of them do.
ONE_GROUP = 1 << 30
ROWS_OF_MEAN = 2


@dataclass(frozen=True)
class ScaledStack:
    """One linear of all experts; contiguous."""

    values: torch.Tensor  # float8_e4m3fn or int8 [experts, N, K]
    scales: torch.Tensor  # float32 [experts, ceil(N / block_n), ceil(K / block_k)]
    block_n: int
    block_k: int
    """At least K: a row has one scale. Else a power of two of at least 16."""
    bias: torch.Tensor | None = None  # [experts, N]

    @property
    def weight_group(self) -> int | None:
        return None if self.block_k >= self.values.shape[2] else self.block_k

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.values, self.scales, self.bias) if tensor is not None]

    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


@dataclass(frozen=True)
class ScaledExpertWeights:
    """Experts, and how their inputs are quantized: by token, by groups of them, with static scales, or not at all."""

    gate_up: ScaledStack  # N = 2 * I, K = H: gate's rows, then up's, each from a whole block of rows on
    down: ScaledStack  # N = H, K = I
    quantizes: bool = True
    input_group: int | None = None
    gate_up_static: torch.Tensor | None = None  # float32 [experts]
    down_static: torch.Tensor | None = None  # float32 [experts]

    @property
    def num_experts(self) -> int:
        return self.down.values.shape[0]


@dataclass(frozen=True)
class ScaledExpertTuning:
    """Launch shapes of one mixture; a step over the inputs never spans two groups."""

    tile_rows: int
    gate_up: TileTuning = field(default_factory=TileTuning)
    down: TileTuning = field(default_factory=TileTuning)


# Not swept yet: as few registers as the wider kernel's, and twice its inputs a step (they are half as wide).
SCALED_TILES = {
    16: ScaledExpertTuning(16, TileTuning(64, 128, 4, 4), TileTuning(64, 128, 4, 4)),
    32: ScaledExpertTuning(32, TileTuning(64, 128, 4, 4), TileTuning(64, 128, 4, 4)),
    64: ScaledExpertTuning(64, TileTuning(64, 128, 4, 3), TileTuning(128, 128, 8, 3)),
    128: ScaledExpertTuning(128, TileTuning(64, 128, 8, 3), TileTuning(128, 128, 8, 3)),
}


def default_scaled_tuning(num_tokens: int, num_chosen: int, num_experts: int, dtype: torch.dtype) -> ScaledExpertTuning:
    """The launch shapes for so many tokens, as if they chose evenly."""
    rows = triton.next_power_of_2(triton.cdiv(num_tokens * num_chosen * ROWS_OF_MEAN, num_experts))
    rows = min(128, max(16, rows))
    if dtype == torch.float32:
        small = TileTuning(32, 32, 4, 2)
        return ScaledExpertTuning(min(32, rows), small, small)
    return SCALED_TILES[rows]


@triton.jit
def _quantize_by_expert_kernel(
    x_ptr,
    experts_ptr,
    static_ptr,
    values_ptr,
    scales_ptr,
    first_expert,
    num_held,
    num_cols,
    x_stride,
    ROW_SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    expert = tl.load(experts_ptr + pair) - first_expert
    if (expert >= 0) & (expert < num_held):
        mask = cols < num_cols
        x = tl.load(x_ptr + pair // ROW_SHARE * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        values_at = values_ptr + pair * num_cols + cols
        store_quantized(x, mask, static_ptr + expert, values_at, scales_ptr + pair, IS_STATIC=True)


@triton.jit
def _product(w, x, IS_INT: tl.constexpr, IS_PLAIN: tl.constexpr):
    """w [BLOCK_N, BLOCK_K] times x [BLOCK_M, BLOCK_K] transposed, float32."""
    if IS_PLAIN:
        product = tl.dot(w.to(x.dtype), tl.trans(x), input_precision="ieee")
    elif IS_INT:
        product = tl.dot(w, tl.trans(x), out_dtype=tl.int32).to(tl.float32)
    else:
        product = tl.dot(w, tl.trans(x))
    return product


@triton.jit
def _step_scales(
    x_scales_at, w_scales_at, v_scales_at, x_mask, w_mask, start, K, IS_GROUPED: tl.constexpr, IS_PLAIN: tl.constexpr,
    IS_GATE_UP: tl.constexpr, X_GROUP: tl.constexpr, W_GROUP: tl.constexpr,
):  # fmt: skip
    """A step's scales of the inputs, of gate's (or down's) rows and of up's, shaped as their pointers."""
    exists = start < K
    x_scale = tl.full(x_mask.shape, 1.0, dtype=tl.float32)
    w_scale = tl.full(w_mask.shape, 1.0, dtype=tl.float32)
    v_scale = w_scale
    if IS_GROUPED:
        if not IS_PLAIN:
            x_scale = tl.load(x_scales_at + start // X_GROUP, mask=x_mask & exists, other=0.0)
        w_scale = tl.load(w_scales_at + start // W_GROUP, mask=w_mask & exists, other=0.0)
        if IS_GATE_UP:
            v_scale = tl.load(v_scales_at + start // W_GROUP, mask=w_mask & exists, other=0.0)
    return x_scale, w_scale, v_scale


@triton.jit
def _add_scaled(acc, product, x_scale, w_scale, IS_GROUPED: tl.constexpr, ONE_BLOCK: tl.constexpr):
    """acc [BLOCK_N, BLOCK_M] and the step's product with its scales."""
    if not IS_GROUPED:
        acc += product
    elif ONE_BLOCK:  # the block's scale goes to the inputs': one product with the large tile instead of two
        acc += product * (x_scale * w_scale)[None, :]
    else:
        acc += product * w_scale[:, None] * x_scale[None, :]
    return acc


@triton.jit
def _scaled_expert_kernel(
    x_ptr,
    x_scales_ptr,
    values_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    order_ptr,
    records_ptr,
    num_cols,
    K,
    x_stride,
    x_scales_stride,
    expert_stride,
    scales_expert_stride,
    scales_row_stride,
    ROW_SHARE: tl.constexpr,
    IS_GATE_UP: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_INT: tl.constexpr,
    IS_PLAIN: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    X_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Gate and up of `num_cols` columns, activated, or columns of down; by pair."""
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
        col_mask = cols < num_cols
        row_mask = rows < count
        pairs = tl.load(order_ptr + first + rows, mask=row_mask, other=0).to(tl.int64)
        x_rows = pairs // ROW_SHARE
        x_at = x_ptr + x_rows[:, None] * x_stride + lanes[None, :]
        x_scales_at = x_scales_ptr + x_rows * x_scales_stride
        w_at = values_ptr + expert * expert_stride + cols.to(tl.int64)[:, None] * K + lanes[None, :]
        # Where all columns of the tile lie in one block of rows, one pointer is enough.
        ONE_BLOCK: tl.constexpr = IS_GROUPED and SCALE_ROWS % BLOCK_N == 0
        scaled = cols
        if ONE_BLOCK:
            scaled = tl.program_id(0) * BLOCK_N + tl.arange(0, 1)
        scaled_mask = scaled < num_cols
        w_scales_at = scales_ptr + expert * scales_expert_stride + (scaled // SCALE_ROWS) * scales_row_stride
        v_at = w_at + tl.cast(num_cols, tl.int64) * K
        v_rows = (num_cols + scaled) // SCALE_ROWS
        v_scales_at = scales_ptr + expert * scales_expert_stride + v_rows * scales_row_stride
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        # Scales are fetched a step ahead: they would not be a part of the pipeline, and every step would wait for them.
        x_scale, w_scale, v_scale = _step_scales(
            x_scales_at, w_scales_at, v_scales_at, row_mask, scaled_mask, 0, K, IS_GROUPED, IS_PLAIN, IS_GATE_UP,
            X_GROUP, W_GROUP,
        )  # fmt: skip
        for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
            next_x_scale, next_w_scale, next_v_scale = _step_scales(
                x_scales_at, w_scales_at, v_scales_at, row_mask, scaled_mask, start + BLOCK_K, K, IS_GROUPED, IS_PLAIN,
                IS_GATE_UP, X_GROUP, W_GROUP,
            )  # fmt: skip
            w_mask = col_mask[:, None]
            x_mask = row_mask[:, None]
            if not EVEN_K:
                w_mask = w_mask & (start + lanes < K)[None, :]
                x_mask = x_mask & (start + lanes < K)[None, :]
            x = tl.load(x_at + start, mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_at + start, mask=w_mask, other=0.0)  # [BLOCK_N, BLOCK_K]
            acc = _add_scaled(acc, _product(w, x, IS_INT, IS_PLAIN), x_scale, w_scale, IS_GROUPED, ONE_BLOCK)
            if IS_GATE_UP:
                v = tl.load(v_at + start, mask=w_mask, other=0.0)
                up = _add_scaled(up, _product(v, x, IS_INT, IS_PLAIN), x_scale, v_scale, IS_GROUPED, ONE_BLOCK)
            x_scale = next_x_scale
            w_scale = next_w_scale
            v_scale = next_v_scale
        if not IS_GROUPED:
            acc = acc * tl.load(w_scales_at, mask=col_mask, other=0.0)[:, None]
            if IS_GATE_UP:
                up = up * tl.load(v_scales_at, mask=col_mask, other=0.0)[:, None]
            if not IS_PLAIN:
                whole = tl.load(x_scales_at, mask=row_mask, other=0.0)
                acc = acc * whole[None, :]
                up = up * whole[None, :]
        out_at = out_ptr + pairs[None, :] * num_cols + cols[:, None]
        mask = col_mask[:, None] & row_mask[None, :]
        if IS_GATE_UP:
            if HAS_BIAS:
                bias_at = bias_ptr + expert * (2 * num_cols) + cols
                acc += tl.load(bias_at, mask=col_mask, other=0.0).to(tl.float32)[:, None]
                up += tl.load(bias_at + num_cols, mask=col_mask, other=0.0).to(tl.float32)[:, None]
            tl.store(out_at, activate(acc, up, KIND).to(out_ptr.dtype.element_ty), mask=mask)
        else:
            if HAS_BIAS:
                acc += tl.load(bias_ptr + expert * num_cols + cols, mask=col_mask, other=0.0).to(tl.float32)[:, None]
            tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def quantize_by_expert(
    x: torch.Tensor,
    experts: torch.Tensor,
    static: torch.Tensor,
    dtype: torch.dtype,
    *,
    row_share: int,
    first_expert: int = 0,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair's inputs by its expert's scale: values [num_pairs, K] in `dtype`, scales float32 [num_pairs, 1].

    Pair p reads row p // row_share of x; rows of experts that are not held stay unwritten.
    """
    num_pairs, num_cols = experts.numel(), x.shape[1]
    values, scales = quantized_rows(num_pairs, num_cols, 1, dtype, x.device)
    block = min(2048, triton.next_power_of_2(num_cols))
    _quantize_by_expert_kernel[(num_pairs, triton.cdiv(num_cols, block))](
        x,
        experts,
        static,
        values,
        scales,
        first_expert,
        static.shape[0],
        num_cols,
        x.stride(0),
        ROW_SHARE=row_share,
        BLOCK=block,
        USE_PDL=pdl,
        num_warps=4 if block >= 512 else 1,
        **launch_options(pdl),
    )
    return values, scales


@dataclass(frozen=True)
class _Inputs:
    """What a product reads, with the number of pairs that share a row."""

    values: torch.Tensor  # [rows, K]
    scales: torch.Tensor | None  # float32 [rows, groups]
    row_share: int
    group: int | None


def _product_of(
    inputs: _Inputs,
    stack: ScaledStack,
    tiles: ExpertTiles,
    num_pairs: int,
    dtype: torch.dtype,
    kind: Activation | None,
    tuning: TileTuning,
    *,
    pdl: bool,
) -> torch.Tensor:
    """With `kind`, the activated inner values [num_pairs, I]; without, outputs [num_pairs, H]. By pair."""
    _, n, k = stack.values.shape
    num_cols = n // 2 if kind is not None else n
    out = torch.empty((num_pairs, num_cols), dtype=dtype, device=stack.values.device)  # [num_pairs, num_cols]
    is_plain = inputs.scales is None
    groups = [group for group in (stack.weight_group, inputs.group) if group is not None]
    block_k = min(tuning.block_k, *groups) if groups else tuning.block_k
    x_scales = stack.scales if inputs.scales is None else inputs.scales
    _scaled_expert_kernel[(triton.cdiv(num_cols, tuning.block_n), tiles.capacity)](
        inputs.values,
        x_scales,
        stack.values,
        stack.scales,
        stack.scales if stack.bias is None else stack.bias,
        out,
        tiles.order,
        tiles.records,
        num_cols,
        k,
        inputs.values.stride(0),
        x_scales.stride(-2),
        stack.values.stride(0),
        stack.scales.stride(0),
        stack.scales.stride(1),
        ROW_SHARE=inputs.row_share,
        IS_GATE_UP=kind is not None,
        KIND=kind or "silu",
        HAS_BIAS=stack.bias is not None,
        IS_INT=stack.values.dtype == torch.int8,
        IS_PLAIN=is_plain,
        IS_GROUPED=bool(groups),
        X_GROUP=inputs.group or ONE_GROUP,
        W_GROUP=stack.weight_group or ONE_GROUP,
        SCALE_ROWS=stack.block_n,
        EVEN_K=k % block_k == 0,
        BLOCK_M=tiles.tile_rows,
        BLOCK_N=tuning.block_n,
        BLOCK_K=block_k,
        NUM_STAGES=tuning.num_stages,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out


def mix_scaled_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    held: ScaledExpertWeights,
    kind: Activation,
    *,
    num_experts: int | None = None,
    first_expert: int = 0,
    tuning: ScaledExpertTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """`experts.mix_experts` with 8-bit weights.

    Raises:
        ValueError: shapes, types or strides that do not fit together.
    """
    check_scaled_experts(x, weights, experts, held, kind)
    num_tokens, num_chosen = experts.shape
    if num_tokens == 0:
        return torch.empty_like(x)
    tuning = tuning or default_scaled_tuning(num_tokens, num_chosen, num_experts or held.num_experts, x.dtype)
    tiles = build_expert_tiles(experts, held.num_experts, tuning.tile_rows, first_expert=first_expert, pdl=pdl)
    num_pairs = num_tokens * num_chosen

    def as_inputs(rows: torch.Tensor, stack: ScaledStack, static: torch.Tensor | None, share: int) -> _Inputs:
        dtype = stack.values.dtype
        if not held.quantizes:
            return _Inputs(rows, None, share, None)
        if static is not None:
            values, scales = quantize_by_expert(
                rows, experts, static, dtype, row_share=share, first_expert=first_expert, pdl=pdl
            )
            return _Inputs(values, scales, 1, None)
        group = held.input_group
        if group is not None and stack.weight_group is not None:
            group = min(group, stack.weight_group)  # a rank's share of the inputs may begin inside of a block
        values, scales = quantize_input(rows, dtype, group_size=group, pdl=pdl)
        return _Inputs(values, scales, share, group)

    from_tokens = as_inputs(x, held.gate_up, held.gate_up_static, num_chosen)
    inner = _product_of(from_tokens, held.gate_up, tiles, num_pairs, x.dtype, kind, tuning.gate_up, pdl=pdl)
    from_pairs = as_inputs(inner, held.down, held.down_static, 1)
    pair_out = _product_of(from_pairs, held.down, tiles, num_pairs, x.dtype, None, tuning.down, pdl=pdl)
    return sum_experts(pair_out, weights, experts, held.num_experts, first_expert=first_expert, pdl=pdl)


def check_scaled_experts(
    x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, held: ScaledExpertWeights, kind: str
) -> None:
    """Raises ValueError: see `mix_scaled_experts`."""
    count, hidden, inner = held.down.values.shape
    if kind not in ACTIVATIONS:
        raise ValueError(f"mix_scaled_experts: unknown activation {kind!r}; choose one of {', '.join(ACTIVATIONS)}")
    if x.ndim != 2 or x.shape[1] != hidden or held.gate_up.values.shape != (count, 2 * inner, hidden):
        raise ValueError(
            f"mix_scaled_experts: takes x [num_tokens, H], gate_up [experts, 2 * I, H] and down [experts, H, I], got "
            f"{tuple(x.shape)}, {tuple(held.gate_up.values.shape)} and {tuple(held.down.values.shape)}"
        )
    if weights.shape != experts.shape or experts.shape[0] != x.shape[0] or experts.dtype != torch.int32:
        raise ValueError("mix_scaled_experts: takes weights and int32 experts, [num_tokens, num_chosen] each")
    if weights.dtype != torch.float32 or x.stride(1) != 1 or not (weights.is_contiguous() and experts.is_contiguous()):
        raise ValueError(
            "mix_scaled_experts: weights must be float32, and columns of x, weights and experts contiguous"
        )
    if held.gate_up.values.dtype not in EIGHT_BIT or held.down.values.dtype != held.gate_up.values.dtype:
        raise ValueError(f"mix_scaled_experts: takes float8_e4m3fn or int8 weights, got {held.gate_up.values.dtype}")
    if inner % held.gate_up.block_n:
        raise ValueError(f"mix_scaled_experts: up begins inside of a block of {held.gate_up.block_n} rows")
    for stack in (held.gate_up, held.down):
        _, n, k = stack.values.shape
        wanted = (count, triton.cdiv(n, stack.block_n), triton.cdiv(k, stack.block_k))
        if stack.scales.shape != wanted or not all(tensor.is_contiguous() for tensor in stack.tensors()):
            raise ValueError(f"mix_scaled_experts: takes contiguous scales {wanted}, got {tuple(stack.scales.shape)}")
        groups = [group for group in (stack.weight_group, held.input_group) if group is not None]
        if any(group < MIN_GROUP or group & (group - 1) for group in groups):
            raise ValueError(f"mix_scaled_experts: groups {groups} are no powers of two of at least {MIN_GROUP}")
