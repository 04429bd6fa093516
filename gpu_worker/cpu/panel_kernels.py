"""y = x W^T + b of many rows: weights widened to float32 as columns, sixteen outputs beside each other, so that no sum
goes across a vector.

A panel of weights stays in the first-level cache while all rows of an item meet it, six at a time (Goto and van de
Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008).
"""

from __future__ import annotations

import numpy as np

from gpu_worker.cpu.intrinsics import compiled, float32s, narrow, uint16s, widen
from gpu_worker.cpu.layout import PANEL_COLUMNS, PANEL_INPUTS, PANEL_ROWS, TURNED
from gpu_worker.cpu.linear_kernels import bias_of
from gpu_worker.cpu.vectors import add_panel_product, narrow_panel_row, turn_widened

_ZERO = np.float32(0)
_PANEL_BYTES = PANEL_COLUMNS * 4


@compiled
def _stage_panel(weights: int, row_bytes: int, num_outputs: int, num_inputs: int, panel: int) -> None:
    """Weights bfloat16 [num_outputs, num_inputs] as float32 [num_inputs, PANEL_COLUMNS]; zeros beside few outputs."""
    values = float32s(panel)
    whole_inputs = num_inputs // TURNED * TURNED
    for first in range(0, PANEL_COLUMNS, TURNED):
        num_whole = whole_inputs if first + TURNED <= num_outputs else 0
        source = weights + first * row_bytes
        for k in range(0, num_whole, TURNED):
            turn_widened(source + k * 2, row_bytes, panel + k * _PANEL_BYTES + first * 4, _PANEL_BYTES)
        for output in range(first, first + TURNED):
            bits = uint16s(weights + output * row_bytes)
            for k in range(num_whole, num_inputs):
                values[k * PANEL_COLUMNS + output] = widen(bits[k]) if output < num_outputs else _ZERO


@compiled
def _begin_sums(sums: int, bias: int, output: int, num_outputs: int, num_rows: int) -> None:
    """Every row's sums float32 [num_rows, PANEL_COLUMNS] begin with the bias."""
    values = float32s(sums)
    for i in range(PANEL_COLUMNS):
        values[i] = bias_of(bias, output + i) if i < num_outputs else _ZERO
    for i in range(PANEL_COLUMNS, num_rows * PANEL_COLUMNS):
        values[i] = values[i % PANEL_COLUMNS]


@compiled
def _store_panel(sums: int, num_outputs: int, y: int, row_bytes: int, num_rows: int) -> None:
    """sums float32 [num_rows, PANEL_COLUMNS] as bfloat16 [num_rows, num_outputs], rows row_bytes apart."""
    for row in range(num_rows):
        source, target = sums + row * _PANEL_BYTES, y + row * row_bytes
        if num_outputs == PANEL_COLUMNS:
            narrow_panel_row(source, target)
            continue
        values = float32s(source)
        out = uint16s(target)
        for i in range(num_outputs):
            out[i] = narrow(values[i])


@compiled
def multiply_panels(
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
    """Outputs start..stop of at most LARGE_ROWS rows: x float32 [num_rows padded, num_inputs], y bfloat16.

    buffer: float32 [PANEL_INPUTS + LARGE_ROWS, PANEL_COLUMNS] of this thread alone.
    """
    num_parts = -(-num_inputs // PANEL_INPUTS)
    part = -(-num_inputs // (num_parts * TURNED)) * TURNED
    sums = buffer + PANEL_INPUTS * _PANEL_BYTES
    padded_rows = -(-num_rows // PANEL_ROWS) * PANEL_ROWS
    for output in range(start, stop, PANEL_COLUMNS):
        width = min(PANEL_COLUMNS, stop - output)
        weights = weight + output * num_inputs * 2
        _begin_sums(sums, bias, output, width, padded_rows)
        for k in range(0, num_inputs, part):
            size = min(part, num_inputs - k)
            _stage_panel(weights + k * 2, num_inputs * 2, width, size, buffer)
            for row in range(0, num_rows, PANEL_ROWS):
                tile, place = x + (row * num_inputs + k) * 4, sums + row * _PANEL_BYTES
                add_panel_product(tile, num_inputs * 4, buffer, _PANEL_BYTES, size, place, _PANEL_BYTES)
        _store_panel(sums, width, y + output * 2, num_outputs * 2, num_rows)
