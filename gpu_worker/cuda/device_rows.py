"""The rows of a CUDA worker: checked on the host, kept on the device.

The host knows lengths, blocks and sampling parameters, never the sampled tokens. What changes in a row becomes a
`TableWrite` that travels with the next step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from stepwire_kernels.step_input import (
    PARAM_FREQUENCY,
    PARAM_MIN_P,
    PARAM_NUM_BIASES,
    PARAM_NUM_LOGPROBS,
    PARAM_PRESENCE,
    PARAM_REPETITION,
    PARAM_SEED_HIGH,
    PARAM_SEED_LOW,
    PARAM_SEQUENCE_INDEX,
    PARAM_TEMPERATURE,
    PARAM_TOP_K,
    PARAM_TOP_P,
    PARAMETER_WORDS,
    TABLE_BIASES,
    TABLE_BLOCKS,
    TABLE_LENGTHS,
    TABLE_PARAMETERS,
    TABLE_TOKENS,
    TableWrite,
)

from gpu_worker.row_table import BatchLimits, IntArray, RowTable
from gpu_worker.runner_api import RowAdd, RowSampling

Int32Array = npt.NDArray[np.int32]

MAX_BIASES = 512
NO_LOGPROBS = -1


@dataclass(slots=True)
class StagedChanges:
    """What the device's tables do not know yet."""

    writes: list[TableWrite]
    recounts: list[tuple[int, int, int, int]]  # (row, num_prompt_tokens, length, 0): rows added with penalties


class DeviceRows(RowTable):
    """The rows of one session."""

    def __init__(self, limits: BatchLimits) -> None:
        super().__init__(limits)
        num_rows = limits.max_num_seqs
        self._table_width = self._block_tables.shape[1]
        self._staged = StagedChanges([], [])
        # Counts a row's occupants, so that a late failure does not hit the next one.
        self.generations = np.zeros(num_rows, dtype=np.int64)
        self.has_penalties = np.zeros(num_rows, dtype=np.bool_)
        self.num_logprobs = np.full(num_rows, NO_LOGPROBS, dtype=np.int64)
        # Allowed tokens of the rows that have such a list, as bits: they are drawn with a mask at every step.
        self.allowed_bits: dict[int, npt.NDArray[np.uint32]] = {}
        # Length up to which a row's suppressed tokens count, and how many biases are left from there on.
        self._suppressed_until: dict[int, tuple[int, int]] = {}

    def take_changes(self) -> StagedChanges:
        """Everything since the last call."""
        staged, self._staged = self._staged, StagedChanges([], [])
        return staged

    def clear(self) -> None:
        super().clear()
        self._staged = StagedChanges([], [])

    def advance(self, rows: IntArray, contexts: IntArray, samples: npt.NDArray[np.bool_]) -> None:
        """These rows run up to `contexts` tokens, and those that sample grow by one."""
        self._computed[rows] = contexts
        for row in [row for row in self._suppressed_until if row in rows]:
            until, num_biases = self._suppressed_until[row]
            if self._lengths[row] >= until:
                del self._suppressed_until[row]
                self._write(TABLE_PARAMETERS, row * PARAMETER_WORDS + PARAM_NUM_BIASES, [num_biases])
        self._lengths[rows[samples]] += 1

    def _forget(self, row: int) -> None:
        super()._forget(row)
        self.generations[row] += 1
        self.has_penalties[row] = False
        self.num_logprobs[row] = NO_LOGPROBS
        self.allowed_bits.pop(row, None)
        self._suppressed_until.pop(row, None)

    def _unsupported(self, add: RowAdd) -> str | None:
        num_biases = len(add.sampling.bias_token_ids) + len(add.sampling.suppressed_token_ids)
        if num_biases > MAX_BIASES:
            return (
                f"{num_biases} token biases and suppressed tokens are more than the {MAX_BIASES} that a CUDA worker "
                "keeps for a row: bias fewer tokens, or use allowed_token_ids"
            )
        return super()._unsupported(add)

    def _occupy(self, add: RowAdd) -> None:
        super()._occupy(add)
        row, sampling, length = add.row, add.sampling, len(add.token_ids)
        limits = self._limits
        self._write(TABLE_TOKENS, row * limits.max_model_len, add.token_ids.view(np.int32))
        self._write(TABLE_LENGTHS, row, [length])
        if len(add.block_ids):
            self._write(TABLE_BLOCKS, row * self._table_width, add.block_ids.view(np.int32))
        suppresses = len(sampling.suppressed_token_ids) > 0 and length - add.num_prompt_tokens < sampling.min_tokens
        biases = _bias_words(sampling, suppresses)
        if biases.shape[1]:
            at = row * 2 * MAX_BIASES
            self._write(TABLE_BIASES, at, biases[0])
            self._write(TABLE_BIASES, at + MAX_BIASES, biases[1])
        self._write(TABLE_PARAMETERS, row * PARAMETER_WORDS, _parameter_words(sampling, biases.shape[1]))
        if suppresses:
            until = add.num_prompt_tokens + sampling.min_tokens
            self._suppressed_until[row] = (until, len(sampling.bias_token_ids))
        if sampling.num_logprobs is not None:
            self.num_logprobs[row] = sampling.num_logprobs
        if len(sampling.allowed_token_ids):
            self.allowed_bits[row] = _bits_of(sampling.allowed_token_ids, limits.vocab_size)
        if _penalises(sampling):
            self.has_penalties[row] = True
            self._staged.recounts.append((row, add.num_prompt_tokens, length, 0))

    def _append_to_table(self, row: int, num_held: int, block_ids: npt.NDArray[np.uint32]) -> None:
        super()._append_to_table(row, num_held, block_ids)
        self._write(TABLE_BLOCKS, row * self._table_width + num_held, block_ids.view(np.int32))

    def _write(self, table: int, destination: int, words: Int32Array | list[int]) -> None:
        self._staged.writes.append(TableWrite(table, destination, np.asarray(words, dtype=np.int32)))


