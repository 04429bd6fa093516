"""A kernel for each kind of item, as C functions void(arguments, item, buffer): what a team's threads call by address.

They are compiled apart from what calls them, once, and kept on disk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc, types

from gpu_worker.cpu.attention_kernels import decode_item, prefill_item, store_item
from gpu_worker.cpu.intrinsics import float64s, int64s
from gpu_worker.cpu.linear_kernels import multiply_row, multiply_rows, widen_rows
from gpu_worker.cpu.panel_kernels import multiply_panels
from gpu_worker.cpu.row_kernels import gate_rows, norm_rows

_SIGNATURE = types.void(types.int64, types.int64, types.int64)


def multiply(arguments: int, item: int, buffer: int) -> None:
    a = int64s(arguments)
    num_rows, num_inputs, num_outputs = a[4], a[5], a[6]
    num_chunks = -(-num_outputs // a[7])
    start = item % num_chunks * a[7]
    stop = min(start + a[7], num_outputs)
    if num_rows == 1:
        multiply_row(a[0], a[1], a[2], a[3], num_inputs, start, stop)
        return
    first = item // num_chunks * a[8]
    rows = min(a[8], num_rows - first)
    x, y = a[0] + first * num_inputs * 4, a[3] + first * num_outputs * 2
    multiply_rows(x, a[1], a[2], y, rows, num_inputs, num_outputs, start, stop, buffer)


def multiply_large(arguments: int, item: int, buffer: int) -> None:
    a = int64s(arguments)
    num_rows, num_inputs, num_outputs = a[4], a[5], a[6]
    num_chunks = -(-num_outputs // a[7])
    start = item % num_chunks * a[7]
    stop = min(start + a[7], num_outputs)
    first = item // num_chunks * a[8]
    rows = min(a[8], num_rows - first)
    x, y = a[0] + first * num_inputs * 4, a[3] + first * num_outputs * 2
    multiply_panels(x, a[1], a[2], y, rows, num_inputs, num_outputs, start, stop, buffer)


def widen_inputs(arguments: int, item: int, buffer: int) -> None:
    a = int64s(arguments)
    first = item * a[6]
    last = min(first + a[6], a[3])
    padded = a[5] if last == a[3] else last
    widen_rows(a[0] + first * a[1] * 2, a[1], a[2] + first * a[4] * 4, last - first, a[4], padded - first)


def norm(arguments: int, item: int, buffer: int) -> None:
    a = int64s(arguments)
    eps, offset = np.float32(float64s(arguments)[6]), np.float32(float64s(arguments)[7])
    first = item * a[11]
    last = min(first + a[11], a[10])
    norm_rows(a[0], a[1], a[2], a[3], a[4], a[5], eps, offset, a[8], a[9], first, last)


def gate(arguments: int, item: int, buffer: int) -> None:
    a = int64s(arguments)
    first = item * a[5]
    gate_rows(a[0], a[1], a[2], a[3], first, min(first + a[5], a[4]))


def decode(arguments: int, item: int, buffer: int) -> None:
    a = int64s(arguments)
    decode_item(item, a[0], a[1], a[2], a[3], a[4], a[5], buffer)


def store(arguments: int, item: int, buffer: int) -> None:
    a = int64s(arguments)
    store_item(item, a[0], a[1], a[3], a[4], a[6], buffer)


def prefill(arguments: int, item: int, buffer: int) -> None:
    a = int64s(arguments)
    prefill_item(item, a[2], a[3], a[4], a[6], buffer)


def compile_items(*, keep: bool) -> list[Any]:
    """The kernels, in the order of `layout.KIND`. keep: read them from and write them to numba's cache directory."""
    compile_one = cfunc(_SIGNATURE, nopython=True, cache=keep, error_model="numpy")
    return [
        compile_one(function)
        for function in (multiply, norm, gate, decode, store, prefill, multiply_large, widen_inputs)
    ]
