"""A step's results, gathered into one record array that the host reads.

The array is a ring of slots in page-locked host memory, written by the GPU directly: no copy has to be queued behind
the step, and a captured graph writes to another slot at each replay, because the slot's number comes with the step
(word RESULT_SLOT_WORD of the step buffer, see `step_input.py`).

Slot (int32 words), for runs 0 .. num_runs - 1:

    records[max_runs, 4]         token id, log-probability (float32 bits), sampler fault, input fault
    top_ids[max_runs, max_top]   only with top log-probabilities
    top_logprobs[...]            the same shape, float32 bits
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.sampler import Sampled
from stepwire_kernels.step_input import StepInput

RESULT_WORDS = 4
RESULT_SLOT_WORD = 7
RESULT_TOKEN, RESULT_LOGPROB, RESULT_SAMPLER_FAULT, RESULT_INPUT_FAULT = range(RESULT_WORDS)


def result_slot_words(max_runs: int, max_top: int) -> int:
    """Words of one slot."""
    return max_runs * (RESULT_WORDS + 2 * max_top)


@triton.jit
def _pack_result_kernel(
    buffer_ptr,
    token_ids_ptr,
    logprobs_ptr,
    sampler_faults_ptr,
    input_faults_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    ring_ptr,
    slot_words,
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
    slot = ring_ptr + tl.load(buffer_ptr + 7).to(tl.int64) * slot_words
    record = slot + runs * 4
    tl.store(record, tl.load(token_ids_ptr + runs, mask=mask, other=0), mask=mask)
    logprobs = tl.load(logprobs_ptr + runs, mask=mask, other=0.0)
    tl.store(record + 1, logprobs.to(tl.int32, bitcast=True), mask=mask)
    tl.store(record + 2, tl.load(sampler_faults_ptr + runs, mask=mask, other=0), mask=mask)
    tl.store(record + 3, tl.load(input_faults_ptr + runs, mask=mask, other=0), mask=mask)
    if BLOCK_TOP > 0:
        places = tl.arange(0, BLOCK_TOP)
        at = runs[:, None] * max_top + places[None, :]
        top_mask = mask[:, None] & (places < max_top)[None, :]
        top = slot + max_runs * 4
        tl.store(top + at, tl.load(top_ids_ptr + at, mask=top_mask, other=0), mask=top_mask)
        values = tl.load(top_logprobs_ptr + at, mask=top_mask, other=0.0)
        tl.store(top + max_runs * max_top + at, values.to(tl.int32, bitcast=True), mask=top_mask)


def pack_result(
    buffer: torch.Tensor,
    sampled: Sampled,
    step: StepInput,
    num_runs: int,
    ring: torch.Tensor,
    max_runs: int,
    *,
    pdl: bool = False,
) -> None:
    """Write the results of the first `num_runs` runs into the slot that the step buffer names.

    ring: int32 [num_slots, result_slot_words(max_runs, max_top)], on the device or page-locked on the host; top
    log-probabilities are written where `sampled` has room for them.

    Raises:
        ValueError: slots that are too small for these runs.
    """
    max_top = sampled.top_ids.shape[1]
    if num_runs > max_runs or ring.shape[1] < result_slot_words(max_runs, max_top) or ring.dtype != torch.int32:
        raise ValueError(
            f"pack_result: {num_runs} runs with {max_top} top log-probabilities need int32 slots of "
            f"{result_slot_words(max(max_runs, num_runs), max_top)} words, got {ring.dtype} of {ring.shape[1]}"
        )
    block_top = triton.next_power_of_2(max_top) if max_top else 0
    block_runs = 128 if not max_top else 16
    _pack_result_kernel[(triton.cdiv(num_runs, block_runs),)](
        buffer,
        sampled.token_ids,
        sampled.logprobs,
        sampled.faults,
        step.faults,
        sampled.top_ids,
        sampled.top_logprobs,
        ring,
        ring.stride(0),
        max_runs,
        num_runs,
        max_top,
        BLOCK_RUNS=block_runs,
        BLOCK_TOP=block_top,
        USE_PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