def _penalises(sampling: RowSampling) -> bool:
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def _bias_words(sampling: RowSampling, suppresses: bool) -> Int32Array:
    """[2, num_biases]: token ids and float32 bit patterns; suppressed tokens last, as biases of minus infinity."""
    token_ids, values = sampling.bias_token_ids, sampling.bias_values
    if suppresses:
        token_ids = np.concatenate((token_ids, sampling.suppressed_token_ids))
        values = np.concatenate((values, np.full(len(sampling.suppressed_token_ids), -np.inf, dtype=np.float32)))
    return np.stack((token_ids.astype(np.int32), values.astype(np.float32).view(np.int32)))


def _parameter_words(sampling: RowSampling, num_biases: int) -> Int32Array:
    words = np.zeros(PARAMETER_WORDS, dtype=np.int32)
    floats = words.view(np.float32)
    floats[PARAM_TEMPERATURE] = sampling.temperature
    floats[PARAM_TOP_P] = sampling.top_p
    floats[PARAM_MIN_P] = sampling.min_p
    floats[PARAM_REPETITION] = sampling.repetition_penalty
    floats[PARAM_PRESENCE] = sampling.presence_penalty
    floats[PARAM_FREQUENCY] = sampling.frequency_penalty
    words[PARAM_TOP_K] = sampling.top_k
    unsigned = words.view(np.uint32)
    unsigned[PARAM_SEED_LOW] = sampling.seed & 0xFFFFFFFF
    unsigned[PARAM_SEED_HIGH] = sampling.seed >> 32
    unsigned[PARAM_SEQUENCE_INDEX] = sampling.sequence_index & 0xFFFFFFFF
    words[PARAM_NUM_BIASES] = num_biases
    words[PARAM_NUM_LOGPROBS] = sampling.num_logprobs or 0
    return words


def _bits_of(token_ids: npt.NDArray[np.uint32], vocab_size: int) -> npt.NDArray[np.uint32]:
    """[ceil(vocab_size / 32)]: bit i of word w is token 32 w + i."""
    allowed = np.zeros(-(-vocab_size // 32) * 32, dtype=np.bool_)
    allowed[token_ids] = True
    return np.packbits(allowed, bitorder="little").view(np.uint32)
