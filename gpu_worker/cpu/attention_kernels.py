"""Rotation, KV write and attention over the paged cache's own blocks, nothing gathered: bfloat16 in, float32 inside.

A layer's cache is [2, num_blocks, num_kv_heads, block_size, head_dim], keys then values. Work is cut into items of one
KV head with the query heads that share it: for rows that run one token a span of the row's keys (one that is cut into
several has its parts put together afterwards), for longer runs a tile of queries (softmax as it goes: Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018).
"""

from __future__ import annotations

import numpy as np

from gpu_worker.cpu.intrinsics import (
    comparing,
    compiled,
    float32s,
    float64s,
    int64s,
    narrow,
    summing,
    uint16s,
    widen,
)
from gpu_worker.cpu.layout import LAYER, PANEL_COLUMNS, PANEL_ROWS, PREFILL_KEYS, STEP, TURNED
from gpu_worker.cpu.row_kernels import exp, load_head, rotate_head, tanh
from gpu_worker.cpu.vectors import add_panel_product, turn_widened

_ZERO, _ONE, _LOWEST = np.float32(0), np.float32(1), np.float32(-np.inf)

# numba takes plain module constants only.
_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM = LAYER.NUM_HEADS, LAYER.NUM_KV_HEADS, LAYER.HEAD_DIM
_QUERY_NORM, _KEY_NORM = LAYER.QUERY_NORM, LAYER.KEY_NORM
_QUERY_EPS, _KEY_EPS, _NORM_OFFSET = LAYER.QUERY_EPS, LAYER.KEY_EPS, LAYER.NORM_OFFSET
_NUM_PAIRS, _INTERLEAVED, _COS, _SIN = LAYER.NUM_PAIRS, LAYER.INTERLEAVED, LAYER.COS, LAYER.SIN
_SCALE, _SOFTCAP, _WINDOW, _SINKS = LAYER.SCALE, LAYER.SOFTCAP, LAYER.WINDOW, LAYER.SINKS
_NUM_BLOCKS, _BLOCK_SIZE, _CACHE = LAYER.NUM_BLOCKS, LAYER.BLOCK_SIZE, LAYER.CACHE
_FIRST_VALUE, _VALUE_NORM, _VALUE_EPS = LAYER.FIRST_VALUE, LAYER.VALUE_NORM, LAYER.VALUE_EPS
_TABLES, _TABLE_STRIDE, _POSITIONS, _SLOTS = STEP.TABLES, STEP.TABLE_STRIDE, STEP.POSITIONS, STEP.SLOTS
_SPANS, _SPAN_KEYS, _MERGES = STEP.SPANS, STEP.SPAN_KEYS, STEP.MERGES
_TILES, _FIRST_PREFILL = STEP.TILES, STEP.FIRST_PREFILL
_KEYS = PREFILL_KEYS


@compiled
def _load_rotated(qkv: int, layer: int, head: int, position: int, target: int) -> None:
    """Query head `head`, or key head `head - num_heads`, of one token: normed, rotated, float32."""
    of = int64s(layer)
    numbers = float64s(layer)
    head_dim = of[_HEAD_DIM]
    is_query = head < of[_NUM_HEADS]
    norm = of[_QUERY_NORM] if is_query else of[_KEY_NORM]
    eps = np.float32(numbers[_QUERY_EPS] if is_query else numbers[_KEY_EPS])
    load_head(qkv + head * head_dim * 2, target, head_dim, norm, eps, np.float32(numbers[_NORM_OFFSET]))
    angle = position * of[_NUM_PAIRS] * 4
    rotate_head(target, of[_COS] + angle, of[_SIN] + angle, of[_NUM_PAIRS], of[_INTERLEAVED])


@compiled
def _load_queries(qkv: int, layer: int, kv_head: int, position: int, target: int) -> None:
    """The queries of one token that share a KV head, times the softmax's scale: float32 [group, head_dim]."""
    of = int64s(layer)
    head_dim = of[_HEAD_DIM]
    group = of[_NUM_HEADS] // of[_NUM_KV_HEADS]
    scale = np.float32(float64s(layer)[_SCALE])
    for g in range(group):
        place = target + g * head_dim * 4
        _load_rotated(qkv, layer, kv_head * group + g, position, place)
        values = float32s(place)
        for i in range(head_dim):
            values[i] *= scale


