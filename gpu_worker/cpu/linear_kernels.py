"""y = x W^T + b for bfloat16 weights on a CPU that has no instructions for them: W is widened to float32 on the way.

One row is bound by memory: every output's weights are read as one stream (several streams at once defeat the hardware's
prefetching: 11 against 18 GB/s on two cores of a Zen 3). More rows are bound by arithmetic: three outputs' weights are
widened into a buffer that stays in the first-level cache and meet the rows four at a time: 12 sums, 3 weights and one
input fill the 16 vector registers of AVX2.
"""

from __future__ import annotations

import numpy as np

from gpu_worker.cpu.intrinsics import compiled, float32s, narrow, prefetch, summing, uint16s, widen
from gpu_worker.cpu.layout import BLOCK_ROWS, STAGED_INPUTS, TILE_OUTPUTS, TILE_ROWS


@compiled
def widen_rows(source: int, row_stride: int, target: int, num_rows: int, size: int, padded_rows: int) -> None:
    """bfloat16 [num_rows, size] -> float32 [padded_rows, size], zeros below."""
    values = float32s(target)
    for row in range(num_rows):
        bits = uint16s(source + row * row_stride * 2)
        out = float32s(target + row * size * 4)
        for i in range(size):
            out[i] = widen(bits[i])
    for i in range(num_rows * size, padded_rows * size):
        values[i] = np.float32(0)


@compiled
def bias_of(bias: int, output: int) -> float:
    return widen(uint16s(bias)[output]) if bias != 0 else np.float32(0)


@summing
def multiply_row(x: int, weight: int, bias: int, y: int, num_inputs: int, start: int, stop: int) -> None:
    """Outputs start..stop of one row: x float32 [num_inputs], y bfloat16 [num_outputs]."""
    inputs = float32s(x)
    out = uint16s(y)
    for output in range(start, stop):
        weights = uint16s(weight + output * num_inputs * 2)
        total = np.float32(0)
        for k in range(num_inputs):
            total += inputs[k] * widen(weights[k])
        out[output] = narrow(total + bias_of(bias, output))


@summing
def _tile_of_one(x: int, weights: int, bias: float, y: int, num_rows: int, num_inputs: int, num_outputs: int) -> None:
    """Four rows, of which num_rows are wanted, by one output's weights (bfloat16)."""
    x0 = float32s(x)
    x1 = float32s(x + num_inputs * 4)
    x2 = float32s(x + num_inputs * 8)
    x3 = float32s(x + num_inputs * 12)
    w = uint16s(weights)
    t0 = np.float32(0)
    t1 = np.float32(0)
    t2 = np.float32(0)
    t3 = np.float32(0)
    for k in range(num_inputs):
        v = widen(w[k])
        t0 += x0[k] * v
        t1 += x1[k] * v
        t2 += x2[k] * v
        t3 += x3[k] * v
    out = uint16s(y)
    out[0] = narrow(t0 + bias)
    if num_rows > 1:
        out[num_outputs] = narrow(t1 + bias)
    if num_rows > 2:
        out[2 * num_outputs] = narrow(t2 + bias)
    if num_rows > 3:
        out[3 * num_outputs] = narrow(t3 + bias)


@summing
def _tile_of_three(x: int, row_bytes: int, weights: int, num_inputs: int, sums: int, is_first: bool) -> None:
    """Sums of four rows by three outputs: x float32, rows row_bytes apart; weights float32 [3, num_inputs].

    sums: float32 [4, 3], to which a part of the inputs that is not the first is added.
    """
    x0 = float32s(x)
    x1 = float32s(x + row_bytes)
    x2 = float32s(x + row_bytes * 2)
    x3 = float32s(x + row_bytes * 3)
    w0 = float32s(weights)
    w1 = float32s(weights + num_inputs * 4)
    w2 = float32s(weights + num_inputs * 8)
    t00 = np.float32(0)
    t01 = np.float32(0)
    t02 = np.float32(0)
    t10 = np.float32(0)
    t11 = np.float32(0)
    t12 = np.float32(0)
    t20 = np.float32(0)
    t21 = np.float32(0)
    t22 = np.float32(0)
    t30 = np.float32(0)
    t31 = np.float32(0)
    t32 = np.float32(0)
    for k in range(num_inputs):
        v0 = w0[k]
        v1 = w1[k]
        v2 = w2[k]
        t00 += x0[k] * v0
        t01 += x0[k] * v1
        t02 += x0[k] * v2
        t10 += x1[k] * v0
        t11 += x1[k] * v1
        t12 += x1[k] * v2
        t20 += x2[k] * v0
        t21 += x2[k] * v1
        t22 += x2[k] * v2
        t30 += x3[k] * v0
        t31 += x3[k] * v1
        t32 += x3[k] * v2
    out = float32s(sums)
    if is_first:
        for i in range(TILE_ROWS * TILE_OUTPUTS):
            out[i] = np.float32(0)
    out[0] += t00
    out[1] += t01
    out[2] += t02
    out[3] += t10
    out[4] += t11
    out[5] += t12
    out[6] += t20
    out[7] += t21
    out[8] += t22
    out[9] += t30
    out[10] += t31
    out[11] += t32


