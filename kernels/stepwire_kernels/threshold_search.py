"""Device functions that find, without sorting, the value above which a row's tokens are kept.

Floats are compared as order-preserving int32 keys, so that a search ends at an exact value. The searched threshold is
the largest key t for which weight(keys >= t) >= target, where a token weighs 1 (top-k: target k) or its probability
(top-p: target p * Z). Ties at the threshold are all kept.

Fast road, parallel over stretches of a row: `weigh_stretch` weighs one at eight pivots a fixed distance below the
row's maximum; `select_interval` adds them up and picks the interval that holds the threshold; `collect_stretch` copies
the tokens from its lower end on, if there are at most CAPACITY; `search_registers` ends the search among them.

Slow road, one program a row, for flat distributions that keep more than CAPACITY tokens: `narrow_interval` cuts the
interval into four with each pass over the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

CAPACITY = 4096
LOWEST_KEY = -2139095041  # key of -inf
PASS_TILE = 4096
NUM_PIVOTS = 8
WEIGHTS_WIDTH = 2 * NUM_PIVOTS  # floats a stretch: the pivots' counts, then their masses
STRETCH_TOKENS = 4 * PASS_TILE
WEIGH_WIDTH = 512


@triton.jit
def float_to_key(value):
    """Order-preserving int32 of a float32 (-0.0 counts as 0.0)."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_to_float(key):
    """Inverse of `float_to_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def middle_key(low, high, quarter: tl.constexpr):
    """low + (high - low) * quarter / 4, rounded up so that it exceeds low where the interval allows."""
    span = high.to(tl.int64) - low.to(tl.int64)
    return (low.to(tl.int64) + (span * quarter + 3) // 4).to(tl.int32)


@triton.jit
def weigh_row(values_ptr, vocab_size, top, p0, p1, p2, p3, TILE: tl.constexpr):
    """Counts and masses (relative to exp(top)) of the tokens with key >= each of four pivots."""
    offsets = tl.arange(0, TILE)
    count0 = tl.zeros([TILE], dtype=tl.float32)
    count1 = tl.zeros([TILE], dtype=tl.float32)
    count2 = tl.zeros([TILE], dtype=tl.float32)
    count3 = tl.zeros([TILE], dtype=tl.float32)
    mass0 = tl.zeros([TILE], dtype=tl.float32)
    mass1 = tl.zeros([TILE], dtype=tl.float32)
    mass2 = tl.zeros([TILE], dtype=tl.float32)
    mass3 = tl.zeros([TILE], dtype=tl.float32)
    for base in range(0, vocab_size, TILE):
        at = base + offsets
        value = tl.load(values_ptr + at, mask=at < vocab_size, other=float("-inf")).to(tl.float32)
        key = float_to_key(value)
        inside = at < vocab_size
        mass = tl.exp(value - top)
        count0 += tl.where(inside & (key >= p0), 1.0, 0.0)
        count1 += tl.where(inside & (key >= p1), 1.0, 0.0)
        count2 += tl.where(inside & (key >= p2), 1.0, 0.0)
        count3 += tl.where(inside & (key >= p3), 1.0, 0.0)
        mass0 += tl.where(key >= p0, mass, 0.0)
        mass1 += tl.where(key >= p1, mass, 0.0)
        mass2 += tl.where(key >= p2, mass, 0.0)
        mass3 += tl.where(key >= p3, mass, 0.0)
    return (
        tl.sum(count0),
        tl.sum(count1),
        tl.sum(count2),
        tl.sum(count3),
        tl.sum(mass0),
        tl.sum(mass1),
        tl.sum(mass2),
        tl.sum(mass3),
    )


@triton.jit
def narrow_interval(
    values_ptr,
    vocab_size,
    top,
    low,
    high,
    amount,
    by_mass,
    TILE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Shrink [low, high] around the threshold until it is one key or at most LIMIT tokens are at or above `low`.

    amount: k, or the fraction p of the mass at or above the first `low`. Returns (low, high, tokens at or above low,
    target weight).
    """
    # The first cuts are by value: what is kept lies mostly within a few units below the maximum.
    p1 = tl.minimum(tl.maximum(float_to_key(top - 12.0), low), high)
    p2 = tl.minimum(tl.maximum(float_to_key(top - 6.0), low), high)
    p3 = tl.minimum(tl.maximum(float_to_key(top - 2.5), low), high)
    count = 0.0
    target = 0.0
    num_passes = 0
    searching = low <= high
    while searching:
        c0, c1, c2, c3, m0, m1, m2, m3 = weigh_row(values_ptr, vocab_size, top, low, p1, p2, p3, TILE)
        if num_passes == 0:
            target = tl.where(by_mass, amount * m0, amount)
        num_passes += 1
        w0 = tl.where(by_mass, m0, c0)
        w1 = tl.where(by_mass, m1, c1)
        w2 = tl.where(by_mass, m2, c2)
        w3 = tl.where(by_mass, m3, c3)
        new_low = tl.where(w3 >= target, p3, tl.where(w2 >= target, p2, tl.where(w1 >= target, p1, low)))
        count = tl.where(w3 >= target, c3, tl.where(w2 >= target, c2, tl.where(w1 >= target, c1, c0)))
        # A pivot equal to `low` holds the same tokens and so cannot fail where `low` does not.
        above = tl.where(w3 >= target, high, tl.where(w2 >= target, p3 - 1, tl.where(w1 >= target, p2 - 1, p1 - 1)))
        low = new_low
        high = tl.maximum(above, low)
        p1 = middle_key(low, high, 1)
        p2 = middle_key(low, high, 2)
        p3 = middle_key(low, high, 3)
        # The last quarter must be able to reach `high` itself, or an interval of two keys would never close.
        p3 = tl.where(high.to(tl.int64) - low.to(tl.int64) < 4, high, p3)
        # Where even `low` weighs too little, everything from `low` on is kept and there is nothing to search.
        searching = (count > LIMIT) & (low < high) & (w0 >= target)
    return low, high, count, target


