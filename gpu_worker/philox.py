"""The sampler's random numbers: Gumbel noise that depends on (seed, sequence index, position, token id) and nothing
else.

Philox4x32-10 with the 64-bit seed as key and counter (block counter, position, sequence index, 0) gives four 32-bit
words. Token t takes word (t % 4096) // 1024 of block counter (t // 4096) * 1024 + t % 1024: four contiguous stretches
of 1024 tokens share one evaluation. The kernels draw the same stream (`stepwire_kernels/philox.py`), so that a
sequence goes on as it would have, whichever device it moves to.

    u = (word + 0.5) / 2^32,   E = -log(1 - u),   gumbel = -log(E)

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

UInt32Array = npt.NDArray[np.uint32]
FloatArray = npt.NDArray[np.float32]

LANE_TOKENS = 1024
TILE_TOKENS = 4 * LANE_TOKENS
NUM_ROUNDS = 10

_MULTIPLIER0 = np.uint64(0xD2511F53)
_MULTIPLIER1 = np.uint64(0xCD9E8D57)
_WEYL0 = 0x9E3779B9
_WEYL1 = 0xBB67AE85


def philox4x32(
    seed: int, counter0: UInt32Array, counter1: int, counter2: int, counter3: int = 0
) -> tuple[UInt32Array, UInt32Array, UInt32Array, UInt32Array]:
    """The four words of every block counter in `counter0` [n], the rest of the counter being common."""
    c0 = np.ascontiguousarray(counter0, dtype=np.uint32)
    c1 = np.full_like(c0, counter1 & 0xFFFFFFFF)
    c2 = np.full_like(c0, counter2 & 0xFFFFFFFF)
    c3 = np.full_like(c0, counter3 & 0xFFFFFFFF)
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(NUM_ROUNDS):
        low0, high0 = _multiply(c0, _MULTIPLIER0)
        low1, high1 = _multiply(c2, _MULTIPLIER1)
        c0 = high1 ^ c1
        c0 ^= np.uint32(key0)
        c2 = high0 ^ c3
        c2 ^= np.uint32(key1)
        c1, c3 = low1, low0
        key0, key1 = (key0 + _WEYL0) & 0xFFFFFFFF, (key1 + _WEYL1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _multiply(values: UInt32Array, multiplier: np.uint64) -> tuple[UInt32Array, UInt32Array]:
    """The low and high half of each 64-bit product."""
    product = np.multiply(values, multiplier, dtype=np.uint64)
    low = product.astype(np.uint32)
    product >>= np.uint64(32)
    return low, product.astype(np.uint32)


def _gumbel(words: UInt32Array) -> FloatArray:
    """Standard Gumbel noise from random words."""
    u = words.astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(2.0**-32)
    # The largest words round to u = 1; the tokens that win have small u, where log1p loses nothing.
    np.minimum(u, np.float32(1 - 2.0**-24), out=u)
    np.negative(u, out=u)
    exponential = np.log1p(u)
    np.negative(exponential, out=exponential)
    noise = np.log(exponential)
    return np.negative(noise, out=noise)


@lru_cache(maxsize=4)
def _all_counters(vocab_size: int) -> UInt32Array:
    return np.arange(-(-vocab_size // TILE_TOKENS) * LANE_TOKENS, dtype=np.uint32)


def gumbel_noise_all(seed: int, sequence_index: int, position: int, vocab_size: int) -> FloatArray:
    """Noise of every token: float32 [vocab_size]."""
    words = philox4x32(seed, _all_counters(vocab_size), position, sequence_index)
    tiles = np.stack([lane.reshape(-1, LANE_TOKENS) for lane in words], axis=1)  # [num_tiles, 4, LANE_TOKENS]
    return _gumbel(tiles.reshape(-1)[:vocab_size])


def gumbel_noise(seed: int, sequence_index: int, position: int, token_ids: npt.NDArray[np.int64]) -> FloatArray:
    """Noise of some tokens, the same values as `gumbel_noise_all` has for them: float32 [num_tokens]."""
    counters = (token_ids // TILE_TOKENS * LANE_TOKENS + token_ids % LANE_TOKENS).astype(np.uint32)
    lanes = np.stack(philox4x32(seed, counters, position, sequence_index))  # [4, num_tokens]
    return _gumbel(lanes[token_ids % TILE_TOKENS // LANE_TOKENS, np.arange(len(token_ids))])
