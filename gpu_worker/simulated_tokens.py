"""Which tokens the simulated runner draws: a documented function, so that a test can predict every one of them.

With `h = draw_hash(seed, sequence_index, position)`, where `position` is the index of the token in its sequence:

- If there is an end-of-sequence token and `mix64(h) / 2^64 < eos_probability`, that token is drawn (if it may be).
- Otherwise the token is number `h mod len(candidates)` of the candidates in ascending order. Candidates are all tokens
  of the vocabulary but the end-of-sequence token, which is drawn only as above or where nothing else may be.

Restrictions take candidates away: `allowed_token_ids`, the step's token mask, `suppressed_token_ids` while fewer than
`min_tokens` are generated, and tokens with a negative bias. Of the candidates with a positive bias the most biased one
(the lowest id among equals) is drawn always. Temperature, top-k, top-p, min-p and penalties change nothing.

Logprobs: the token at rank r of the distribution has ln 2 * -(r + 1). The drawn token's rank is `h >> 62`, 0 to 3; the
rank below it belongs to the next higher id, and so on around the vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gpu_worker.runner_api import Float32Array, RowSampling, UInt32Array
from gpu_worker.simulated_oracle import BoolArray, IntArray, UInt64Array, mix64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def draw_hash(
    seeds: npt.NDArray[np.uint64], sequence_indices: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]
) -> UInt64Array:
    """The random number behind each draw; arrays of equal length."""
    keys = mix64(seeds + _GOLDEN * (sequence_indices + np.uint64(1)))
    return mix64(keys + _GOLDEN * (positions + np.uint64(1)))


def prompt_hash(token_ids: UInt32Array, positions: npt.NDArray[np.uint64]) -> UInt64Array:
    """The random number behind the logprobs of prompt tokens; arrays of equal length."""
    return mix64(mix64(token_ids.astype(np.uint64) + _GOLDEN) + _GOLDEN * positions)


def draw_tokens(hashes: UInt64Array, vocab_size: int, eos_token_id: int | None, eos_probability: float) -> UInt32Array:
    """Draws without restrictions, one token a hash."""
    if eos_token_id is None or vocab_size == 1:
        return (hashes % np.uint64(vocab_size)).astype(np.uint32)
    tokens = hashes % np.uint64(vocab_size - 1)
    tokens += tokens >= np.uint64(eos_token_id)
    if eos_probability > 0:
        tokens[_ends(hashes, eos_probability)] = eos_token_id
    return tokens.astype(np.uint32)


def draw_token_among(
    draw: np.uint64, candidates: BoolArray, sampling: RowSampling, eos_token_id: int | None, eos_probability: float
) -> int | None:
    """One draw from `candidates` [vocab_size], which are changed; None where nothing may be drawn."""
    biased = sampling.bias_token_ids[sampling.bias_values > 0]
    candidates[sampling.bias_token_ids[sampling.bias_values < 0]] = False
    biased = biased[candidates[biased]]
    if len(biased):
        values = dict(zip(sampling.bias_token_ids.tolist(), sampling.bias_values.tolist(), strict=True))
        return min(map(int, biased), key=lambda token: (-values[token], token))
    if eos_token_id is not None and candidates[eos_token_id]:
        if eos_probability > 0 and _ends(np.array([draw]), eos_probability)[0]:
            return eos_token_id
        if candidates.sum() > 1:
            candidates[eos_token_id] = False
    token_ids = np.flatnonzero(candidates)
    return int(token_ids[int(draw) % len(token_ids)]) if len(token_ids) else None


def restricted_candidates(sampling: RowSampling, num_generated: int, allowed: BoolArray) -> BoolArray:
    """Of the `allowed` tokens [vocab_size], those that the row's own lists leave."""
    candidates = allowed.copy()
    if len(sampling.allowed_token_ids):
        listed = np.zeros_like(candidates)
        listed[sampling.allowed_token_ids] = True
        candidates &= listed
    if num_generated < sampling.min_tokens:
        candidates[sampling.suppressed_token_ids] = False
    return candidates


def unpack_mask(words: UInt32Array, vocab_size: int) -> BoolArray:
    """Bits of one row's mask as [vocab_size] booleans."""
    return np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")[:vocab_size].astype(np.bool_)


def logprobs_of(
    hashes: UInt64Array, token_ids: UInt32Array, num_top: int, vocab_size: int
) -> tuple[Float32Array, UInt32Array, Float32Array]:
    """Logprobs of drawn tokens [num_tokens]; ids and logprobs of the `num_top` best tokens [num_tokens, num_top]."""
    ranks = np.minimum((hashes >> np.uint64(62)).astype(np.int64), vocab_size - 1)
    logprobs = (-math.log(2) * (ranks + 1)).astype(np.float32)
    columns: IntArray = np.arange(num_top)
    top_token_ids = (token_ids.astype(np.int64)[:, None] - ranks[:, None] + columns) % vocab_size
    top_logprobs = np.broadcast_to(-math.log(2) * (columns + 1), top_token_ids.shape)
    return logprobs, top_token_ids.astype(np.uint32), top_logprobs.astype(np.float32)


def _ends(hashes: UInt64Array, eos_probability: float) -> BoolArray:
    # 53 bits make a float64 exactly.
    return (mix64(hashes) >> np.uint64(11)).astype(np.float64) * 2.0**-53 < eos_probability
