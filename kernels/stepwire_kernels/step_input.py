"""A step's input, built on the device from one packed copy.

The persistent state (`RowState`) holds, for every row, its token ids, how many of them are known, its block table, its
sampling parameters and its token counts. The host sends one int32 buffer a step; three kernels turn it into everything
the forward pass reads, so that a whole step can be one captured graph: no shape and no grid depends on the content.

Buffer (int32 words):

    header[HEADER_WORDS]     num_segments, num_runs, num_tokens, segments_at, runs_at, num_counts, counts_at, unused
    segments[num_segments]   (table, destination, length, source): copy `length` words from the buffer's word `source`
                             to the flat word `destination` of table TABLE_* (tokens, lengths, block tables,
                             parameters, logit biases)
    runs[num_runs]           (row, start_pos, num_tokens, flags): flags bit 0 = sample, bit 1 = update the token counts
    counts[num_counts]       (row, prompt_len, length, unused): recount the row's tokens (rows added with penalties)

`pack_step` writes it. Row 0..max_num_seqs-1 are real; block 0 is the scratch block: padding tokens have input id 0,
position 0 and slot 0, so what they write lands there and nobody reads it.

A run whose start disagrees with the device (it would read tokens nobody wrote) gets
`faults[run] = FAULT_UNKNOWN_TOKENS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream

HEADER_WORDS = 8
SEGMENT_WORDS = 4
RUN_WORDS = 4
COUNT_WORDS = 4
MAX_SEGMENT = 1024  # longer copies are split by the packer, so that one program never copies more

TABLE_TOKENS, TABLE_LENGTHS, TABLE_BLOCKS, TABLE_PARAMETERS, TABLE_BIASES = range(5)
RUN_SAMPLES = 1
RUN_COUNTS = 2
FAULT_UNKNOWN_TOKENS = 1

# Word offsets in a row's parameters; the floats are bit patterns.
PARAMETER_WORDS = 16
(
    PARAM_TEMPERATURE,
    PARAM_TOP_P,
    PARAM_MIN_P,
    PARAM_REPETITION,
    PARAM_PRESENCE,
    PARAM_FREQUENCY,
    PARAM_TOP_K,
    PARAM_SEED_LOW,
    PARAM_SEED_HIGH,
    PARAM_SEQUENCE_INDEX,
    PARAM_NUM_BIASES,
    PARAM_NUM_LOGPROBS,
) = range(12)

PROMPT_FLAG = -(2**31)  # bit 31 of a token count: the token occurs in the prompt


@dataclass(frozen=True)
class RowState:
    """The persistent device rows. `token_counts` may have zero rows when no request uses penalties."""

    tokens: torch.Tensor  # int32 [max_num_seqs, max_model_len]
    lengths: torch.Tensor  # int32 [max_num_seqs]: token ids known
    block_tables: torch.Tensor  # int32 [max_num_seqs, max_blocks_per_row]
    parameters: torch.Tensor  # int32 [max_num_seqs, PARAMETER_WORDS]
    biases: torch.Tensor  # int32 [max_num_seqs, 2, max_biases]: token ids, then float32 bit patterns
    token_counts: torch.Tensor  # int32 [max_num_seqs or 0, vocab_size]


@dataclass(frozen=True)
class StepInput:
    """What one step's forward pass and sampler read; `max_runs` and `max_tokens` are the bucket's shape."""

    input_ids: torch.Tensor  # int32 [max_tokens]
    positions: torch.Tensor  # int32 [max_tokens]
    slots: torch.Tensor  # int32 [max_tokens]
    query_starts: torch.Tensor  # int32 [max_runs + 1]
    kv_lens: torch.Tensor  # int32 [max_runs]; 0 for padding
    run_rows: torch.Tensor  # int32 [max_runs]
    run_flags: torch.Tensor  # int32 [max_runs]
    sample_positions: torch.Tensor  # int32 [max_runs]: position of the token to be sampled
    faults: torch.Tensor  # int32 [max_runs]

    @property
    def max_runs(self) -> int:
        return self.run_rows.numel()

    @property
    def max_tokens(self) -> int:
        return self.input_ids.numel()


def allocate_row_state(
    max_num_seqs: int,
    max_model_len: int,
    block_size: int,
    vocab_size: int,
    device: torch.device | str,
    *,
    max_biases: int = 512,
    with_token_counts: bool = True,
) -> RowState:
    """Zeroed rows. The token counts take max_num_seqs * vocab_size * 4 bytes."""
    blocks = triton.cdiv(max_model_len, block_size)
    counted = max_num_seqs if with_token_counts else 0

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    return RowState(
        tokens=zeros(max_num_seqs, max_model_len),
        lengths=zeros(max_num_seqs),
        block_tables=zeros(max_num_seqs, blocks),
        parameters=zeros(max_num_seqs, PARAMETER_WORDS),
        biases=zeros(max_num_seqs, 2, max_biases),
        token_counts=zeros(counted, vocab_size),
    )


def allocate_step_input(max_runs: int, max_tokens: int, device: torch.device | str) -> StepInput:
    """Buffers of one bucket. A bucket that may hold padding tokens beside runs of several tokens needs one run more
    than it ever runs: the last one covers the padding.
    """

    def zeros(count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=device)

    return StepInput(
        input_ids=zeros(max_tokens),
        positions=zeros(max_tokens),
        slots=zeros(max_tokens),
        query_starts=zeros(max_runs + 1),
        kv_lens=zeros(max_runs),
        run_rows=zeros(max_runs),
        run_flags=zeros(max_runs),
        sample_positions=zeros(max_runs),
        faults=zeros(max_runs),
    )


@dataclass(frozen=True)
class TableWrite:
    """One row's change: `words` go to `table` from flat word `destination` on."""

    table: int
    destination: int
    words: np.ndarray  # int32 [n]


