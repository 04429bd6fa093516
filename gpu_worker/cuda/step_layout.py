"""How a step is laid out for the device: its order of runs, its padded shape, its words in the step buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from stepwire_kernels.step_input import (
    COUNT_WORDS,
    HEADER_WORDS,
    MAX_SEGMENT,
    RUN_COUNTS,
    RUN_SAMPLES,
    RUN_WORDS,
    SEGMENT_WORDS,
    TableWrite,
)
from stepwire_kernels.step_result import RESULT_SLOT_WORD

from gpu_worker.cuda.device_rows import DeviceRows, StagedChanges
from gpu_worker.row_table import IntArray
from gpu_worker.runner_api import StepBatch

Int32Array = npt.NDArray[np.int32]

TOKEN_MULTIPLE = 32
SMALL_NUM_RUNS = (16, 64)


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a launch depends on, beside the content of the step buffer."""

    num_runs: int
    """With padding."""
    num_tokens: int
    """With padding."""
    num_logits: int
    """The first so many runs get logits."""
    is_decode: bool
    """Every run has one token; run r is token r."""
    has_decodes: bool
    """Whether a run of one token is among them."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """A step's runs in the order of the device."""

    shape: StepShape
    runs: Int32Array  # [num_runs, RUN_WORDS]: (row, start position, number of tokens, flags)
    sampled_rows: IntArray  # [num_sampled], in the order of the step
    sampled_runs: IntArray  # [num_sampled]: where each stands in `runs`


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of runs that decode-only steps are padded to: 1, 2, 4, 8, then every eighth."""
    buckets = [size for size in (1, 2, 4) if size < max_num_seqs]
    buckets += range(8, max_num_seqs, 8)
    return (*buckets, max_num_seqs)


class StepPlanner:
    """Lays steps out, within the largest shape."""

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.buckets = decode_buckets(max_num_seqs)
        self._buckets = np.array(self.buckets)
        # One run more than rows: it covers the padding tokens.
        self.max_runs = max_num_seqs + 1
        self.max_tokens = _round_up(max(max_num_batched_tokens, max_num_seqs), TOKEN_MULTIPLE)
        self._num_runs = np.array([*(size for size in SMALL_NUM_RUNS if size < self.max_runs), self.max_runs])

    @property
    def small_num_runs(self) -> int:
        """The least number of runs that a step with prefills is padded to."""
        return int(self._num_runs[0])

    def lay_out(self, batch: StepBatch, sound: IntArray, rows: DeviceRows) -> StepLayout:
        """The device's view of the runs `sound` of a step; at least one."""
        counts = batch.run_num_tokens[sound].astype(np.int64)
        samples = batch.run_samples[sound]
        run_rows = batch.run_rows[sound].astype(np.int64)
        is_decode = bool((counts == 1).all())
        num_sampled = int(samples.sum())
        # In a mixed step the runs that sample come first: logits are computed for a leading part.
        is_ordered = is_decode or num_sampled == len(sound)
        runs = np.empty((len(sound), RUN_WORDS), dtype=np.int32)  # [num_runs, 4]
        runs[:, 0] = run_rows
        runs[:, 1] = batch.run_start_positions[sound]
        runs[:, 2] = counts
        runs[:, 3] = samples * (RUN_SAMPLES + RUN_COUNTS * rows.has_penalties[run_rows])
        sampled_rows = run_rows[samples]
        sampled_runs = np.flatnonzero(samples) if is_decode else np.arange(num_sampled)
        if not is_ordered:
            runs = runs[np.argsort(~samples, kind="stable")]
        return StepLayout(self._shape(counts, num_sampled, is_decode), runs, sampled_rows, sampled_runs)

    def _shape(self, counts: IntArray, num_sampled: int, is_decode: bool) -> StepShape:
        if is_decode:
            bucket = self.bucket_of(len(counts))
            return self.decode_shape(bucket)
        num_tokens = _round_up(int(counts.sum()), TOKEN_MULTIPLE)
        num_runs = int(self._num_runs[np.searchsorted(self._num_runs, len(counts) + 1)])
        return StepShape(num_runs, num_tokens, num_sampled, False, bool((counts == 1).any()))

    def bucket_of(self, num_runs: int) -> int:
        """The bucket of a decode-only step."""
        return int(self._buckets[np.searchsorted(self._buckets, num_runs)])

    def decode_shape(self, bucket: int) -> StepShape:
        return StepShape(bucket, bucket, bucket, True, True)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def split_changes(changes: StagedChanges, num_reserved: int, capacity: int) -> Iterator[StagedChanges]:
    """Changes in parts that fit a buffer of `capacity` words, in order; the last leaves `num_reserved` words free.

    A part holds at least one segment, and every part but the last is meant for a delta without runs.
    """
    pieces = [piece for write in changes.writes for piece in _pieces(write)]
    part: list[TableWrite] = []
    free = capacity - HEADER_WORDS
    for piece in pieces:
        words = SEGMENT_WORDS + len(piece.words)
        if part and words > free:
            yield StagedChanges(part, [])
            part, free = [], capacity - HEADER_WORDS
        part.append(piece)
        free -= words
    needed = num_reserved + len(changes.recounts) * COUNT_WORDS
    if needed > free:
        yield StagedChanges(part, [])
        part = []
    yield StagedChanges(part, changes.recounts)


def _pieces(write: TableWrite) -> Iterator[TableWrite]:
    if len(write.words) <= MAX_SEGMENT:
        yield write
        return
    for offset in range(0, len(write.words), MAX_SEGMENT):
        yield TableWrite(write.table, write.destination + offset, write.words[offset : offset + MAX_SEGMENT])


def pack(
    out: Int32Array,
    writes: Sequence[TableWrite],
    runs: Int32Array,
    recounts: Sequence[tuple[int, int, int, int]],
    result_slot: int,
) -> int:
    """Write a step into `out` (see `stepwire_kernels.step_input`), and the result's slot; the number of words used.

    `writes` are no longer than MAX_SEGMENT and all fit: `split_changes` made them.
    """
    runs_at = HEADER_WORDS + len(writes) * SEGMENT_WORDS
    counts_at = runs_at + runs.size
    data_at = counts_at + len(recounts) * COUNT_WORDS
    num_tokens = int(runs[:, 2].sum()) if len(runs) else 0
    out[:HEADER_WORDS] = (len(writes), len(runs), num_tokens, HEADER_WORDS, runs_at, len(recounts), counts_at, 0)
    out[RESULT_SLOT_WORD] = result_slot
    out[runs_at:counts_at] = runs.reshape(-1)
    if recounts:
        out[counts_at:data_at] = np.array(recounts, dtype=np.int32).reshape(-1)
    if not writes:
        return data_at
    lengths = np.array([len(write.words) for write in writes], dtype=np.int64)
    ends = np.cumsum(lengths)
    segments = out[HEADER_WORDS:runs_at].reshape(-1, SEGMENT_WORDS)  # [num_segments, 4]
    segments[:, 0] = [write.table for write in writes]
    segments[:, 1] = [write.destination for write in writes]
    segments[:, 2] = lengths
    segments[:, 3] = data_at + ends - lengths
    used = data_at + int(ends[-1])
    np.concatenate([write.words for write in writes], out=out[data_at:used])
    return used
