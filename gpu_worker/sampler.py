"""Draws tokens from logits on the host: the CPU runner's sampler, and the reference for the kernels' one.

For a row with raw logits l, in this order (the same as on the GPU, so that both draw the same token):

    z = l + bias
    z = -inf where the token mask, `allowed` or (below min_tokens) `suppressed` forbids the token
    z = z / r if z > 0 else z * r             tokens of prompt or output (repetition penalty r)
    z = z - frequency * count - presence      tokens of the output
    t = (z - max z) / temperature             temperature 0: the token with the largest z, lowest id among equals
    keep t >= log(min_p)                      min-p
    keep t >= the k-th largest kept           top-k, equals of the last one stay
    keep t if the kept mass above it < p      top-p of what is left, equals of the last one stay
    token = argmax of t + gumbel noise        a draw from softmax(t) over the kept tokens

The noise is a function of (seed, sequence index, position, token id) alone, see `philox.py`. Log-probabilities are
those of l.

Sources: Gumbel-max: Maddison et al., "A* Sampling", 2014; top-p: Holtzman et al., 2020; min-p: Nguyen et al., 2024;
repetition penalty: Keskar et al., "CTRL", 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.philox import gumbel_noise, gumbel_noise_all
from gpu_worker.runner_api import RowFaultCode, RowSampling, UInt32Array

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# A first guess at how many of the most likely tokens reach top_p; where they do not, everything is sorted.
TOP_P_GUESS = 1024
# Below this share of the vocabulary, noise is drawn for the kept tokens one by one instead of for all.
SPARSE_SHARE = 0.2


FAULT_MESSAGES = {
    RowFaultCode.NOT_FINITE: "the model's logits are not finite: overflow in this dtype, or damaged weights",
    RowFaultCode.UNSUPPORTED: "no token may be drawn: the token mask, allowed_token_ids and suppressed_token_ids "
    "exclude all",
}
"""Why a row may get no token."""


class RowSampler:
    """One row's sampling parameters and what they need to remember of its tokens."""

    def __init__(
        self, sampling: RowSampling, token_ids: npt.NDArray[np.int32], num_prompt_tokens: int, vocab_size: int
    ) -> None:
        self.sampling = sampling
        self.num_prompt_tokens = num_prompt_tokens
        self.is_greedy = sampling.temperature == 0
        self.has_penalties = (
            sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        )
        self.history = TokenHistory(token_ids, num_prompt_tokens, vocab_size) if self.has_penalties else None
        self.takes_argmax = (
            self.is_greedy
            and not self.has_penalties
            and sampling.num_logprobs is None
            and not len(sampling.bias_token_ids)
            and not len(sampling.allowed_token_ids)
            and not len(sampling.suppressed_token_ids)
        )
        """Whether the token is simply the largest logit (unless the step brings a mask)."""

    def append(self, token_id: int) -> None:
        """A token was drawn and belongs to the row now."""
        if self.history is not None:
            self.history.append(token_id)


class TokenHistory:
    """Which tokens a row holds, and how often each was generated. Costs one entry a distinct token to apply."""

    def __init__(self, token_ids: npt.NDArray[np.int32], num_prompt_tokens: int, vocab_size: int) -> None:
        self._output_counts = np.bincount(token_ids[num_prompt_tokens:], minlength=vocab_size).astype(np.int32)
        self._is_known = np.zeros(vocab_size, dtype=np.bool_)
        distinct = np.unique(token_ids).astype(np.int64)
        self._is_known[distinct] = True
        self._distinct = np.empty(max(64, 2 * len(distinct)), dtype=np.int64)
        self._distinct[: len(distinct)] = distinct
        self._num_distinct = len(distinct)

    def append(self, token_id: int) -> None:
        self._output_counts[token_id] += 1
        if self._is_known[token_id]:
            return
        self._is_known[token_id] = True
        if self._num_distinct == len(self._distinct):
            self._distinct = np.concatenate((self._distinct, np.empty_like(self._distinct)))
        self._distinct[self._num_distinct] = token_id
        self._num_distinct += 1

    def penalise(self, z: FloatArray, sampling: RowSampling) -> None:
        """Apply the three penalties to z [vocab_size] in place."""
        ids = self._distinct[: self._num_distinct]
        values = z[ids]
        repetition = np.float32(sampling.repetition_penalty)
        values = np.where(values > 0, values / repetition, values * repetition)
        counts = self._output_counts[ids]
        values -= np.float32(sampling.frequency_penalty) * counts
        values -= np.float32(sampling.presence_penalty) * (counts > 0)
        z[ids] = values