@triton.jit
def copy_candidates(
    values_ptr,
    vocab_size,
    low,
    high,
    found,
    scratch_values_ptr,
    scratch_ids_ptr,
    TILE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Append the tokens with low <= key <= high, in token order, to the scratch row; returns how many it now holds."""
    offsets = tl.arange(0, TILE)
    for base in range(0, vocab_size, TILE):
        at = base + offsets
        value = tl.load(values_ptr + at, mask=at < vocab_size, other=float("-inf")).to(tl.float32)
        key = float_to_key(value)
        wanted = ((key >= low) & (key <= high) & (at < vocab_size)).to(tl.int32)
        place = found + tl.cumsum(wanted, axis=0) - wanted
        fits = (wanted != 0) & (place < LIMIT)
        tl.store(scratch_values_ptr + place, value, mask=fits)
        tl.store(scratch_ids_ptr + place, at, mask=fits)
        found += tl.sum(wanted, axis=0)
    # Other threads read the scratch row next.
    tl.debug_barrier()
    return tl.minimum(found, LIMIT)


@triton.jit
def search_registers(keys, weights, low, high, target):
    """The threshold inside [low, high] for candidates held in registers (weights 0 where there is none)."""
    while low < high:
        middle = middle_key(low, high, 2)
        enough = tl.sum(tl.where(keys >= middle, weights, 0.0)) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def pivot_keys(top, low, high):
    """Eight rising keys: `low`, then 16, 11.3, 8, 5.7, 4, 2.8 and 2 below the maximum."""
    index = tl.arange(0, 8)
    keys = float_to_key(top - tl.exp2(4.5 - 0.5 * index.to(tl.float32)))
    return tl.where(index == 0, low, tl.minimum(tl.maximum(keys, low), high))


@triton.jit
def weigh_stretch(values_ptr, first, last, vocab_size, top, low, high, weights_ptr, WIDTH: tl.constexpr):
    """Store the counts and masses of tokens first .. last - 1 at every pivot."""
    # Two dimensions from the load on: each thread then holds its tokens against all pivots, and nothing is exchanged
    # before the one reduction at the end.
    pivots = pivot_keys(top, low, high)[:, None]
    offsets = tl.arange(0, WIDTH)[None, :]
    counts = tl.zeros([8, WIDTH], dtype=tl.float32)
    masses = tl.zeros([8, WIDTH], dtype=tl.float32)
    for base in range(first, last, WIDTH):
        at = base + offsets
        value = tl.load(values_ptr + at, mask=at < vocab_size, other=float("-inf"))  # [1, WIDTH]
        # Past the vocabulary: below every pivot, whose lowest is above the key of -inf.
        above = float_to_key(value) >= pivots  # [8, WIDTH]
        counts += above.to(tl.float32)
        masses += tl.where(above, tl.exp(value - top), 0.0)
    index = tl.arange(0, 8)
    tl.store(weights_ptr + index, tl.sum(counts, axis=1))
    tl.store(weights_ptr + 8 + index, tl.sum(masses, axis=1))


@triton.jit
def select_interval(
    weights_ptr, stretch, num_stretches, top, low, high, amount, by_mass, BLOCK_STRETCHES: tl.constexpr
):
    """The interval between pivots that holds the threshold.

    Returns (low, high, tokens at or above low, target weight, tokens at or above low in the stretches before this one).
    """
    stretches = tl.arange(0, BLOCK_STRETCHES)
    index = tl.arange(0, 8)
    in_row = (stretches < num_stretches)[:, None]
    cells = weights_ptr + stretches[:, None] * 16 + index[None, :]
    stretch_counts = tl.load(cells, mask=in_row, other=0.0)  # [BLOCK_STRETCHES, 8]
    counts = tl.sum(stretch_counts, axis=0)
    masses = tl.sum(tl.load(cells + 8, mask=in_row, other=0.0), axis=0)
    pivots = pivot_keys(top, low, high)
    target = tl.where(by_mass, amount * tl.sum(tl.where(index == 0, masses, 0.0), axis=0), amount)
    # Weights fall as pivots rise: the pivots that reach the target are the first ones.
    reaches = tl.where(by_mass, masses, counts) >= target
    num_reaching = tl.sum(reaches.to(tl.int32), axis=0)
    # Where not even `low` reaches, everything is kept and there is nothing to search.
    chosen = tl.maximum(num_reaching - 1, 0)
    new_low = tl.sum(tl.where(index == chosen, pivots, 0), axis=0)
    new_high = tl.min(tl.where(reaches, high, pivots - 1), axis=0)
    new_high = tl.maximum(tl.where(num_reaching == 0, new_low, new_high), new_low)
    count = tl.sum(tl.where(index == chosen, counts, 0.0), axis=0)
    earlier = (stretches < stretch)[:, None] & (index == chosen)[None, :]
    before = tl.sum(tl.sum(tl.where(earlier, stretch_counts, 0.0), axis=1), axis=0)
    return new_low, new_high, count, target, before


@triton.jit
def collect_stretch(
    values_ptr, first, last, vocab_size, low, high, found, scratch_values_ptr, scratch_ids_ptr, TILE: tl.constexpr
):
    """Copy the tokens first .. last - 1 with low <= key <= high, in order, from the scratch row's place `found` on.

    The caller has counted them: they fit.
    """
    for base in range(first, last, TILE):
        at = base + tl.arange(0, TILE)
        inside = at < vocab_size
        value = tl.load(values_ptr + at, mask=inside, other=float("-inf"))
        key = float_to_key(value)
        wanted = (inside & (key >= low) & (key <= high)).to(tl.int32)
        num_wanted = tl.sum(wanted, axis=0)
        if num_wanted > 0:
            place = found + tl.cumsum(wanted, axis=0) - wanted
            tl.store(scratch_values_ptr + place, value, mask=wanted != 0)
            tl.store(scratch_ids_ptr + place, at, mask=wanted != 0)
        found += num_wanted
