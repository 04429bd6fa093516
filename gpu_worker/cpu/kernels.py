"""What Python calls: jobs, cut into items that a team's threads take one after another.

A thread takes the next item by lowering the count in the team's ticket. So the caller never waits for a thread that has
no time: it takes the items itself, and waits only for those that others have begun. (OpenMP gives each thread its share
beforehand; on cores that other processes use as well a step is then as slow as the slower core.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit, types

from gpu_worker.cpu.attention_kernels import merge_spans
from gpu_worker.cpu.intrinsics import (
    add_atomically,
    call_item,
    compiled,
    float64s,
    int64s,
    load_acquire,
    pause,
    replace_atomically,
    store_release,
    yield_core,
)
from gpu_worker.cpu.layout import (
    BLOCK_ROWS,
    KIND,
    LARGE_ROWS,
    LAYER,
    PANEL_COLUMNS,
    PANEL_ROWS,
    STEP,
    TEAM,
    TILE_OUTPUTS,
    TILE_ROWS,
)
from gpu_worker.cpu.linear_kernels import widen_rows

_TICKET, _NUM_DONE, _ENDS, _NUM_THREADS = TEAM.TICKET * 8, TEAM.NUM_DONE * 8, TEAM.ENDS * 8, TEAM.NUM_THREADS
_BUFFERS, _BUFFER_BYTES, _KERNELS = TEAM.BUFFERS, TEAM.BUFFER_BYTES, TEAM.KERNELS
_KIND, _NUM_ITEMS, _JOB = TEAM.JOB_KIND, TEAM.JOB_NUM_ITEMS, TEAM.JOB * 8
_IS_PARKED, _LINE = TEAM.IS_PARKED * 8, TEAM.LINE * 8
_MULTIPLY, _NORM, _GATE = KIND.MULTIPLY, KIND.NORM, KIND.GATE
_MULTIPLY_LARGE, _WIDEN = KIND.MULTIPLY_LARGE, KIND.WIDEN
_DECODE, _STORE, _PREFILL = KIND.DECODE, KIND.STORE, KIND.PREFILL
_NUM_KV_HEADS = LAYER.NUM_KV_HEADS
_NUM_SPANS, _MERGES, _NUM_TILES, _NUM_PREFILL = STEP.NUM_SPANS, STEP.MERGES, STEP.NUM_TILES, STEP.NUM_PREFILL
_LEFT = 0xFFFFFFFF

# Bytes of weights that a linear's item reads: some microseconds.
_ITEM_BYTES = 64 * 1024
# The same where many rows meet them: what the second-level cache holds beside a block of rows. And those rows.
_LARGE_ITEM_BYTES = 192 * 1024
_ITEM_ROWS = 256
# Rows from which panels are faster.
_LARGE_FROM = 12
# Elements of rows below which a job is not worth another thread's attention.
_ITEM_ELEMENTS = 8192
# Looks at the ticket before a helper lets others have its core between looks, and before it ends its watch.
_PAUSES, _YIELDS = 2000, 300


@compiled
def _execute(team: int, item: int, thread: int) -> None:
    fixed = int64s(team)
    buffer = fixed[_BUFFERS] + thread * fixed[_BUFFER_BYTES]
    call_item(fixed[_KERNELS + fixed[_KIND]], team + _JOB, item, buffer)


@compiled
def _work(team: int, thread: int) -> int:
    """Take items until none is left; how many were taken."""
    num_taken = 0
    while True:
        ticket = load_acquire(team + _TICKET)
        num_left = ticket & _LEFT
        if num_left == 0:
            return num_taken
        # Who has taken an item may read the job: it stays as it is until all its items are done.
        if replace_atomically(team + _TICKET, ticket, ticket - 1):
            _execute(team, int64s(team)[_NUM_ITEMS] - num_left, thread)
            add_atomically(team + _NUM_DONE, 1)
            num_taken += 1


@compiled
def _run(team: int, num_items: int) -> None:
    """Do all items of the job that stands in the team's memory."""
    fixed = int64s(team)
    if num_items == 1 or fixed[_NUM_THREADS] == 1:
        for item in range(num_items):
            _execute(team, item, 0)
        return
    fixed[_NUM_ITEMS] = num_items
    store_release(team + _NUM_DONE, 0)
    number = (load_acquire(team + _TICKET) >> 32) + 1
    store_release(team + _TICKET, (number << 32) | num_items)
    _work(team, 0)
    num_looks = 0
    while load_acquire(team + _NUM_DONE) < num_items:
        pause()
        num_looks += 1
        if num_looks > _PAUSES:
            yield_core()


def help_team(team: int, thread: int) -> None:
    """Take items of the jobs that come, until none has come for a while."""
    num_looks = 0
    while num_looks < _PAUSES + _YIELDS and load_acquire(team + _ENDS) == 0:
        if _work(team, thread):
            num_looks = 0
        pause()
        num_looks += 1
        if num_looks > _PAUSES:
            yield_core()
    store_release(team + _IS_PARKED + thread * _LINE, 1)


