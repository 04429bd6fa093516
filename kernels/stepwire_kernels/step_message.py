"""What the last stage of a pipeline tells the others of a step: its tokens, and what the host reads.

Message (int32 words), for runs 0 .. num_runs - 1:

    records[max_runs, MESSAGE_WORDS]  token id, log-probability (float32 bits), sampler fault, input fault,
                                      row, position of the token, flags of the run, unused
    top_ids[max_runs, max_top]        only with top log-probabilities
    top_logprobs[...]                 the same shape, float32 bits

It travels in rows of CHUNK_WORDS, as many as are used. Whoever takes it appends the tokens to its rows, as
`write_back_tokens` did on the last stage, and fills a slot of results, as `pack_result` did.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.sampler import Sampled
from stepwire_kernels.step_input import RowState, StepInput

MESSAGE_WORDS = 8
CHUNK_WORDS = 2048


def message_chunks(num_runs: int, max_runs: int, max_top: int) -> int:
    """Rows of CHUNK_WORDS that hold the message of `num_runs` runs; `max_top` 0: without top log-probabilities."""
    words = max_runs * (MESSAGE_WORDS + 2 * max_top) if max_top else num_runs * MESSAGE_WORDS
    return triton.cdiv(words, CHUNK_WORDS)


@triton.jit
def _pack_message_kernel(
    token_ids_ptr,
    logprobs_ptr,
    sampler_faults_ptr,
    input_faults_ptr,
    rows_ptr,
    positions_ptr,
    flags_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    message_ptr,
    max_runs,
    num_runs,
    max_top,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    runs = tl.program_id(0) * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    mask = runs < num_runs
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    record = message_ptr + runs * 8
    logprobs = tl.load(logprobs_ptr + runs, mask=mask, other=0.0)
    tl.store(record, tl.load(token_ids_ptr + runs, mask=mask, other=0), mask=mask)
    tl.store(record + 1, logprobs.to(tl.int32, bitcast=True), mask=mask)
    tl.store(record + 2, tl.load(sampler_faults_ptr + runs, mask=mask, other=0), mask=mask)
    tl.store(record + 3, tl.load(input_faults_ptr + runs, mask=mask, other=0), mask=mask)
    tl.store(record + 4, tl.load(rows_ptr + runs, mask=mask, other=0), mask=mask)
    tl.store(record + 5, tl.load(positions_ptr + runs, mask=mask, other=0), mask=mask)
    tl.store(record + 6, tl.load(flags_ptr + runs, mask=mask, other=0), mask=mask)
    if BLOCK_TOP > 0:
        places = tl.arange(0, BLOCK_TOP)
        at = runs[:, None] * max_top + places[None, :]
        top_mask = mask[:, None] & (places < max_top)[None, :]
        top = message_ptr + max_runs * 8
        tl.store(top + at, tl.load(top_ids_ptr + at, mask=top_mask, other=0), mask=top_mask)
        values = tl.load(top_logprobs_ptr + at, mask=top_mask, other=0.0)
        tl.store(top + max_runs * max_top + at, values.to(tl.int32, bitcast=True), mask=top_mask)


@triton.jit
def _apply_message_kernel(
    message_ptr,
    tokens_ptr,
    lengths_ptr,
    slot_ptr,
    tokens_stride,
    max_len,
    max_runs,
    num_runs,
    max_top,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
):
    runs = tl.program_id(0) * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    mask = runs < num_runs
    record = message_ptr + runs * 8
    token = tl.load(record, mask=mask, other=0)
    result = slot_ptr + runs * 4
    tl.store(result, token, mask=mask)
    for word in tl.static_range(1, 4):
        tl.store(result + word, tl.load(record + word, mask=mask, other=0), mask=mask)
    row = tl.load(record + 4, mask=mask, other=0).to(tl.int64)
    position = tl.load(record + 5, mask=mask, other=0)
    samples = mask & ((tl.load(record + 6, mask=mask, other=0) & 1) != 0) & (position < max_len)
    tl.store(tokens_ptr + row * tokens_stride + position, token, mask=samples)
    tl.store(lengths_ptr + row, position + 1, mask=samples)
    if BLOCK_TOP > 0:
        places = tl.arange(0, BLOCK_TOP)
        at = runs[:, None] * max_top + places[None, :]
        top_mask = mask[:, None] & (places < max_top)[None, :]
        source, target = message_ptr + max_runs * 8, slot_ptr + max_runs * 4
        tl.store(target + at, tl.load(source + at, mask=top_mask, other=0), mask=top_mask)
        values = tl.load(source + max_runs * max_top + at, mask=top_mask, other=0)
        tl.store(target + max_runs * max_top + at, values, mask=top_mask)


def pack_message(
    sampled: Sampled, step: StepInput, num_runs: int, message: torch.Tensor, max_runs: int, *, pdl: bool = False
) -> None:
    """Write the message of the first `num_runs` runs into message, int32 [chunks, CHUNK_WORDS]."""
    max_top = sampled.top_ids.shape[1]
    block_runs = 128 if not max_top else 16
    _pack_message_kernel[(triton.cdiv(num_runs, block_runs),)](
        sampled.token_ids,
        sampled.logprobs,
        sampled.faults,
        step.faults,
        step.run_rows,
        step.sample_positions,
        step.run_flags,
        sampled.top_ids,
        sampled.top_logprobs,
        message,
        max_runs,
        num_runs,
        max_top,
        BLOCK_RUNS=block_runs,
        BLOCK_TOP=triton.next_power_of_2(max_top) if max_top else 0,
        USE_PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )


def apply_message(
    message: torch.Tensor, rows: RowState, slot: torch.Tensor, num_runs: int, max_runs: int, max_top: int
) -> None:
    """Append the tokens to their rows and write the slot, int32 [result_slot_words(max_runs, max_top)]."""
    block_runs = 128 if not max_top else 16
    _apply_message_kernel[(triton.cdiv(num_runs, block_runs),)](
        message,
        rows.tokens,
        rows.lengths,
        slot,
        rows.tokens.stride(0),
        rows.tokens.shape[1],
        max_runs,
        num_runs,
        max_top,
        BLOCK_RUNS=block_runs,
        BLOCK_TOP=triton.next_power_of_2(max_top) if max_top else 0,
        num_warps=4,
    )