@dataclass(frozen=True, slots=True)
class SampleFault:
    """Why a row got no token."""

    index: int
    code: RowFaultCode
    message: str


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One token a row; where a row failed its entries mean nothing."""

    token_ids: IntArray  # [num_rows]
    faults: tuple[SampleFault, ...]
    logprobs: FloatArray | None  # [num_rows], NaN where not asked for; None: no row asked
    top_token_ids: UInt32Array | None  # [num_rows, num_top]
    top_logprobs: FloatArray | None  # [num_rows, num_top], most likely first


def sample(
    logits: torch.Tensor,
    rows: Sequence[RowSampler],
    positions: IntArray,
    bitmasks: Sequence[UInt32Array | None] | None = None,
) -> SampledTokens:
    """Draw one token for every row.

    Args:
        logits: [num_rows, vocab_size], any float dtype, any device. rows: whose they are. positions: [num_rows], index
        in its sequence of the token that is drawn. bitmasks: a mask of ceil(vocab_size / 32) words for the rows that
        have one; bit i of word w allows token 32 w + i.
    """
    host_logits = logits.float().cpu()
    values: FloatArray = host_logits.numpy()
    token_ids = values.argmax(axis=-1)
    # numpy's argmax stops at the first NaN, so the value that it picks is finite only if no NaN and no +inf is there.
    finite = np.isfinite(values[np.arange(len(rows)), token_ids])
    faults: list[SampleFault] = []
    logprobs = _LogprobTable.for_rows(rows)
    for index, row in enumerate(rows):
        if not finite[index]:
            faults.append(_fault(index, RowFaultCode.NOT_FINITE))
            continue
        bitmask = bitmasks[index] if bitmasks is not None else None
        if row.takes_argmax and bitmask is None:
            continue
        token_id = _draw(values[index], row, int(positions[index]), bitmask)
        if token_id is None:
            faults.append(_fault(index, RowFaultCode.UNSUPPORTED))
            continue
        token_ids[index] = token_id
        if logprobs is not None and row.sampling.num_logprobs is not None:
            logprobs.fill(index, host_logits[index], token_id, row.sampling.num_logprobs)
    return SampledTokens(
        token_ids=token_ids,
        faults=tuple(faults),
        logprobs=None if logprobs is None else logprobs.sampled,
        top_token_ids=None if logprobs is None else logprobs.top_token_ids,
        top_logprobs=None if logprobs is None else logprobs.top,
    )


def num_top_logprobs(rows: Sequence[RowSampler]) -> int | None:
    """The most alternatives that one of these rows asked for; None: none asked for log-probabilities."""
    return max((row.sampling.num_logprobs for row in rows if row.sampling.num_logprobs is not None), default=None)


def _fault(index: int, code: RowFaultCode) -> SampleFault:
    return SampleFault(index, code, FAULT_MESSAGES[code])


class _LogprobTable:
    """Log-probabilities of a step's rows under the raw distribution."""

    def __init__(self, num_rows: int, num_top: int) -> None:
        self.sampled = np.full(num_rows, np.nan, dtype=np.float32)
        self.top_token_ids = np.zeros((num_rows, num_top), dtype=np.uint32)
        self.top = np.full((num_rows, num_top), -np.inf, dtype=np.float32)

    @classmethod
    def for_rows(cls, rows: Sequence[RowSampler]) -> _LogprobTable | None:
        num_top = num_top_logprobs(rows)
        return None if num_top is None else cls(len(rows), num_top)

    def fill(self, index: int, logits: torch.Tensor, token_id: int, num_top: int) -> None:
        """logits: float32 [vocab_size]."""
        normaliser = torch.logsumexp(logits, dim=0)
        self.sampled[index] = float(logits[token_id] - normaliser)
        num_top = min(num_top, len(logits))
        if num_top:
            best = torch.topk(logits, num_top)
            self.top_token_ids[index, :num_top] = best.indices.numpy()
            self.top[index, :num_top] = (best.values - normaliser).numpy()