@compiled
def _multiply_large(
    team: int,
    x: int,
    x_stride: int,
    weight: int,
    bias: int,
    y: int,
    num_rows: int,
    num_inputs: int,
    num_outputs: int,
    widened: int,
) -> None:
    a = int64s(team + _JOB)
    per_item = max(1, _ITEM_ELEMENTS // num_inputs)
    int64s(team)[_KIND] = _WIDEN
    a[0], a[1], a[2], a[3], a[4] = x, x_stride, widened, num_rows, num_inputs
    a[5], a[6] = -(-num_rows // PANEL_ROWS) * PANEL_ROWS, per_item
    _run(team, -(-num_rows // per_item))
    per_item = max(1, _ITEM_BYTES // (2 * num_inputs * PANEL_COLUMNS)) * PANEL_COLUMNS
    int64s(team)[_KIND] = _MULTIPLY_LARGE
    a[0], a[1], a[2], a[3] = widened, weight, bias, y
    a[4], a[5], a[6], a[7], a[8] = num_rows, num_inputs, num_outputs, per_item, LARGE_ROWS
    _run(team, -(-num_outputs // per_item) * -(-num_rows // LARGE_ROWS))


def linear(
    team: int,
    x: int,
    x_stride: int,
    weight: int,
    bias: int,
    y: int,
    num_rows: int,
    num_inputs: int,
    num_outputs: int,
    widened: int,
) -> None:
    """y = x W^T + b. x bfloat16 rows `x_stride` apart, weight [num_outputs, num_inputs], y [num_rows, num_outputs].

    widened: float32 [num_rows padded to TILE_ROWS, num_inputs].
    """
    if num_rows >= _LARGE_FROM:
        _multiply_large(team, x, x_stride, weight, bias, y, num_rows, num_inputs, num_outputs, widened)
        return
    padded = 1 if num_rows == 1 else -(-num_rows // TILE_ROWS) * TILE_ROWS
    widen_rows(x, x_stride, widened, num_rows, num_inputs, padded)
    item_bytes = _ITEM_BYTES if num_rows <= BLOCK_ROWS else _LARGE_ITEM_BYTES
    per_item = max(1, item_bytes // (2 * num_inputs * TILE_OUTPUTS)) * TILE_OUTPUTS
    int64s(team)[_KIND] = _MULTIPLY
    a = int64s(team + _JOB)
    a[0], a[1], a[2], a[3] = widened, weight, bias, y
    a[4], a[5], a[6], a[7], a[8] = num_rows, num_inputs, num_outputs, per_item, _ITEM_ROWS
    _run(team, -(-num_outputs // per_item) * -(-num_rows // _ITEM_ROWS))


def add_norm(
    team: int,
    x: int,
    residual: int,
    residual_stride: int,
    out: int,
    weight: int,
    bias: int,
    eps: float,
    offset: float,
    centred: int,
    num_rows: int,
    size: int,
) -> None:
    """See `row_kernels.norm_rows`."""
    per_item = max(1, _ITEM_ELEMENTS // size)
    int64s(team)[_KIND] = _NORM
    a = int64s(team + _JOB)
    numbers = float64s(team + _JOB)
    a[0], a[1], a[2], a[3], a[4], a[5] = x, residual, residual_stride, out, weight, bias
    numbers[6], numbers[7] = eps, offset
    a[8], a[9], a[10], a[11] = centred, size, num_rows, per_item
    _run(team, -(-num_rows // per_item))


def gated_activation(team: int, gate_up: int, out: int, kind: int, num_rows: int, size: int) -> None:
    """See `row_kernels.gate_rows`."""
    per_item = max(1, _ITEM_ELEMENTS // size)
    int64s(team)[_KIND] = _GATE
    a = int64s(team + _JOB)
    a[0], a[1], a[2], a[3], a[4], a[5] = gate_up, out, kind, size, num_rows, per_item
    _run(team, -(-num_rows // per_item))


def attend(team: int, qkv: int, qkv_stride: int, out: int, layer: int, step: int, partial: int, queries: int) -> None:
    """Norms of heads, rotation, KV write and attention of a whole step.

    layer, step: as in `layout`. partial: float32 [num_parts, num_heads, head_dim + 2]. queries: float32
    [num_prefill, num_heads, head_dim]. out: bfloat16 [num_tokens, num_heads * head_dim].
    """
    plan = int64s(step)
    num_kv_heads = int64s(layer)[_NUM_KV_HEADS]
    a = int64s(team + _JOB)
    a[0], a[1], a[2], a[3], a[4], a[5], a[6] = qkv, qkv_stride, out, layer, step, partial, queries
    if plan[_NUM_SPANS]:
        int64s(team)[_KIND] = _DECODE
        _run(team, plan[_NUM_SPANS] * num_kv_heads)
        if int64s(plan[_MERGES])[0]:
            merge_spans(out, layer, step, partial)
    if plan[_NUM_PREFILL]:
        int64s(team)[_KIND] = _STORE
        _run(team, plan[_NUM_PREFILL])
        int64s(team)[_KIND] = _PREFILL
        _run(team, plan[_NUM_TILES] * num_kv_heads)


_ADDRESS, _FLOAT = types.int64, types.float64


class EntryPoints(NamedTuple):
    linear: Any
    add_norm: Any
    gated_activation: Any
    attend: Any
    help_team: Any


def compile_entry_points(*, keep: bool) -> EntryPoints:
    """keep: read them from and write them to numba's cache directory."""
    signatures = {
        linear: (_ADDRESS,) * 10,
        add_norm: (*(_ADDRESS,) * 7, _FLOAT, _FLOAT, *(_ADDRESS,) * 3),
        gated_activation: (_ADDRESS,) * 6,
        attend: (_ADDRESS,) * 8,
        help_team: (_ADDRESS,) * 2,
    }
    return EntryPoints(
        *(
            njit(types.void(*signature), nogil=True, error_model="numpy", cache=keep)(function)
            for function, signature in signatures.items()
        )
    )
