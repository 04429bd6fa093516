"""Sampled tokens on their way between ranks: a step's draws as words, and their taking.

The ranks of the last stage each draw for some of a step's rows and give each other their words at once. The other
stages take the tokens of a step late: just before they execute one that touches the same rows or blocks. So a
pipeline's first stage goes on with other rows while the last one still computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.input_batch import StepInputs
from gpu_worker.parallel.process_group import Arriving
from gpu_worker.runner_api import RowFaultCode, StepBatch
from gpu_worker.sampler import FAULT_MESSAGES, RowSampler, SampledTokens, SampleFault, num_top_logprobs

_TOKEN, _FAULT, _LOGPROB, _TOP = 0, 1, 2, 3


def num_words(rows: Sequence[RowSampler]) -> tuple[int, int]:
    """Shape of the words of these rows: what both sides know before a token is drawn."""
    num_top = num_top_logprobs(rows)
    return len(rows), 2 if num_top is None else _TOP + 2 * num_top


def to_words(sampled: SampledTokens, shape: tuple[int, int]) -> torch.Tensor:
    """int32 [num_rows, token, fault code, and where anybody asked: logprob, top ids, top logprobs].

    shape: of the words. `sampled` may have fewer rows and alternatives, or nothing to say of logprobs.
    """
    words = np.zeros(shape, dtype=np.int32)
    num_own = len(sampled.token_ids)
    words[:num_own, _TOKEN] = sampled.token_ids
    for fault in sampled.faults:
        words[fault.index, _FAULT] = fault.code
    if shape[1] > 2:
        logprob, (top_ids, top) = words[:, _LOGPROB], np.split(words[:, _TOP:], 2, axis=1)
        # As the sampler has them where a row did not ask.
        logprob[:], top[:] = _bits(np.float32(np.nan)), _bits(np.float32(-np.inf))
        if sampled.logprobs is not None and sampled.top_token_ids is not None and sampled.top_logprobs is not None:
            num_top = sampled.top_token_ids.shape[1]
            logprob[:num_own] = sampled.logprobs.view(np.int32)
            top_ids[:num_own, :num_top] = sampled.top_token_ids.view(np.int32)
            top[:num_own, :num_top] = np.ascontiguousarray(sampled.top_logprobs).view(np.int32)
    return torch.from_numpy(words)


def _bits(value: np.float32) -> np.int32:
    return value.view(np.int32)


def in_order_of_rows(side_by_side: torch.Tensor, size: int, num_rows: int) -> torch.Tensor:
    """Words of all ranks, [rows_each, size * num_words] as a gather gives them, by row: [num_rows, num_words]."""
    rows_each = len(side_by_side)
    by_rank = side_by_side.view(rows_each, size, -1).transpose(0, 1)  # [size, rows_each, num_words]
    return by_rank.reshape(size * rows_each, -1)[:num_rows].contiguous()


def from_words(words: torch.Tensor) -> SampledTokens:
    """The other way."""
    table: npt.NDArray[np.int32] = words.numpy()
    faults = tuple(
        SampleFault(index, RowFaultCode(code), FAULT_MESSAGES[RowFaultCode(code)])
        for index, code in enumerate(table[:, _FAULT].tolist())
        if code
    )
    token_ids = table[:, _TOKEN].astype(np.int64)
    if table.shape[1] == 2:
        return SampledTokens(token_ids, faults, None, None, None)
    num_top = (table.shape[1] - _TOP) // 2
    columns = [table[:, _LOGPROB], table[:, _TOP : _TOP + num_top], table[:, _TOP + num_top :]]
    logprobs, top_ids, top = (np.ascontiguousarray(column) for column in columns)
    return SampledTokens(token_ids, faults, logprobs.view(np.float32), top_ids.view(np.uint32), top.view(np.float32))


@dataclass(frozen=True, slots=True)
class UntakenStep:
    """A step whose tokens another rank draws."""

    inputs: StepInputs
    arriving: Arriving
    blocks: npt.NDArray[np.int64]
    """Blocks of the rows that sample: they may hold what is not finite, as long as nobody knows."""

    def sampled(self) -> SampledTokens:
        """Block until the tokens are there. Any thread."""
        return from_words(self.arriving.get())

    def is_touched_by(self, batch: StepBatch, block_size: int) -> bool:
        """Whether `batch` needs these tokens to be known: it runs, drops or adds a row of them, or reuses a block."""
        rows = np.concatenate([batch.run_rows, batch.drop_rows, np.array([add.row for add in batch.adds], np.uint32)])
        if np.isin(self.inputs.sampled_rows, rows).any():
            return True
        written = [batch.new_block_ids, *(add.block_ids[add.num_computed_tokens // block_size :] for add in batch.adds)]
        return bool(np.isin(np.concatenate(written), self.blocks).any())