@compiled
def _tile_address(layer: int, block: int, kv_head: int) -> int:
    """Where a block has the keys of a head."""
    of = int64s(layer)
    return of[_CACHE] + (block * of[_NUM_KV_HEADS] + kv_head) * of[_BLOCK_SIZE] * of[_HEAD_DIM] * 2


@compiled
def _plane_bytes(layer: int) -> int:
    """From a key to its value."""
    of = int64s(layer)
    return of[_NUM_BLOCKS] * of[_NUM_KV_HEADS] * of[_BLOCK_SIZE] * of[_HEAD_DIM] * 2


@compiled
def store_token(qkv: int, layer: int, kv_head: int, position: int, slot: int, buffer: int) -> None:
    """Put a token's rotated key and its value into the cache, if it has any; buffer: float32 [head_dim]."""
    of = int64s(layer)
    first_value = of[_FIRST_VALUE]
    if first_value == 0:
        return
    head_dim = of[_HEAD_DIM]
    block_size = of[_BLOCK_SIZE]
    num_heads = of[_NUM_HEADS]
    target = _tile_address(layer, slot // block_size, kv_head) + slot % block_size * head_dim * 2
    _load_rotated(qkv, layer, num_heads + kv_head, position, buffer)
    keys = float32s(buffer)
    cached_key = uint16s(target)
    for i in range(head_dim):
        cached_key[i] = narrow(keys[i])
    source = qkv + (first_value + kv_head) * head_dim * 2
    values = uint16s(source)
    cached_value = uint16s(target + _plane_bytes(layer))
    if of[_VALUE_NORM] == 0:
        for i in range(head_dim):
            cached_value[i] = values[i]
    else:
        load_head(source, buffer, head_dim, of[_VALUE_NORM], np.float32(float64s(layer)[_VALUE_EPS]), _ZERO)
        for i in range(head_dim):
            cached_value[i] = narrow(keys[i])


@summing
def _dot(a: int, b: int, size: int) -> float:
    left = float32s(a)
    right = float32s(b)
    total = _ZERO
    for i in range(size):
        total += left[i] * right[i]
    return total


@compiled
def _widen_into(source: int, target: int, size: int) -> None:
    bits = uint16s(source)
    values = float32s(target)
    for i in range(size):
        values[i] = widen(bits[i])


@summing
def _add_values(weights: int, values: int, num_keys: int, head_dim: int, sums: int) -> None:
    """sums [head_dim] += weights [num_keys] times values [num_keys, head_dim]; all float32."""
    w = float32s(weights)
    out = float32s(sums)
    whole = num_keys // 4 * 4
    for key in range(0, whole, 4):
        v0 = float32s(values + key * head_dim * 4)
        v1 = float32s(values + (key + 1) * head_dim * 4)
        v2 = float32s(values + (key + 2) * head_dim * 4)
        v3 = float32s(values + (key + 3) * head_dim * 4)
        w0, w1, w2, w3 = w[key], w[key + 1], w[key + 2], w[key + 3]
        for i in range(head_dim):
            out[i] += w0 * v0[i] + w1 * v1[i] + w2 * v2[i] + w3 * v3[i]
    for key in range(whole, num_keys):
        v = float32s(values + key * head_dim * 4)
        for i in range(head_dim):
            out[i] += w[key] * v[i]


@summing
def _exponentials(scores: int, num_keys: int, shift: float) -> float:
    """scores = e^(scores - shift); their sum."""
    values = float32s(scores)
    for i in range(num_keys):
        values[i] = exp(values[i] - shift)
    total = _ZERO
    for i in range(num_keys):
        total += values[i]
    return total


@compiled
def _cap(scores: int, num_keys: int, softcap: float) -> None:
    values = float32s(scores)
    for i in range(num_keys):
        values[i] = softcap * tanh(values[i] / softcap)


@comparing
def _largest(scores: int, num_keys: int) -> float:
    values = float32s(scores)
    largest = _LOWEST
    for i in range(num_keys):
        largest = max(largest, values[i])
    return largest


@compiled
def _store_divided(sums: int, divisor: float, head_dim: int, out: int) -> None:
    values = float32s(sums)
    target = uint16s(out)
    for i in range(head_dim):
        target[i] = narrow(values[i] / divisor)


@compiled
def decode_item(
    item: int, qkv: int, qkv_stride: int, out: int, layer: int, step: int, partial: int, buffer: int
) -> None:
    """One span of one row's keys for one KV head.

    buffer: float32 [group * head_dim * 2 + block_size * head_dim + group * span_keys]. partial: float32
    [num_slots, num_heads, head_dim + 2], where spans that are not a row's only one leave largest, sum and weighted sum.
    """
    of = int64s(layer)
    head_dim, block_size, num_kv_heads = of[_HEAD_DIM], of[_BLOCK_SIZE], of[_NUM_KV_HEADS]
    num_heads = of[_NUM_HEADS]
    group = num_heads // num_kv_heads
    plan = int64s(step)
    kv_head = item % num_kv_heads
    span = int64s(plan[_SPANS] + item // num_kv_heads * 32)
    row, start, stop, slot = span[0], span[1], span[2], span[3]
    table = int64s(plan[_TABLES] + row * plan[_TABLE_STRIDE] * 8)
    position = int64s(plan[_POSITIONS])[row]
    token = qkv + row * qkv_stride * 2
    queries = buffer
    sums = queries + group * head_dim * 4
    tile = sums + group * head_dim * 4
    scores = tile + block_size * head_dim * 4
    span_bytes = plan[_SPAN_KEYS] * 4
    if stop == position + 1:
        place = table[position // block_size] * block_size + position % block_size
        store_token(token, layer, kv_head, position, place, tile)
    _load_queries(token, layer, kv_head, position, queries)
    for block in range(start // block_size, (stop - 1) // block_size + 1):
        first = max(start, block * block_size)
        num_keys = min(stop, (block + 1) * block_size) - first
        source = _tile_address(layer, table[block], kv_head) + (first - block * block_size) * head_dim * 2
        _widen_into(source, tile, num_keys * head_dim)
        for g in range(group):
            for key in range(num_keys):
                score = _dot(queries + g * head_dim * 4, tile + key * head_dim * 4, head_dim)
                float32s(scores + g * span_bytes)[first - start + key] = score
    softcap = np.float32(float64s(layer)[_SOFTCAP])
    totals = float32s(queries)  # nobody reads the queries any more
    for g in range(group):
        place = scores + g * span_bytes
        if softcap > 0:
            _cap(place, stop - start, softcap)
        largest = _largest(place, stop - start)
        total = _exponentials(place, stop - start, largest)
        totals[2 * g] = largest
        totals[2 * g + 1] = total
    weighted = float32s(sums)
    for i in range(group * head_dim):
        weighted[i] = _ZERO
    plane = _plane_bytes(layer)
    for block in range(start // block_size, (stop - 1) // block_size + 1):
        first = max(start, block * block_size)
        num_keys = min(stop, (block + 1) * block_size) - first
        source = _tile_address(layer, table[block], kv_head) + (first - block * block_size) * head_dim * 2
        _widen_into(source + plane, tile, num_keys * head_dim)
        for g in range(group):
            weights = scores + g * span_bytes + (first - start) * 4
            _add_values(weights, tile, num_keys, head_dim, sums + g * head_dim * 4)
    for g in range(group):
        head = kv_head * group + g
        if slot < 0:
            divisor = totals[2 * g + 1] + _of_sink(of[_SINKS], head, totals[2 * g])
            _store_divided(sums + g * head_dim * 4, divisor, head_dim, out + (row * num_heads + head) * head_dim * 2)
        else:
            part = float32s(partial + (slot * num_heads + head) * (head_dim + 2) * 4)
            part[0] = totals[2 * g]
            part[1] = totals[2 * g + 1]
            for i in range(head_dim):
                part[2 + i] = weighted[g * head_dim + i]


@compiled
def _of_sink(sinks: int, head: int, largest: float) -> float:
    """What a head's sink adds to the softmax's denominator."""
    if sinks == 0:
        return _ZERO
    # A sink far above all scores leaves nothing of them; beyond e^88 it makes no difference to a bfloat16.
    return exp(float32s(sinks)[head] - largest)


@compiled
def merge_spans(out: int, layer: int, step: int, partial: int) -> None:
    """Put together the parts of rows whose keys were cut into several spans."""
    of = int64s(layer)
    head_dim, num_heads = of[_HEAD_DIM], of[_NUM_HEADS]
    merges = int64s(int64s(step)[_MERGES])
    size = head_dim + 2
    for merge in range(merges[0]):
        row, first, num_slots = merges[1 + 3 * merge], merges[2 + 3 * merge], merges[3 + 3 * merge]
        for head in range(num_heads):
            parts = float32s(partial)
            largest = _LOWEST
            for slot in range(first, first + num_slots):
                largest = max(largest, parts[(slot * num_heads + head) * size])
            total = _of_sink(of[_SINKS], head, largest)
            sums = partial + ((first * num_heads + head) * size + 2) * 4
            values = float32s(sums)
            for slot in range(first, first + num_slots):
                part = (slot * num_heads + head) * size
                weight = exp(parts[part] - largest)
                total += parts[part + 1] * weight
                for i in range(head_dim):
                    values[i] = parts[part + 2 + i] * weight + (values[i] if slot > first else _ZERO)
            _store_divided(sums, total, head_dim, out + (row * num_heads + head) * head_dim * 2)


@compiled
def store_item(item: int, qkv: int, qkv_stride: int, layer: int, step: int, queries: int, buffer: int) -> None:
    """One token of a longer run: keys and values into the cache, queries into float32 [num_tokens, heads, head_dim]."""
    of = int64s(layer)
    plan = int64s(step)
    token = plan[_FIRST_PREFILL] + item
    position = int64s(plan[_POSITIONS])[token]
    source = qkv + token * qkv_stride * 2
    num_heads, num_kv_heads, head_dim = of[_NUM_HEADS], of[_NUM_KV_HEADS], of[_HEAD_DIM]
    for kv_head in range(num_kv_heads):
        store_token(source, layer, kv_head, position, int64s(plan[_SLOTS])[token], buffer)
        first_head = kv_head * (num_heads // num_kv_heads)
        _load_queries(source, layer, kv_head, position, queries + (item * num_heads + first_head) * head_dim * 4)


@compiled
def _stage_keys(
    layer: int, table: int, kv_head: int, first: int, num_keys: int, keys: int, values: int, padded_dim: int
) -> None:
    """Keys as columns, float32 [head_dim, _KEYS], values as rows [_KEYS, padded_dim]; zeros where there are none."""
    of = int64s(layer)
    head_dim, block_size = of[_HEAD_DIM], of[_BLOCK_SIZE]
    blocks = int64s(table)
    columns = float32s(keys)
    plane = _plane_bytes(layer)
    if num_keys < _KEYS:
        _fill(keys, head_dim * _KEYS, _ZERO)
    if num_keys < _KEYS or head_dim < padded_dim:
        _fill(values, _KEYS * padded_dim, _ZERO)
    num_turned = 0
    if first % TURNED == 0 and block_size % TURNED == 0:
        num_turned = num_keys // TURNED * TURNED
    whole_dim = head_dim // TURNED * TURNED
    for key in range(0, num_turned, TURNED):
        position = first + key
        source = _tile_address(layer, blocks[position // block_size], kv_head) + position % block_size * head_dim * 2
        for i in range(0, whole_dim, TURNED):
            turn_widened(source + i * 2, head_dim * 2, keys + (i * _KEYS + key) * 4, _KEYS * 4)
    for key in range(num_keys):
        position = first + key
        source = _tile_address(layer, blocks[position // block_size], kv_head) + position % block_size * head_dim * 2
        bits = uint16s(source)
        for i in range(whole_dim if key < num_turned else 0, head_dim):
            columns[i * _KEYS + key] = widen(bits[i])
        _widen_into(source + plane, values + key * padded_dim * 4, head_dim)


@compiled
def _fill(values: int, size: int, value: float) -> None:
    numbers = float32s(values)
    for i in range(size):
        numbers[i] = value


@compiled
def _soften(scores: int, low: int, high: int, softcap: float, state: int) -> float:
    """One query's scores [_KEYS] become weights, 0 outside of low..high; what its sums so far are to be multiplied by.

    state: float32 [2], the largest score and the sum of weights so far.
    """
    if softcap > 0:
        _cap(scores, _KEYS, softcap)
    weights = float32s(scores)
    so_far = float32s(state)
    before = so_far[0]
    largest = max(before, _largest(scores + low * 4, high - low))
    total = _exponentials(scores + low * 4, high - low, largest)
    for key in range(low):
        weights[key] = _ZERO
    for key in range(high, _KEYS):
        weights[key] = _ZERO
    shrink = exp(before - largest) if before > _LOWEST else _ZERO
    so_far[0] = largest
    so_far[1] = so_far[1] * shrink + total
    return shrink


@compiled
def _scale(values: int, size: int, factor: float) -> None:
    numbers = float32s(values)
    for i in range(size):
        numbers[i] *= factor


@compiled
def prefill_item(item: int, out: int, layer: int, step: int, queries: int, buffer: int) -> None:
    """One tile of queries of one run, for one KV head; keys of this step are in the cache already.

    With n = PREFILL_QUERIES * group rounded up to PANEL_ROWS and d = head_dim rounded up to PANEL_COLUMNS, buffer:
    float32 [n, head_dim] queries, [head_dim, _KEYS] keys, [_KEYS, d] values, [n, _KEYS] scores, [n, d] sums, [n, 2].
    """
    of = int64s(layer)
    head_dim, num_heads, num_kv_heads = of[_HEAD_DIM], of[_NUM_HEADS], of[_NUM_KV_HEADS]
    window = of[_WINDOW]
    softcap = np.float32(float64s(layer)[_SOFTCAP])
    group = num_heads // num_kv_heads
    plan = int64s(step)
    kv_head = item % num_kv_heads
    tile = int64s(plan[_TILES] + item // num_kv_heads * 32)
    row, first_token, num_queries, position = tile[0], tile[1], tile[2], tile[3]
    table = plan[_TABLES] + row * plan[_TABLE_STRIDE] * 8
    num_rows = num_queries * group
    padded_rows = -(-num_rows // PANEL_ROWS) * PANEL_ROWS
    padded_dim = -(-head_dim // PANEL_COLUMNS) * PANEL_COLUMNS
    own_queries = buffer
    keys = own_queries + padded_rows * head_dim * 4
    values = keys + _KEYS * head_dim * 4
    scores = values + _KEYS * padded_dim * 4
    sums = scores + padded_rows * _KEYS * 4
    states = sums + padded_rows * padded_dim * 4
    _fill(own_queries, padded_rows * head_dim, _ZERO)
    _fill(sums, padded_rows * padded_dim, _ZERO)
    for number in range(num_rows):
        state = float32s(states + number * 8)
        state[0], state[1] = _LOWEST, _ZERO
        token = first_token - plan[_FIRST_PREFILL] + number // group
        source = float32s(queries + (token * num_heads + kv_head * group + number % group) * head_dim * 4)
        target = float32s(own_queries + number * head_dim * 4)
        for i in range(head_dim):
            target[i] = source[i]
    stop = position + num_queries
    for first in range(max(0, position - window + 1), stop, _KEYS):
        _stage_keys(layer, table, kv_head, first, min(_KEYS, stop - first), keys, values, padded_dim)
        _fill(scores, padded_rows * _KEYS, _ZERO)
        for panel in range(0, padded_rows, PANEL_ROWS):
            place = scores + panel * _KEYS * 4
            head = own_queries + panel * head_dim * 4
            for column in range(0, _KEYS, PANEL_COLUMNS):
                add_panel_product(
                    head, head_dim * 4, keys + column * 4, _KEYS * 4, head_dim, place + column * 4, _KEYS * 4
                )
        for number in range(num_rows):
            end = position + number // group + 1 - first
            place = scores + number * _KEYS * 4
            low, high = max(0, end - window), min(_KEYS, end)
            if low < high:
                shrink = _soften(place, low, high, softcap, states + number * 8)
                _scale(sums + number * padded_dim * 4, padded_dim, shrink)
            else:
                _fill(place, _KEYS, _ZERO)
        for panel in range(0, padded_rows, PANEL_ROWS):
            place = sums + panel * padded_dim * 4
            weights = scores + panel * _KEYS * 4
            for column in range(0, padded_dim, PANEL_COLUMNS):
                target = place + column * 4
                add_panel_product(
                    weights, _KEYS * 4, values + column * 4, padded_dim * 4, _KEYS, target, padded_dim * 4
                )
    for number in range(num_rows):
        head = kv_head * group + number % group
        state = float32s(states + number * 8)
        divisor = state[1] + _of_sink(of[_SINKS], head, state[0])
        place = out + ((first_token + number // group) * num_heads + head) * head_dim * 2
        _store_divided(sums + number * padded_dim * 4, divisor, head_dim, place)
