"""Which kernel multiplies 8-bit inputs by 8-bit weights: measured choices, and a rule for what was not measured.

With one scale a token and one an output, on Hopper and later: few tokens by rows held in registers (`fused_linear`), up
to some hundred by tiles (`tile_linear`), more by cuBLAS (float8) or by larger tiles (int8). Scales of groups, and older
devices: `scaled_linear`.

cuBLAS adds float8 products up in the matrix units, which round to some 14 bits (`use_fast_accum`): a hundredth of what
rounding the inputs to float8 does, and 5 to 10 % faster.

Measured by `python -m load_tests.kernels.tiles`: `scaled` in tuned/<device>.json. Where a gate in the product of more
tokens was faster in whole steps (`load_tests.gpu.step_sweep`), `scaled_gated` has the launch shape.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import triton

from stepwire_kernels.activation import Activation
from stepwire_kernels.fused_linear import MAX_FUSED_TOKENS, FusedTuning, fused_linear
from stepwire_kernels.scaled_linear import scaled_linear
from stepwire_kernels.split_k import LinearWorkspace
from stepwire_kernels.tile_linear import TileLinearTuning, serves, tile_linear
from stepwire_kernels.tuned_table import tuned_rows

# Tokens up to which tiles are faster than cuBLAS: for most outputs, and where so many fill the device by themselves.
MAX_TILE_TOKENS, MAX_WIDE_TILE_TOKENS = 256, 128
WIDE_OUTPUTS = 16384
# Of a tile's tokens, in tiles of more tokens than MIN_LIBRARY_TOKENS.
MOST_MISSING = 0.25
MIN_LIBRARY_TOKENS = 32
# Weights, in bytes, that all programs together hold in registers while they wait: of so many a program with a token's
# own quantization has nothing else to wait for.
MAX_HELD_BYTES = 24 << 20
# Outputs of such a program, and the inputs that lie on its registers' tiles at once.
_HELD = FusedTuning(8, 2048, 8, 2)
# Programs that a device takes at a time, with which K is split up.
_PROGRAMS = 256

LIBRARY = "library"
Choice = FusedTuning | TileLinearTuning | str


@functools.cache
def load_scaled_table(device_name: str) -> dict[tuple[int, int, int], Choice]:
    """The measured choices for a device name as torch reports it, by (token bucket, N, K)."""
    kinds = {"ahead": FusedTuning, "tile": TileLinearTuning}
    return {
        (row["num_tokens"], row["n"], row["k"]): (
            LIBRARY if row["kernel"] == LIBRARY else kinds[row["kernel"]](**row["tuning"])
        )
        for row in tuned_rows(device_name, "scaled", ("num_tokens", "n", "k"))
    }


@functools.cache
def load_scaled_gated_table(device_name: str) -> dict[tuple[int, int, int], TileLinearTuning]:
    """Where product and gate in one launch measured faster than two: (token bucket, 2 * I, K) to the launch shape."""
    return {
        (row["num_tokens"], row["n"], row["k"]): TileLinearTuning(**row["tuning"])
        for row in tuned_rows(device_name, "scaled_gated", ("num_tokens", "n", "k"))
    }


def choose_scaled(x: torch.Tensor, weight: torch.Tensor) -> Choice | None:
    """How x [num_tokens, K] and weight [N, K] of 8 bits, with a scale a token and an output, are multiplied.

    None: by `scaled_linear`, for there is nothing else.
    """
    num_tokens, (n, k) = x.shape[0], weight.shape
    if not x.is_cuda or not serves(x, weight):
        return None
    if x.dtype == torch.float8_e4m3fn:
        table = load_scaled_table(torch.cuda.get_device_name(x.device))
        measured = table.get((triton.next_power_of_2(num_tokens), n, k))
        if isinstance(measured, TileLinearTuning) and is_mostly_padding(measured, num_tokens) and n % 16 == 0:
            return LIBRARY
        if measured is not None:
            return measured
        if num_tokens <= MAX_FUSED_TOKENS // 2:
            return FusedTuning(4, 2048, 4, 1) if num_tokens == 1 else FusedTuning(16, 512, 8, 3)
        if num_tokens > (MAX_WIDE_TILE_TOKENS if n > WIDE_OUTPUTS else MAX_TILE_TOKENS) and n % 16 == 0:
            return LIBRARY
        tiles = tile_shape(num_tokens, n, k)
        return LIBRARY if is_mostly_padding(tiles, num_tokens) and n % 16 == 0 else tiles
    return tile_shape(num_tokens, n, k)


def is_mostly_padding(tiles: TileLinearTuning, num_tokens: int) -> bool:
    """Whether tiles by descriptor lose to cuBLAS by the rows that they lack (`is_filled_by`)."""
    missing = -num_tokens % tiles.block_m
    return missing > MOST_MISSING * tiles.block_m and tiles.block_m > MIN_LIBRARY_TOKENS


def tile_shape(num_tokens: int, n: int, k: int) -> TileLinearTuning:
    """A launch shape of tiles in 8 bits."""
    if num_tokens > MAX_TILE_TOKENS or (n > WIDE_OUTPUTS and num_tokens > 32):
        return TileLinearTuning(128, 128, 128, 1, 8, 5, 512)
    block_m = min(128, max(16, triton.next_power_of_2(num_tokens)))
    programs = triton.cdiv(n, 64) * triton.cdiv(num_tokens, block_m)
    wanted = _PROGRAMS if num_tokens <= 32 else _PROGRAMS // 2
    return TileLinearTuning(block_m, 64, 256, max(1, min(8, wanted // programs, k // 1024)), 4, 4, 512)


def choose_scaled_gated(x: torch.Tensor, weight: torch.Tensor) -> FusedTuning | TileLinearTuning | None:
    """How act(gate) * up of 8-bit rows x and weight [gate; up] is one launch; None: product and gate are two."""
    choice = choose_scaled(x, weight)
    if isinstance(choice, FusedTuning):
        # A program has as many rows as without a gate: half of them gate's, half up's.
        return replace(choice, block_n=max(1, choice.block_n // 2))
    if choice is None or x.dtype != torch.float8_e4m3fn:
        return None
    key = (triton.next_power_of_2(x.shape[0]), *weight.shape)
    tuning = load_scaled_gated_table(torch.cuda.get_device_name(x.device)).get(key)
    return None if tuning is None or is_mostly_padding(tuning, x.shape[0]) else tuning


def multiply_gated(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    w_scales: torch.Tensor,
    activation: Activation,
    workspace: LinearWorkspace,
    out_dtype: torch.dtype,
    *,
    pdl: bool = False,
) -> torch.Tensor | None:
    """act(gate) * up of `multiply_scaled` with weight [gate; up], [num_tokens, N / 2] in `out_dtype`, in one launch.

    None: that is slower than product and gate apart, or was not measured.
    """
    tuning = choose_scaled_gated(x, weight)
    scales = (x_scales, w_scales)
    if isinstance(tuning, FusedTuning):
        return fused_linear(
            x, weight, scales=scales, activation=activation, out_dtype=out_dtype, tuning=tuning, pdl=pdl
        )[0]
    if tuning is None:
        return None
    return tile_linear(
        x, weight, None, workspace, activation=activation, scales=scales, out_dtype=out_dtype, tuning=tuning, pdl=pdl
    )


def choose_quantizing(x: torch.Tensor, weight: torch.Tensor) -> FusedTuning | None:
    """How one launch quantizes x [1, K] by token and multiplies it by a float8 weight [N, K] with a scale an output.

    None: apart. Each program quantizes all of x, so this is for weights that it can hold in registers meanwhile.
    """
    is_one = x.is_cuda and x.shape[0] == 1 and x.dtype != weight.dtype and weight.dtype == torch.float8_e4m3fn
    is_held = weight.numel() <= MAX_HELD_BYTES and weight.shape[1] <= _HELD.block_k * _HELD.ahead
    return _HELD if is_one and is_held and serves(x, weight) else None


def multiply_quantizing(
    x: torch.Tensor, weight: torch.Tensor, w_scales: torch.Tensor, *, pdl: bool = False
) -> torch.Tensor | None:
    """`quantize_input` and `multiply_scaled` in one launch, [1, N] in x's type; None: they are two."""
    tuning = choose_quantizing(x, weight)
    return None if tuning is None else fused_linear(x, weight, scales=(None, w_scales), tuning=tuning, pdl=pdl)[0]


