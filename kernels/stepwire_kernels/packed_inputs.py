"""Inputs of a few tokens on their way into products with packed weights: read as whole lines, then dealt to threads.

A thread's part of a right operand is pairs of inputs, eight apart, of a token of its own: read straight from where
inputs lie, every load of 32 threads touches as many lines as there are tokens, sixteen times for 128 inputs. So of
several tokens a thread reads 16 bytes, eight threads a line, and the numbers change threads within the warp. Of one or
two tokens (`DIRECT`) the detour takes longer than those loads.
"""

# ruff: noqa: RUF005 (Triton's compiler knows no stars in tuples)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Up to so many tokens inputs are read directly.
MAX_DIRECT_TOKENS = 2


@gluon.jit
def operands_at(
    x_ptr, x_stride, first_input, num_tokens, B: gl.constexpr, WARPS: gl.constexpr, BLOCK_M: gl.constexpr
):  # fmt: skip
    """Where the first 32 of each warp's inputs lie, [WARPS, 32, BLOCK_M], and which inputs they are.

    Tokens beyond the last are the last: their sums are not to be stored.
    """
    token = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, gl.SliceLayout(1, B)))[None, None, :]
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, B)))[None, :, None]
    lanes = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, B)))[:, None, None] * 128 + lane
    lanes = first_input + lanes
    x_at = x_ptr + gl.minimum(token, num_tokens - 1).to(gl.int64) * x_stride + lanes
    return x_at, lanes + token * 0


@gluon.jit
def load_operands(x_at, lanes, FIRST: gl.constexpr, K, EVEN: gl.constexpr):
    """128 inputs of every warp and token, FIRST from x_at on, as four right operands [WARPS, 32, BLOCK_M].

    x_at, lanes: of `operands_at`. Zeros beyond K.
    """
    found = ()
    for run in gl.static_range(4):
        at = x_at + (FIRST + run * 32)
        x = gl.load(at) if EVEN else gl.load(at, mask=lanes < K - FIRST - run * 32, other=0.0)
        found = found + (x,)
    return found


@gluon.jit
def load_lines(
    x_ptr, x_stride, first_input, num_tokens, K, EVEN: gl.constexpr, WARPS: gl.constexpr, BLOCK_M: gl.constexpr
):  # fmt: skip
    """128 inputs of each token for each warp, from `first_input` on: [WARPS, 128, BLOCK_M]. Zeros beyond K.

    Tokens beyond the last are the last: their sums are not to be stored.
    """
    LINES: gl.constexpr = gl.BlockedLayout([1, 8, 1], [1, 8, 4], [WARPS, 1, 1], [1, 2, 0])
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LINES)))[:, None, None]
    lane = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(2, LINES)))[None, :, None]
    token = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, gl.SliceLayout(1, LINES)))[None, None, :]
    place = first_input + warp * 128 + lane
    at = x_ptr + gl.minimum(token, num_tokens - 1).to(gl.int64) * x_stride + place
    return gl.load(at) if EVEN else gl.load(at, mask=(place < K) & (token >= 0), other=0.0)


@gluon.jit
def operands_of_lines(inputs, B: gl.constexpr):
    """Of `load_lines` four right operands [WARPS, 32, BLOCK_M], one behind another."""
    first, second = _both_halves(gl.convert_layout(inputs, B), B)
    return _both_halves(first, B) + _both_halves(second, B)


@gluon.jit
def _both_halves(operand, B: gl.constexpr):
    """The two halves of [WARPS, inputs, tokens] by inputs; no number changes threads."""
    WARPS: gl.constexpr = operand.shape[0]
    HALF: gl.constexpr = operand.shape[1] // 2
    split = operand.reshape([WARPS, 2, HALF, operand.shape[2]])
    first, second = gl.split(gl.permute(split, [0, 2, 3, 1]))
    return (gl.convert_layout(first, B, assert_trivial=True), gl.convert_layout(second, B, assert_trivial=True))
