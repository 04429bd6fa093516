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

# Steps with prefills: what their tokens are padded to where no graph holds them, and what their runs always are.
TOKEN_MULTIPLE = 32
SMALL_NUM_RUNS = (16, 64)
# (up to, in steps of): token counts that have graphs. Padding costs a quarter at worst but for the smallest steps, and
# beyond the last one the device needs longer for a step than the host for launching its kernels one by one.
GRAPH_TOKENS = ((1024, 64), (2048, 256), (4096, 512))


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
    """Whether a run of one token may be among them."""
    has_graph: bool
    """Whether steps of this shape are worth a graph."""


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


def mixed_buckets(max_tokens: int) -> tuple[int, ...]:
    """Token counts that graphs of steps with prefills are padded to."""
    buckets: list[int] = []
    for limit, multiple in GRAPH_TOKENS:
        first = buckets[-1] + multiple if buckets else multiple
        buckets += range(first, min(limit, max_tokens) + 1, multiple)
    return tuple(buckets)


class StepPlanner:
    """Lays steps out, within the largest shape.

    Args:
        with_graphs: pad steps with prefills to the token counts that graphs are captured for.
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, *, with_graphs: bool) -> None:
        self.buckets = decode_buckets(max_num_seqs)
        self._buckets = np.array(self.buckets)
        # A row that no sequence ever has: its blocks are all the scratch block.
        self.scratch_row = max_num_seqs
        # One run more than rows: it covers the padding tokens.
        self.max_runs = max_num_seqs + 1
        self.max_tokens = _round_up(max(max_num_batched_tokens, max_num_seqs), TOKEN_MULTIPLE)
        self._num_runs = np.array([*(size for size in SMALL_NUM_RUNS if size < self.max_runs), self.max_runs])
        self._mixed_buckets = np.array(mixed_buckets(self.max_tokens) if with_graphs else (), dtype=np.int64)
        gaps = np.diff(self._mixed_buckets, prepend=0)
        self.max_padding_tokens = max(TOKEN_MULTIPLE, int(gaps.max(initial=0)))

    def graph_shapes(self) -> Iterator[StepShape]:
        """Every shape that has a graph: decodes first, small first."""
        for bucket in self.buckets:
            yield self.decode_shape(bucket)
        for num_runs in self._num_runs.tolist():
            for num_tokens in self._mixed_buckets.tolist():
                yield self._mixed_shape(num_runs, num_tokens)

    def unseen_runs(self, shape: StepShape, max_model_len: int) -> Int32Array | None:
        """Runs that fill a shape and touch the scratch row and block alone; None where too few runs would do it."""
        if shape.is_decode:
            return np.zeros((0, RUN_WORDS), dtype=np.int32)
        num_runs = -(-shape.num_tokens // max_model_len)
        if num_runs >= shape.num_runs:
            return None
        counts = np.full(num_runs, max_model_len, dtype=np.int32)
        counts[-1] = shape.num_tokens - (num_runs - 1) * max_model_len
        runs = np.zeros((num_runs, RUN_WORDS), dtype=np.int32)  # [num_runs, 4]
        runs[:, 0], runs[:, 2] = self.scratch_row, counts
        return runs

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
        num_tokens = int(counts.sum())
        num_runs = int(self._num_runs[np.searchsorted(self._num_runs, len(counts) + 1)])
        index = int(np.searchsorted(self._mixed_buckets, num_tokens))
        if index < len(self._mixed_buckets):
            return self._mixed_shape(num_runs, int(self._mixed_buckets[index]))
        return StepShape(
            num_runs, _round_up(num_tokens, TOKEN_MULTIPLE), num_sampled, False, bool((counts == 1).any()), False
        )

    def _mixed_shape(self, num_runs: int, num_tokens: int) -> StepShape:
        # Which runs sample and which have one token is content: a graph is ready for any.
        return StepShape(num_runs, num_tokens, num_runs - 1, False, True, True)

    def prefill_shape(self, num_tokens: int) -> StepShape:
        """A step of few runs, none of one token, that is launched eagerly."""
        return StepShape(int(self._num_runs[0]), _round_up(num_tokens, TOKEN_MULTIPLE), 1, False, False, False)

    def bucket_of(self, num_runs: int) -> int:
        """The bucket of a decode-only step."""
        return int(self._buckets[np.searchsorted(self._buckets, num_runs)])

    def decode_shape(self, bucket: int) -> StepShape:
        return StepShape(bucket, bucket, bucket, True, True, True)


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
