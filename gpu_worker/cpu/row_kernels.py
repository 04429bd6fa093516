"""What a decoder computes on each row by itself, in float32 on bfloat16 rows: norms, gated activations, rotation."""

from __future__ import annotations

import math

import numpy as np

from gpu_worker.cpu.intrinsics import compiled, float32s, float_of_bits, narrow, summing, uint16s, widen

SILU, GELU_TANH, SWIGLU_OAI = range(3)

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts, the first of which has few digits: n * _LN2_HIGH is exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_SWIGLU_ALPHA, _SWIGLU_LIMIT = np.float32(1.702), np.float32(7.0)
_GELU_SCALE, _GELU_CUBE = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = np.float32(-87), np.float32(88)
_ZERO, _ONE, _TWO, _HALF, _INFINITY = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5), np.float32(np.inf)


@compiled
def exp(x: float) -> float:
    """e^x to about one unit in the last place (Cephes' polynomial); no branches, so that loops become vectors.

    0 below -87, infinity above 88; NaN stays NaN.
    """
    bounded = min(max(x, _LOWEST_EXPONENT), _HIGHEST_EXPONENT)
    n = np.floor(bounded * _LOG2_E + _HALF)
    r = bounded - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))
    inside = (p * r * r + r + _ONE) * power
    beyond = _ZERO if x < _LOWEST_EXPONENT else _INFINITY if x > _HIGHEST_EXPONENT else x
    return inside if _LOWEST_EXPONENT <= x <= _HIGHEST_EXPONENT else beyond


@compiled
def tanh(x: float) -> float:
    return _ONE - _TWO / (exp(_TWO * x) + _ONE)


@compiled
def gate_rows(gate_up: int, out: int, kind: int, size: int, first: int, last: int) -> None:
    """act(gate) * up of rows first..last: gate_up [num_rows, 2 * size], out [num_rows, size]."""
    for row in range(first, last):
        gates = uint16s(gate_up + row * size * 4)
        ups = uint16s(gate_up + row * size * 4 + size * 2)
        target = uint16s(out + row * size * 2)
        if kind == SILU:
            for i in range(size):
                gate = widen(gates[i])
                target[i] = narrow(gate / (_ONE + exp(-gate)) * widen(ups[i]))
        elif kind == GELU_TANH:
            for i in range(size):
                gate = widen(gates[i])
                inner = _GELU_SCALE * (gate + _GELU_CUBE * gate * gate * gate)
                # (1 + tanh x) / 2 as one quotient: the sum would cancel below zero.
                target[i] = narrow(gate / (_ONE + exp(-_TWO * inner)) * widen(ups[i]))
        else:
            for i in range(size):
                gate = min(widen(gates[i]), _SWIGLU_LIMIT)
                up = min(max(widen(ups[i]), -_SWIGLU_LIMIT), _SWIGLU_LIMIT)
                target[i] = narrow((up + _ONE) * gate / (_ONE + exp(-gate * _SWIGLU_ALPHA)))


@summing
def _add_row(x: int, residual: int, size: int) -> None:
    added = uint16s(x)
    sums = uint16s(residual)
    for i in range(size):
        sums[i] = narrow(widen(sums[i]) + widen(added[i]))


@summing
def _mean_square(values: int, size: int, mean: float) -> float:
    """Of the distances from `mean`."""
    bits = uint16s(values)
    total = np.float32(0)
    for i in range(size):
        distance = widen(bits[i]) - mean
        total += distance * distance
    return total / np.float32(size)


@summing
def _mean(values: int, size: int) -> float:
    bits = uint16s(values)
    total = np.float32(0)
    for i in range(size):
        total += widen(bits[i])
    return total / np.float32(size)


@compiled
def norm_rows(
    x: int,
    residual: int,
    residual_stride: int,
    out: int,
    weight: int,
    bias: int,
    eps: float,
    offset: float,
    centred: int,
    size: int,
    first: int,
    last: int,
) -> None:
    """residual += x (0: nothing) and its RMSNorm (LayerNorm if `centred`) of rows first..last; `out` is dense."""
    weights = uint16s(weight)
    biases = uint16s(bias)
    for row in range(first, last):
        place = residual + row * residual_stride * 2
        if x != 0:
            _add_row(x + row * size * 2, place, size)
        mean = _mean(place, size) if centred else np.float32(0)
        scale = _ONE / np.sqrt(_mean_square(place, size, mean) + eps)
        values = uint16s(place)
        target = uint16s(out + row * size * 2)
        if bias != 0:
            for i in range(size):
                normed = (widen(values[i]) - mean) * scale * (widen(weights[i]) + offset)
                target[i] = narrow(normed + widen(biases[i]))
        else:
            for i in range(size):
                target[i] = narrow((widen(values[i]) - mean) * scale * (widen(weights[i]) + offset))


@summing
def load_head(source: int, target: int, head_dim: int, norm_weight: int, eps: float, offset: float) -> None:
    """One head's query or key as float32, after its RMSNorm if norm_weight is not 0."""
    bits = uint16s(source)
    values = float32s(target)
    for i in range(head_dim):
        values[i] = widen(bits[i])
    if norm_weight != 0:
        weights = uint16s(norm_weight)
        scale = _ONE / np.sqrt(_mean_square(source, head_dim, np.float32(0)) + eps)
        for i in range(head_dim):
            values[i] = values[i] * scale * (widen(weights[i]) + offset)


@compiled
def rotate_head(head: int, cos: int, sin: int, num_pairs: int, interleaved: int) -> None:
    """Rotate the first 2 * num_pairs numbers of a float32 head; cos and sin are those of its position."""
    values = float32s(head)
    cosines = float32s(cos)
    sines = float32s(sin)
    step = 2 if interleaved else 1
    other = 1 if interleaved else num_pairs
    for i in range(num_pairs):
        a = values[i * step]
        b = values[i * step + other]
        values[i * step] = a * cosines[i] - b * sines[i]
        values[i * step + other] = b * cosines[i] + a * sines[i]
