"""The sampler's first kernel: adjusted logits, and each split's best score (`sampler.py` has the formula)."""

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import release_downstream, wait_upstream
from stepwire_kernels.philox import gumbel_from_word, random_words


@triton.jit
def _float_parameter(parameters, INDEX: tl.constexpr):
    return tl.load(parameters + INDEX).to(tl.float32, bitcast=True)


@triton.jit
def row_filters(parameters, vocab_size):
    """(temperature, top_k, top_p, min_p, whether any of the last three restricts the row)."""
    temperature = _float_parameter(parameters, 0)
    top_p = _float_parameter(parameters, 1)
    min_p = _float_parameter(parameters, 2)
    top_k = tl.load(parameters + 6)
    limits_k = (top_k > 0) & (top_k < vocab_size)
    restricts = (temperature > 0.0) & (limits_k | (top_p < 1.0) | (min_p > 0.0))
    return temperature, top_k, top_p, min_p, restricts


@triton.jit
def _adjust(
    raw,
    tokens,
    in_vocab,
    parameters,
    biases,
    counts,
    mask_words,
    mask_row,
    MAX_BIASES: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
):
    """Bias, grammar mask and penalties of one stretch of a row's logits."""
    z = raw
    num_biases = tl.load(parameters + 10)
    for index in range(0, num_biases):
        token = tl.load(biases + index)
        value = tl.load(biases + MAX_BIASES + index).to(tl.float32, bitcast=True)
        z = tl.where(tokens == token, z + value, z)
    if HAS_MASKS:  # noqa: SIM102  (a compile-time condition, then a run-time one)
        if mask_row >= 0:
            words = tl.load(mask_words + tokens // 32, mask=in_vocab, other=0)
            z = tl.where(((words >> (tokens % 32)) & 1) != 0, z, float("-inf"))
    if HAS_COUNTS:
        repetition = _float_parameter(parameters, 3)
        presence = _float_parameter(parameters, 4)
        frequency = _float_parameter(parameters, 5)
        if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
            word = tl.load(counts + tokens, mask=in_vocab, other=0)
            output_count = word & 0x7FFFFFFF
            z = tl.where(word != 0, tl.where(z > 0.0, z / repetition, z * repetition), z)
            z -= frequency * output_count.to(tl.float32) + tl.where(output_count > 0, presence, 0.0)
    return z


@triton.jit
def _load_raw(row_logits, tokens, vocab_size):
    """Logits in float32 with NaN as -inf, and which were NaN."""
    raw = tl.load(row_logits + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
    is_nan = raw != raw
    return tl.where(is_nan, float("-inf"), raw), is_nan.to(tl.float32)


@triton.jit
def sampler_score_kernel(
    logits_ptr,
    run_rows_ptr,
    positions_ptr,
    parameters_ptr,
    biases_ptr,
    counts_ptr,
    masks_ptr,
    mask_rows_ptr,
    adjusted_ptr,
    partial_ptr,
    partial_ids_ptr,
    logits_stride,
    mask_stride,
    vocab_size,
    MAX_BIASES: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    LANE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    split = tl.program_id(0)
    num_splits = tl.num_programs(0)
    run = tl.program_id(1).to(tl.int64)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    row = tl.load(run_rows_ptr + run).to(tl.int64)
    position = tl.load(positions_ptr + run)
    parameters = parameters_ptr + row * 16
    temperature, _, _, _, restricts = row_filters(parameters, vocab_size)
    inverse_temperature = 1.0 / tl.where(temperature > 0.0, temperature, 1.0)
    random = (temperature > 0.0) & (restricts == 0)
    mask_row = -1
    if HAS_MASKS:
        mask_row = tl.load(mask_rows_ptr + run)
    mask_words = masks_ptr + tl.maximum(mask_row, 0).to(tl.int64) * mask_stride
    offsets = tl.arange(0, LANE)
    w0 = tl.zeros([LANE], dtype=tl.uint32)
    w1 = w0
    w2 = w0
    w3 = w0
    if random:
        w0, w1, w2, w3 = random_words(
            tl.load(parameters + 7), tl.load(parameters + 8), tl.load(parameters + 9), position, split * LANE + offsets
        )
    first = split * (4 * LANE)
    row_logits = logits_ptr + run * logits_stride
    raw0, nan0 = _load_raw(row_logits, first + offsets, vocab_size)
    raw1, nan1 = _load_raw(row_logits, first + LANE + offsets, vocab_size)
    raw2, nan2 = _load_raw(row_logits, first + 2 * LANE + offsets, vocab_size)
    raw3, nan3 = _load_raw(row_logits, first + 3 * LANE + offsets, vocab_size)
    num_nan = tl.sum(nan0 + nan1 + nan2 + nan3, axis=0)
    split_max = tl.max(tl.maximum(tl.maximum(raw0, raw1), tl.maximum(raw2, raw3)), axis=0)
    # All -inf: nothing is summed, and inf - inf must not enter.
    shift = tl.where(split_max == float("-inf"), 0.0, split_max)
    exps = tl.exp(raw0 - shift) + tl.exp(raw1 - shift) + tl.exp(raw2 - shift) + tl.exp(raw3 - shift)
    split_sum = tl.sum(exps, axis=0)
    best = tl.full([LANE], float("-inf"), dtype=tl.float32)
    best_id = tl.full([LANE], 0x7FFFFFFF, dtype=tl.int32)
    for lane in tl.static_range(4):
        if lane == 0:
            word = w0
            raw = raw0
        elif lane == 1:
            word = w1
            raw = raw1
        elif lane == 2:
            word = w2
            raw = raw2
        else:
            word = w3
            raw = raw3
        tokens = first + lane * LANE + offsets
        in_vocab = tokens < vocab_size
        z = _adjust(
            raw,
            tokens,
            in_vocab,
            parameters,
            biases_ptr + row * (2 * MAX_BIASES),
            counts_ptr + row * vocab_size,
            mask_words,
            mask_row,
            MAX_BIASES,
            HAS_MASKS,
            HAS_COUNTS,
        )
        t = z * inverse_temperature
        if restricts:
            tl.store(adjusted_ptr + run * vocab_size + tokens, t, mask=in_vocab)
        score = t
        if random:
            score = t + gumbel_from_word(word)
        better = score > best
        best = tl.where(better, score, best)
        best_id = tl.where(better, tokens, best_id)
    top = tl.max(best, axis=0)
    top_id = tl.min(tl.where(best == top, best_id, 0x7FFFFFFF), axis=0)
    at = run * num_splits + split
    tl.store(partial_ptr + at * 4, top)
    tl.store(partial_ptr + at * 4 + 1, split_max)
    tl.store(partial_ptr + at * 4 + 2, split_sum)
    tl.store(partial_ptr + at * 4 + 3, num_nan)
    tl.store(partial_ids_ptr + at, top_id)
