"""The sampler's rows that filter: their candidates, and the token among them (`sampler.py` has the formula)."""

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import release_downstream, wait_upstream
from stepwire_kernels.philox import gumbel_of_tokens
from stepwire_kernels.sampler_scores import row_filters
from stepwire_kernels.threshold_search import (
    collect_stretch,
    copy_candidates,
    float_to_key,
    narrow_interval,
    search_registers,
    select_interval,
    weigh_stretch,
)


@triton.jit
def _best_of_row(
    values_ptr,
    vocab_size,
    threshold,
    seed_low,
    seed_high,
    sequence_index,
    position,
    LANE: tl.constexpr,
):
    """Gumbel-max over the tokens at or above the threshold, reading the whole row."""
    offsets = tl.arange(0, LANE)
    best = tl.full([LANE], float("-inf"), dtype=tl.float32)
    best_id = tl.full([LANE], 0x7FFFFFFF, dtype=tl.int32)
    for base in range(0, vocab_size, LANE):
        tokens = base + offsets
        value = tl.load(values_ptr + tokens, mask=tokens < vocab_size, other=float("-inf"))
        score = value + gumbel_of_tokens(seed_low, seed_high, sequence_index, position, tokens)
        score = tl.where(float_to_key(value) >= threshold, score, float("-inf"))
        better = score > best
        best = tl.where(better, score, best)
        best_id = tl.where(better, tokens, best_id)
    top = tl.max(best, axis=0)
    return tl.min(tl.where(best == top, best_id, 0x7FFFFFFF), axis=0)


@triton.jit
def _search_bounds(parameters, vocab_size, top, LOWEST: tl.constexpr):
    """(low, high, amount, by_mass, limits_k, limits_p, top_p) of a row that filters; `top` is its greatest t."""
    _, top_k, top_p, min_p, _ = row_filters(parameters, vocab_size)
    high = float_to_key(top)
    # The smallest finite key: masked tokens (-inf) are never candidates.
    low = tl.full([], LOWEST, tl.int32) + 1
    if min_p > 0.0:
        low = tl.maximum(low, tl.minimum(float_to_key(top + tl.log(min_p)), high))
    limits_k = (top_k > 0) & (top_k < vocab_size)
    limits_p = top_p < 1.0
    # Neither (min-p alone): more than all the mass, which keeps what min-p kept.
    amount = tl.where(limits_k, top_k.to(tl.float32), tl.where(limits_p, top_p, 2.0))
    return low, high, amount, limits_k == 0, limits_k, limits_p, top_p


@triton.jit
def _row_top(partial_ptr, run, num_splits, BLOCK_SPLITS: tl.constexpr):
    """The greatest score of a row over its splits (t itself, for rows that filter)."""
    splits = tl.arange(0, BLOCK_SPLITS)
    best = tl.load(partial_ptr + (run * num_splits + splits) * 4, mask=splits < num_splits, other=float("-inf"))
    return tl.max(best, axis=0)