def _draw(logits: FloatArray, row: RowSampler, position: int, bitmask: UInt32Array | None) -> int | None:
    """A token id, or None if none is possible. logits [vocab_size] are left as they are."""
    z = adjust_logits(logits, row, position, bitmask)
    best = int(z.argmax())
    if z[best] == -np.inf:
        return None
    if row.is_greedy:
        return best
    sampling = row.sampling
    # Shifted by the maximum first: a tiny temperature must not turn large logits into infinities.
    with np.errstate(over="ignore"):
        t = (z - z[best]) / np.float32(sampling.temperature)
    kept = kept_tokens(t, sampling.min_p, sampling.top_k, sampling.top_p)
    if kept is None:
        noise = gumbel_noise_all(sampling.seed, sampling.sequence_index, position, len(t))
        return int((t + noise).argmax())
    if len(kept) > SPARSE_SHARE * len(t):
        noise = gumbel_noise_all(sampling.seed, sampling.sequence_index, position, len(t))[kept]
    else:
        noise = gumbel_noise(sampling.seed, sampling.sequence_index, position, kept)
    return int(kept[(t[kept] + noise).argmax()])


def adjust_logits(logits: FloatArray, row: RowSampler, position: int, bitmask: UInt32Array | None) -> FloatArray:
    """Bias, masks and penalties applied: a new [vocab_size], or `logits` itself where there are none."""
    sampling = row.sampling
    suppresses = len(sampling.suppressed_token_ids) and position - row.num_prompt_tokens < sampling.min_tokens
    if not (
        row.has_penalties
        or suppresses
        or bitmask is not None
        or len(sampling.bias_token_ids)
        or len(sampling.allowed_token_ids)
    ):
        return logits
    z = logits.copy()
    if len(sampling.bias_token_ids):
        np.add.at(z, sampling.bias_token_ids, sampling.bias_values)
    if len(sampling.allowed_token_ids):
        allowed = z[sampling.allowed_token_ids]
        z.fill(-np.inf)
        z[sampling.allowed_token_ids] = allowed
    if bitmask is not None:
        bits = np.unpackbits(bitmask.view(np.uint8), count=len(z), bitorder="little")
        z[bits == 0] = -np.inf
    if suppresses:
        z[sampling.suppressed_token_ids] = -np.inf
    if row.history is not None:
        row.history.penalise(z, sampling)
    return z


def kept_tokens(t: FloatArray, min_p: float, top_k: int, top_p: float) -> IntArray | None:
    """Ids that min-p, top-k and top-p keep, ascending; None: all that are possible.

    t: [vocab_size], log-probabilities up to a constant, with maximum 0.
    """
    if min_p <= 0 and not 0 < top_k < len(t) and top_p >= 1:
        return None
    lowest = np.log(np.float32(min_p)) if min_p > 0 else np.float32(-np.inf)
    ids = np.flatnonzero((t >= lowest) & (t > -np.inf))
    values = t[ids]
    if 0 < top_k < len(values):
        kth = np.partition(values, len(values) - top_k)[len(values) - top_k]
        stays = values >= kth
        ids, values = ids[stays], values[stays]
    if top_p < 1:
        ids = ids[values >= _top_p_threshold(values, top_p)]
    return ids


def _top_p_threshold(values: FloatArray, top_p: float) -> np.float32:
    """The smallest value that top-p keeps: the mass of what is above it is below top_p of all."""
    wanted = top_p * np.exp(values).sum(dtype=np.float64)
    for num_sorted in (TOP_P_GUESS, len(values)):
        if num_sorted < len(values):
            ordered = np.partition(values, len(values) - num_sorted)[len(values) - num_sorted :]
        else:
            ordered = values.copy()
        ordered.sort()
        ordered = ordered[::-1]
        reached = np.cumsum(np.exp(ordered), dtype=np.float64)
        # The first place where the mass is enough; what comes before it is not.
        last = int(np.searchsorted(reached, wanted))
        if last < len(ordered):
            return np.float32(ordered[last])
    return np.float32(values.min())
