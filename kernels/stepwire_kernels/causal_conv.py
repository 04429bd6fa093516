"""Short causal convolution of each channel, with SiLU, over the tokens of each row; rows' last inputs are kept.

    out[t, c] = silu( sum over j < W of weight[c, j] * x[t - (W - 1) + j, c] )

x at a row's tokens before this step comes from its state, [num_rows, W - 1, channels], the oldest input first; before
its sequence begins x is 0. Afterwards the state holds the last W - 1 inputs. Channels are queries, keys and values of
all heads, whose columns in x `DeltaColumns` says; out [num_tokens, channels] has them side by side. Sums in float32.

Padding tokens get zeros, and change no state.

Source: Dauphin et al., "Language Modeling with Gated Convolutional Networks", 2016; Gu and Dao, "Mamba", 2023.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepwire_kernels.delta_runs import CONV_TOKENS, DeltaColumns, DeltaRuns, run_of_place, unsupported_width
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream

BLOCK_CHANNELS = 128


@triton.jit
def _column_of(
    channel,
    KEY_CHANNELS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    GROUP_VALUES: tl.constexpr,
    KEY_AT: tl.constexpr,
    VALUE_AT: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
):
    """Where x has a channel."""
    of_key = channel % KEY_CHANNELS
    key_column = of_key // KEY_DIM * KEY_STRIDE + of_key % KEY_DIM
    key_column += tl.where(channel >= KEY_CHANNELS, KEY_AT, 0)
    of_value = tl.maximum(channel - 2 * KEY_CHANNELS, 0)
    value_column = VALUE_AT + of_value // GROUP_VALUES * VALUE_STRIDE + of_value % GROUP_VALUES
    return tl.where(channel < 2 * KEY_CHANNELS, key_column, value_column)


@triton.jit
def _causal_conv_kernel(
    x_ptr,
    weight_ptr,
    state_ptr,
    out_ptr,
    query_starts_ptr,
    kv_lens_ptr,
    run_rows_ptr,
    num_runs,
    x_stride,
    NUM_CHANNELS: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    GROUP_VALUES: tl.constexpr,
    KEY_AT: tl.constexpr,
    VALUE_AT: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    ONE_TOKEN_RUNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < NUM_CHANNELS
    column = _column_of(channel, KEY_CHANNELS, KEY_DIM, GROUP_VALUES, KEY_AT, VALUE_AT, KEY_STRIDE, VALUE_STRIDE)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    if ONE_TOKEN_RUNS:
        run = tl.program_id(0)
        chunk = 0
    else:
        run, chunk = run_of_place(query_starts_ptr, tl.program_id(0), num_runs, TILE, BLOCK_RUNS)
    start = tl.load(query_starts_ptr + run)
    length = tl.load(query_starts_ptr + run + 1) - start
    kv_len = tl.load(kv_lens_ptr + run)
    kept_ptr = state_ptr + tl.load(run_rows_ptr + run).to(tl.int64) * ((WIDTH - 1) * NUM_CHANNELS)
    x_ptr += start.to(tl.int64) * x_stride
    # Whether the row has tokens before this step's.
    goes_on = kv_len > length
    if chunk * TILE < length:
        token = chunk * TILE + tl.arange(0, TILE)
        mask = (token < length)[:, None] & is_channel[None, :]
        total = tl.zeros([TILE, BLOCK_C], dtype=tl.float32)
        for tap in tl.static_range(WIDTH):
            at = token + (tap - (WIDTH - 1))
            weight = tl.load(weight_ptr + channel * WIDTH + tap, mask=is_channel, other=0.0).to(tl.float32)
            now = tl.load(
                x_ptr + at.to(tl.int64)[:, None] * x_stride + column[None, :], mask=mask & (at >= 0)[:, None], other=0.0
            )
            before = tl.load(
                kept_ptr + (at + (WIDTH - 1))[:, None] * NUM_CHANNELS + channel[None, :],
                mask=mask & (at < 0)[:, None] & goes_on,
                other=0.0,
            )
            total += weight[None, :] * (now.to(tl.float32) + before.to(tl.float32))
        out = tl.where(kv_len > 0, total * tl.sigmoid(total), 0.0)
        out_at = out_ptr + (start + token).to(tl.int64)[:, None] * NUM_CHANNELS + channel[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=mask)
        # Only a run's first chunk reads what was kept, so it alone may write it, once all its threads have read.
        if (chunk == 0) & (kv_len > 0):
            slot = tl.arange(0, BLOCK_KEPT)
            kept = (slot < WIDTH - 1)[:, None] & is_channel[None, :]
            source = length - (WIDTH - 1) + slot
            came = tl.load(
                x_ptr + source.to(tl.int64)[:, None] * x_stride + column[None, :],
                mask=kept & (source >= 0)[:, None],
                other=0.0,
            )
            stayed = tl.load(
                kept_ptr + (source + (WIDTH - 1))[:, None] * NUM_CHANNELS + channel[None, :],
                mask=kept & (source < 0)[:, None] & goes_on,
                other=0.0,
            )
            tl.debug_barrier()
            last = tl.where((source >= 0)[:, None], came.to(tl.float32), stayed.to(tl.float32))
            kept_at = kept_ptr + slot[:, None] * NUM_CHANNELS + channel[None, :]
            tl.store(kept_at, last.to(state_ptr.dtype.element_ty), mask=kept)


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    columns: DeltaColumns,
    runs: DeltaRuns,
    *,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Return [num_tokens, channels] in x's dtype; `state` is updated in place.

    x [num_tokens, columns], weight [channels, W], state [num_rows, W - 1, channels].

    Raises:
        ValueError: shapes that do not fit.
    """
    num_channels, width = weight.shape
    reason = unsupported_width(width)
    if reason is not None:
        raise ValueError(f"causal_conv: {reason}")
    if num_channels != columns.num_channels or state.shape[1:] != (width - 1, num_channels):
        raise ValueError(
            f"causal_conv: {columns.num_channels} channels need weight [{columns.num_channels}, W] and state "
            f"[rows, W - 1, {columns.num_channels}]; got {tuple(weight.shape)} and {tuple(state.shape)}"
        )
    if x.stride(1) != 1 or not weight.is_contiguous() or not state.is_contiguous():
        raise ValueError("causal_conv: columns, weight and state must be contiguous")
    num_tokens = x.shape[0]
    if out is None:
        out = torch.empty((num_tokens, num_channels), dtype=x.dtype, device=x.device)  # [num_tokens, channels]
    if num_tokens == 0:
        return out
    single = not runs.has_longer
    num_programs = runs.num_runs if single else runs.num_places(num_tokens, CONV_TOKENS)
    block = min(BLOCK_CHANNELS, triton.next_power_of_2(num_channels))
    _causal_conv_kernel[(num_programs, triton.cdiv(num_channels, block))](
        x,
        weight,
        state,
        out,
        runs.query_starts,
        runs.kv_lens,
        runs.run_rows,
        # What only longer runs are found by makes no kernel of its own for every number of single ones.
        0 if single else runs.num_runs,
        x.stride(0),
        NUM_CHANNELS=num_channels,
        KEY_CHANNELS=columns.num_key_heads * columns.key_dim,
        KEY_DIM=columns.key_dim,
        GROUP_VALUES=columns.group_size * columns.value_dim,
        KEY_AT=columns.key,
        VALUE_AT=columns.value,
        KEY_STRIDE=columns.key_stride,
        VALUE_STRIDE=columns.value_stride,
        WIDTH=width,
        ONE_TOKEN_RUNS=single,
        TILE=1 if single else CONV_TOKENS,
        BLOCK_KEPT=triton.next_power_of_2(width - 1),
        BLOCK_C=block,
        BLOCK_RUNS=1 if single else triton.next_power_of_2(runs.num_runs),
        USE_PDL=pdl,
        num_warps=1 if single else 4,
        **launch_options(pdl),
    )
    return out