@compiled
def _store_sums(sums: int, bias: int, output: int, y: int, num_rows: int, num_outputs: int) -> None:
    """sums float32 [num_rows, TILE_OUTPUTS] with their bias into y [num_rows, num_outputs]."""
    values = float32s(sums)
    for i in range(TILE_OUTPUTS):
        b = bias_of(bias, output + i)
        out = uint16s(y + (output + i) * 2)
        for row in range(num_rows):
            out[row * num_outputs] = narrow(values[row * TILE_OUTPUTS + i] + b)


@compiled
def _stage(weights: int, row_bytes: int, num_inputs: int, staged: int) -> None:
    """Three outputs' weights as float32 [3, num_inputs]; the next three's begin to come from memory meanwhile."""
    for i in range(TILE_OUTPUTS):
        bits = uint16s(weights + i * row_bytes)
        values = float32s(staged + i * num_inputs * 4)
        for k in range(num_inputs):
            values[k] = widen(bits[k])
        following = weights + (i + TILE_OUTPUTS) * row_bytes
        for line in range(0, num_inputs * 2, 64):
            prefetch(following + line)


@compiled
def _multiply_streamed(
    x: int,
    weight: int,
    bias: int,
    y: int,
    first: int,
    last: int,
    num_inputs: int,
    num_outputs: int,
    start: int,
    stop: int,
) -> None:
    """Rows first..last by outputs start..stop, one output at a time."""
    for output in range(start, stop):
        weights = weight + output * num_inputs * 2
        for line in range(num_inputs * 2, num_inputs * 4, 64):
            prefetch(weights + line)
        b = bias_of(bias, output)
        for row in range(first, last, TILE_ROWS):
            place = y + (row * num_outputs + output) * 2
            _tile_of_one(x + row * num_inputs * 4, weights, b, place, last - row, num_inputs, num_outputs)


@compiled
def multiply_rows(
    x: int,
    weight: int,
    bias: int,
    y: int,
    num_rows: int,
    num_inputs: int,
    num_outputs: int,
    start: int,
    stop: int,
    buffer: int,
) -> None:
    """Outputs start..stop of all rows: x float32 [num_rows padded to TILE_ROWS, num_inputs], y bfloat16.

    buffer: float32 [TILE_OUTPUTS * (STAGED_INPUTS + BLOCK_ROWS)] of this thread alone.
    """
    # One tile of rows that fits the first cache gains nothing from staging.
    is_staged = num_rows > TILE_ROWS or num_inputs > STAGED_INPUTS
    whole = start + (stop - start) // TILE_OUTPUTS * TILE_OUTPUTS if is_staged else start
    num_parts = -(-num_inputs // STAGED_INPUTS)
    part = -(-num_inputs // num_parts)
    sums = buffer + TILE_OUTPUTS * STAGED_INPUTS * 4
    for first in range(0, num_rows, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, num_rows)
        rows = x + first * num_inputs * 4
        for output in range(start, whole, TILE_OUTPUTS):
            for k in range(0, num_inputs, part):
                size = min(part, num_inputs - k)
                _stage(weight + (output * num_inputs + k) * 2, num_inputs * 2, size, buffer)
                for row in range(0, last - first, TILE_ROWS):
                    tile = rows + (row * num_inputs + k) * 4
                    _tile_of_three(tile, num_inputs * 4, buffer, size, sums + row * TILE_OUTPUTS * 4, k == 0)
            _store_sums(sums, bias, output, y + first * num_outputs * 2, last - first, num_outputs)
        _multiply_streamed(x, weight, bias, y, first, last, num_inputs, num_outputs, whole, stop)