def pack_step(
    writes: Sequence[TableWrite],
    runs: np.ndarray,
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """Pack a step into the buffer's layout, int32 [words].

    runs: [num_runs, 4] of (row, start_pos, num_tokens, flags). counts: [num_counts, 4] of (row, prompt_len, length, 0).

    Raises:
        ValueError: an array of another shape.
    """
    counts = np.zeros((0, COUNT_WORDS), dtype=np.int32) if counts is None else counts
    if runs.ndim != 2 or runs.shape[1] != RUN_WORDS or counts.ndim != 2 or counts.shape[1] != COUNT_WORDS:
        raise ValueError(f"pack_step: runs and counts must be [n, 4], got {runs.shape} and {counts.shape}")
    pieces: list[tuple[int, int, np.ndarray]] = []
    for write in writes:
        for offset in range(0, len(write.words), MAX_SEGMENT):
            pieces.append((write.table, write.destination + offset, write.words[offset : offset + MAX_SEGMENT]))
    segments_at = HEADER_WORDS
    runs_at = segments_at + len(pieces) * SEGMENT_WORDS
    counts_at = runs_at + runs.size
    data_at = counts_at + counts.size
    total = data_at + sum(len(words) for _, _, words in pieces)
    buffer = np.zeros(total, dtype=np.int32)
    num_tokens = int(runs[:, 2].sum()) if len(runs) else 0
    buffer[:HEADER_WORDS] = (len(pieces), len(runs), num_tokens, segments_at, runs_at, len(counts), counts_at, 0)
    buffer[runs_at:counts_at] = runs.reshape(-1)
    buffer[counts_at:data_at] = counts.reshape(-1)
    source = data_at
    for index, (table, destination, words) in enumerate(pieces):
        at = segments_at + index * SEGMENT_WORDS
        buffer[at : at + SEGMENT_WORDS] = (table, destination, len(words), source)
        buffer[source : source + len(words)] = words
        source += len(words)
    return buffer


@triton.jit
def _apply_delta_kernel(
    buffer_ptr,
    tokens_ptr,
    lengths_ptr,
    block_tables_ptr,
    parameters_ptr,
    biases_ptr,
    BLOCK: tl.constexpr,
):
    num_segments = tl.load(buffer_ptr)
    segments_at = tl.load(buffer_ptr + 3)
    offsets = tl.arange(0, BLOCK)
    for index in range(tl.program_id(0), num_segments, tl.num_programs(0)):
        segment = buffer_ptr + segments_at + index * 4
        table = tl.load(segment)
        destination = tl.load(segment + 1)
        length = tl.load(segment + 2)
        source = tl.load(segment + 3)
        mask = offsets < length
        words = tl.load(buffer_ptr + source + offsets, mask=mask, other=0)
        at = destination.to(tl.int64) + offsets
        tl.store(tokens_ptr + at, words, mask=mask & (table == 0))
        tl.store(lengths_ptr + at, words, mask=mask & (table == 1))
        tl.store(block_tables_ptr + at, words, mask=mask & (table == 2))
        tl.store(parameters_ptr + at, words, mask=mask & (table == 3))
        tl.store(biases_ptr + at, words, mask=mask & (table == 4))


def apply_delta(buffer: torch.Tensor, rows: RowState, *, num_programs: int = 64) -> None:
    """Copy the buffer's segments into the persistent rows. Segments of one step must not overlap.

    Raises:
        ValueError: the buffer is not int32.
    """
    if buffer.dtype != torch.int32:
        raise ValueError(f"apply_delta: the step buffer must be int32, got {buffer.dtype}")
    _apply_delta_kernel[(num_programs,)](
        buffer,
        rows.tokens,
        rows.lengths,
        rows.block_tables,
        rows.parameters,
        rows.biases,
        BLOCK=MAX_SEGMENT,
        num_warps=4,
    )


@triton.jit
def _recount_kernel(
    buffer_ptr,
    tokens_ptr,
    counts_ptr,
    tokens_stride,
    vocab_size,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_counts = tl.load(buffer_ptr + 5)
    counts_at = tl.load(buffer_ptr + 6)
    part = tl.program_id(1)
    num_parts = tl.num_programs(1)
    for index in range(tl.program_id(0), num_counts, tl.num_programs(0)):
        record = buffer_ptr + counts_at + index * 4
        row = tl.load(record).to(tl.int64)
        prompt_len = tl.load(record + 1)
        length = tl.load(record + 2)
        counts = counts_ptr + row * vocab_size
        if ZERO:
            for base in range(part * BLOCK, vocab_size, num_parts * BLOCK):
                at = base + tl.arange(0, BLOCK)
                tl.store(counts + at, tl.zeros([BLOCK], dtype=tl.int32), mask=at < vocab_size)
        else:
            for base in range(part * BLOCK, length, num_parts * BLOCK):
                at = base + tl.arange(0, BLOCK)
                mask = at < length
                token = tl.load(tokens_ptr + row * tokens_stride + at, mask=mask, other=0)
                mask = mask & (token >= 0) & (token < vocab_size)
                tl.atomic_or(counts + token, tl.full([BLOCK], -2147483648, tl.int32), mask=mask & (at < prompt_len))
                tl.atomic_add(counts + token, tl.full([BLOCK], 1, tl.int32), mask=mask & (at >= prompt_len))


def recount_tokens(buffer: torch.Tensor, rows: RowState, *, num_programs: int = 16) -> None:
    """Rebuild the token counts of the rows in the buffer's counts section (two kernels: clear, count)."""
    vocab_size = rows.token_counts.shape[1]
    for zero in (True, False):
        _recount_kernel[(num_programs, 4)](
            buffer,
            rows.tokens,
            rows.token_counts,
            rows.tokens.stride(0),
            vocab_size,
            ZERO=zero,
            BLOCK=1024,
            num_warps=4,
        )


@triton.jit
def _build_input_kernel(
    buffer_ptr,
    tokens_ptr,
    lengths_ptr,
    block_tables_ptr,
    input_ids_ptr,
    positions_ptr,
    slots_ptr,
    query_starts_ptr,
    kv_lens_ptr,
    run_rows_ptr,
    run_flags_ptr,
    sample_positions_ptr,
    faults_ptr,
    tokens_stride,
    table_stride,
    max_runs,
    max_tokens,
    BLOCK_SIZE: tl.constexpr,
    ONE_TOKEN_RUNS: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    run = tl.program_id(0)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    num_runs = tl.load(buffer_ptr + 1)
    num_tokens = tl.load(buffer_ptr + 2)
    runs_at = tl.load(buffer_ptr + 4)
    if ONE_TOKEN_RUNS:
        first_token = run
    else:
        others = tl.arange(0, BLOCK_RUNS)
        lens = tl.load(buffer_ptr + runs_at + others * 4 + 2, mask=(others < num_runs) & (others < run), other=0)
        first_token = tl.sum(lens, axis=0)
    if run < num_runs:
        record = buffer_ptr + runs_at + run * 4
        row = tl.load(record)
        start_pos = tl.load(record + 1)
        length = tl.load(record + 2)
        flags = tl.load(record + 3)
        known = tl.load(lengths_ptr + row)
        tl.store(query_starts_ptr + run, first_token)
        tl.store(kv_lens_ptr + run, start_pos + length)
        tl.store(run_rows_ptr + run, row)
        tl.store(run_flags_ptr + run, flags)
        tl.store(sample_positions_ptr + run, start_pos + length)
        tl.store(faults_ptr + run, tl.where(start_pos + length > known, 1, 0))
        for base in range(0, length, BLOCK_TOKENS):
            offset = base + tl.arange(0, BLOCK_TOKENS)
            mask = offset < length
            position = start_pos + offset
            token_id = tl.load(tokens_ptr + row.to(tl.int64) * tokens_stride + position, mask=mask, other=0)
            table = block_tables_ptr + row.to(tl.int64) * table_stride
            block = tl.load(table + position // BLOCK_SIZE, mask=mask, other=0)
            tl.store(input_ids_ptr + first_token + offset, token_id, mask=mask)
            tl.store(positions_ptr + first_token + offset, position, mask=mask)
            tl.store(slots_ptr + first_token + offset, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=mask)
    else:
        # Padding: one token a run where all runs have one token, else the first padding run takes all of it.
        if ONE_TOKEN_RUNS:
            from_token = run
            to_token = run + 1
        else:
            from_token = tl.where(run == num_runs, num_tokens, max_tokens)
            to_token = max_tokens
        tl.store(query_starts_ptr + run, from_token)
        tl.store(kv_lens_ptr + run, 0)
        tl.store(run_rows_ptr + run, 0)
        tl.store(run_flags_ptr + run, 0)
        tl.store(sample_positions_ptr + run, 0)
        tl.store(faults_ptr + run, 0)
        for base in range(from_token, to_token, BLOCK_TOKENS):
            at = base + tl.arange(0, BLOCK_TOKENS)
            nothing = tl.zeros([BLOCK_TOKENS], dtype=tl.int32)
            tl.store(input_ids_ptr + at, nothing, mask=at < to_token)
            tl.store(positions_ptr + at, nothing, mask=at < to_token)
            tl.store(slots_ptr + at, nothing, mask=at < to_token)
    if run == max_runs - 1:
        if ONE_TOKEN_RUNS:
            tl.store(query_starts_ptr + max_runs, max_runs)
        else:
            tl.store(query_starts_ptr + max_runs, tl.where(num_runs == max_runs, num_tokens, max_tokens))


def build_step_input(
    buffer: torch.Tensor,
    rows: RowState,
    step: StepInput,
    block_size: int,
    *,
    one_token_runs: bool,
    pdl: bool = False,
) -> None:
    """Fill `step` from the buffer's runs and the rows.

    `one_token_runs`: a decode-only bucket, where run r is token r and max_runs == max_tokens. Otherwise the tokens of
    the runs follow one another, and padding tokens form one run of kv_len 0 after the last.

    Raises:
        ValueError: a decode-only bucket whose counts differ.
    """
    if one_token_runs and step.max_runs != step.max_tokens:
        raise ValueError(
            f"build_step_input: a decode-only bucket has one token a run, got {step.max_runs} runs and "
            f"{step.max_tokens} tokens"
        )
    _build_input_kernel[(step.max_runs,)](
        buffer,
        rows.tokens,
        rows.lengths,
        rows.block_tables,
        step.input_ids,
        step.positions,
        step.slots,
        step.query_starts,
        step.kv_lens,
        step.run_rows,
        step.run_flags,
        step.sample_positions,
        step.faults,
        rows.tokens.stride(0),
        rows.block_tables.stride(0),
        step.max_runs,
        step.max_tokens,
        BLOCK_SIZE=block_size,
        ONE_TOKEN_RUNS=one_token_runs,
        BLOCK_RUNS=triton.next_power_of_2(step.max_runs),
        BLOCK_TOKENS=32 if one_token_runs else 1024,
        USE_PDL=pdl,
        num_warps=1 if one_token_runs else 4,
        **launch_options(pdl),
    )


@triton.jit
def _write_back_kernel(
    sampled_ptr,
    run_rows_ptr,
    run_flags_ptr,
    sample_positions_ptr,
    tokens_ptr,
    lengths_ptr,
    counts_ptr,
    num_runs,
    tokens_stride,
    max_len,
    vocab_size,
    HAS_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    run = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_step = run < num_runs
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    flags = tl.load(run_flags_ptr + run, mask=in_step, other=0)
    row = tl.load(run_rows_ptr + run, mask=in_step, other=0).to(tl.int64)
    position = tl.load(sample_positions_ptr + run, mask=in_step, other=0)
    token = tl.load(sampled_ptr + run, mask=in_step, other=0)
    samples = in_step & ((flags & 1) != 0) & (position < max_len)
    tl.store(tokens_ptr + row * tokens_stride + position, token, mask=samples)
    tl.store(lengths_ptr + row, position + 1, mask=samples)
    if HAS_COUNTS:
        one = tl.full([BLOCK], 1, tl.int32)
        tl.atomic_add(counts_ptr + row * vocab_size + token, one, mask=samples & ((flags & 2) != 0))


def write_back_tokens(sampled: torch.Tensor, step: StepInput, rows: RowState, *, pdl: bool = False) -> None:
    """Append each sampling run's token to its row, and count it where the run asks for that.

    A row that is full (its position equals the table's width) keeps its tokens: the control plane ends such a sequence.

    Raises:
        ValueError: `sampled` is not int32 [max_runs].
    """
    if sampled.dtype != torch.int32 or sampled.numel() != step.max_runs:
        raise ValueError(
            f"write_back_tokens: sampled must be int32 [{step.max_runs}], got {sampled.dtype} {tuple(sampled.shape)}"
        )
    block = 128
    _write_back_kernel[(triton.cdiv(step.max_runs, block),)](
        sampled,
        step.run_rows,
        step.run_flags,
        step.sample_positions,
        rows.tokens,
        rows.lengths,
        rows.token_counts,
        step.max_runs,
        rows.tokens.stride(0),
        rows.tokens.shape[1],
        rows.token_counts.shape[1],
        HAS_COUNTS=rows.token_counts.shape[0] > 0,
        BLOCK=block,
        USE_PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