def multiply_scaled(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None,
    workspace: LinearWorkspace,
    out_dtype: torch.dtype,
    *,
    scale_rows: int = 1,
    group_size: int | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """[num_tokens, N] in `out_dtype`; arguments as those of `scaled_linear`, shapes that fit together.

    `out`: where to write it, [num_tokens, N] in `out_dtype`; the library does so by itself, the others' are copied.
    """
    choice = choose_scaled(x, weight) if group_size is None and scale_rows == 1 else None
    if (isinstance(choice, FusedTuning) and bias is not None) or (choice == LIBRARY and out_dtype != torch.bfloat16):
        choice = tile_shape(x.shape[0], *weight.shape)
    scales = (x_scales, w_scales)
    if choice == LIBRARY:
        return torch._scaled_mm(
            x, weight.t(), x_scales, w_scales.t(), bias, out_dtype=out_dtype, use_fast_accum=True, out=out
        )
    if isinstance(choice, FusedTuning):
        y = fused_linear(x, weight, scales=scales, out_dtype=out_dtype, tuning=choice, pdl=pdl)[0]
    elif isinstance(choice, TileLinearTuning):
        y = tile_linear(x, weight, bias, workspace, scales=scales, out_dtype=out_dtype, tuning=choice, pdl=pdl)
    else:
        y = scaled_linear(
            x,
            x_scales,
            weight,
            w_scales,
            bias,
            workspace,
            out_dtype,
            scale_rows=scale_rows,
            group_size=group_size,
            pdl=pdl,
        )  # fmt: skip
    return y if out is None else out.copy_(y)