@triton.jit
def sampler_candidates_kernel(
    run_rows_ptr,
    parameters_ptr,
    adjusted_ptr,
    partial_ptr,
    weights_ptr,
    candidate_values_ptr,
    candidate_ids_ptr,
    vocab_size,
    num_splits,
    COLLECTS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_STRETCHES: tl.constexpr,
    STRETCH: tl.constexpr,
    TILE: tl.constexpr,
    LIMIT: tl.constexpr,
    LOWEST: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """For rows that filter: weigh each stretch at the pivots (first launch), then copy the candidates (second)."""
    stretch = tl.program_id(0)
    num_stretches = tl.num_programs(0)
    run = tl.program_id(1).to(tl.int64)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    row = tl.load(run_rows_ptr + run).to(tl.int64)
    parameters = parameters_ptr + row * 16
    _, _, _, _, restricts = row_filters(parameters, vocab_size)
    if restricts:
        top = _row_top(partial_ptr, run, num_splits, BLOCK_SPLITS)
        low, high, amount, by_mass, _, _, _ = _search_bounds(parameters, vocab_size, top, LOWEST)
        values = adjusted_ptr + run * vocab_size
        weights = weights_ptr + run * num_stretches * 16
        first = stretch * STRETCH
        last = tl.minimum(first + STRETCH, vocab_size)
        if COLLECTS:
            low, _, count, _, before = select_interval(
                weights, stretch, num_stretches, top, low, high, amount, by_mass, BLOCK_STRETCHES
            )
            if count <= LIMIT:
                collect_stretch(
                    values,
                    first,
                    last,
                    vocab_size,
                    low,
                    high,
                    before.to(tl.int32),
                    candidate_values_ptr + run * LIMIT,
                    candidate_ids_ptr + run * LIMIT,
                    TILE,
                )
        else:
            weigh_stretch(values, first, last, vocab_size, top, low, high, weights + stretch * 16, TILE)


@triton.jit
def filtered_token(
    values_ptr,
    weights_ptr,
    candidate_values_ptr,
    candidate_ids_ptr,
    parameters,
    vocab_size,
    num_stretches,
    top,
    position,
    BLOCK_STRETCHES: tl.constexpr,
    TILE: tl.constexpr,
    LIMIT: tl.constexpr,
    LANE: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """Token of a row that filters; `top` is the maximum of its t."""
    seed_low = tl.load(parameters + 7)
    seed_high = tl.load(parameters + 8)
    sequence_index = tl.load(parameters + 9)
    low, high, amount, by_mass, limits_k, limits_p, top_p = _search_bounds(parameters, vocab_size, top, LOWEST)
    first_low = low
    low, high_left, count, target, _ = select_interval(
        weights_ptr, 0, num_stretches, top, low, high, amount, by_mass, BLOCK_STRETCHES
    )
    if count > LIMIT:
        # The pivots were too coarse, or the distribution is flat: narrow by passes over the row.
        low, high_left, count, target = narrow_interval(
            values_ptr, vocab_size, top, first_low, high, amount, by_mass, TILE, LIMIT
        )
        if (count > LIMIT) & limits_k & limits_p:
            # `low` is the exact k-th value with more ties than fit; top-p starts over above it.
            low, high_left, count, target = narrow_interval(
                values_ptr, vocab_size, top, low, high, top_p, limits_p, TILE, LIMIT
            )
            limits_k = limits_k & (count < 0.0)
        if count <= LIMIT:
            none_yet = tl.full([], 0, tl.int32)
            copy_candidates(
                values_ptr, vocab_size, low, high, none_yet, candidate_values_ptr, candidate_ids_ptr, TILE, LIMIT
            )
    token = tl.full([], 0, tl.int32)
    if count <= LIMIT:
        offsets = tl.arange(0, LIMIT)
        present = offsets < count.to(tl.int32)
        values = tl.load(candidate_values_ptr + offsets, mask=present, other=float("-inf"))
        ids = tl.load(candidate_ids_ptr + offsets, mask=present, other=0)
        keys = float_to_key(values)
        masses = tl.exp(values - top)
        if limits_k:
            low = search_registers(keys, tl.where(present, 1.0, 0.0), low, high_left, target)
            if limits_p:
                mass = tl.sum(tl.where(keys >= low, masses, 0.0))
                low = search_registers(keys, masses, low, high, top_p * mass)
        else:
            if limits_p:
                low = search_registers(keys, masses, low, high_left, target)
        noise = gumbel_of_tokens(seed_low, seed_high, sequence_index, position, ids)
        score = tl.where(present & (keys >= low), values + noise, float("-inf"))
        best = tl.max(score, axis=0)
        token = tl.min(tl.where(score == best, ids, 0x7FFFFFFF), axis=0)
    else:
        token = _best_of_row(values_ptr, vocab_size, low, seed_low, seed_high, sequence_index, position, LANE)
    return token
