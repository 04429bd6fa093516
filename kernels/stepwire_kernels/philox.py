"""Counter-based random numbers of the sampler: one uniform per (seed, sequence index, position, token id).

Philox4x32-10 with key (seed low, seed high) and counter (block counter, position, sequence index, 0) gives four words.
Token t of the vocabulary uses word (t % 4096) // 1024 of block counter (t // 4096) * 1024 + t % 1024, so that four
contiguous stretches of 1024 tokens share one evaluation.

    u = (word + 0.5) / 2^32,   E = -log(1 - u) (exponential),   gumbel = -log(E)

E is computed without cancellation for small u: the tokens that win have small E. Its error is 5e-6 of it at most, where
the series ends.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda.libdevice import fast_logf

LANE_TOKENS = 1024
TILE_TOKENS = 4 * LANE_TOKENS
# The interpreter knows nothing of a device's own functions.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _quick_log(x):
    """log(x) by the device's base-2 logarithm: one instruction instead of twenty, right to 2^-22."""
    if INTERPRETED:
        return tl.log(x)
    return fast_logf(x)


@triton.jit
def gumbel_from_word(word):
    """Standard Gumbel noise from one random 32-bit word."""
    u = (word.to(tl.uint32).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))
    exponential = tl.where(u < 0.04, series, -_quick_log(tl.maximum(1.0 - u, 1e-10)))
    return -_quick_log(exponential)


@triton.jit
def random_words(seed_low, seed_high, sequence_index, position, counter):
    """The four Philox words of each block counter."""
    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True).to(
        tl.uint64
    )
    zero = counter * 0
    return tl.philox(seed, counter, zero + position, zero + sequence_index, zero)


@triton.jit
def gumbel_of_tokens(seed_low, seed_high, sequence_index, position, tokens):
    """Gumbel noise of arbitrary token ids (an evaluation each; tiles share theirs, see the sampler)."""
    counter = (tokens // 4096) * 1024 + tokens % 1024
    lane = (tokens % 4096) // 1024
    w0, w1, w2, w3 = random_words(seed_low, seed_high, sequence_index, position, counter)
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return gumbel_from_word(word)
