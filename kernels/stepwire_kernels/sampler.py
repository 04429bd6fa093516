"""Sampling without a sort: from logits to one token id a run.

For a run with parameters of its row (`step_input.PARAM_*`), raw logits l, token counts c and prompt occurrence o:

    z = l + bias                                     sparse, per row
    z = -inf where the grammar mask's bit is 0
    z = z / r if z > 0 else z * r                    where the token occurs in prompt or output (repetition r)
    z = z - frequency * c - presence * (c > 0)       output tokens only
    t = z / temperature
    keep t >= max(t) + log(min_p)                    min-p
    keep t >= the k-th largest kept t                top-k (all ties kept)
    keep v if the kept mass above v is < p * Z       top-p over what is left, Z its mass (all ties kept)
    token = argmax over kept of t + gumbel           temperature 0: argmax of z (lowest id among ties)

The noise is a function of (seed, sequence index, position, token id) alone (`philox.py`): a run's token never depends
on its neighbours, its place in the batch, or what came before a restart. Log-probabilities are those of the raw logits:
l - logsumexp(l).

logits: [num_runs, vocab_size] bf16 / f16 / f32. masks: int32 [num_masks, ceil(vocab_size / 32)], bit i of word w is
token 32 w + i. Kernels: scores, over (vocabulary splits, runs) (`sampler_scores.py`); weights and candidates of the
rows that filter, over (stretches of the vocabulary, runs), where other rows' programs end at once
(`sampler_filters.py`, `threshold_search.py`); one program a run that finishes it; and one for top log-probabilities,
if asked for.

Source: Gumbel-max trick: Maddison et al., "A* Sampling", 2014; nucleus: Holtzman et al., 2020; min-p: Nguyen et al.,
2024; repetition penalty: Keskar et al., "CTRL", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels import philox
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.sampler_filters import filtered_token, sampler_candidates_kernel
from stepwire_kernels.sampler_scores import row_filters, sampler_score_kernel
from stepwire_kernels.step_input import RowState
from stepwire_kernels.threshold_search import (
    CAPACITY,
    LOWEST_KEY,
    PASS_TILE,
    STRETCH_TOKENS,
    WEIGH_WIDTH,
    WEIGHTS_WIDTH,
    copy_candidates,
    float_to_key,
    key_to_float,
    narrow_interval,
)

FAULT_NAN_LOGITS = 2
FAULT_NO_TOKEN = 4  # masks and biases exclude every token
MAX_TOP_LOGPROBS = 32
MAX_VOCAB_SIZE = 2**20


@dataclass(frozen=True)
class SamplerWorkspace:
    """Scratch of the sampler for up to `max_runs` runs; about 4 bytes * vocab_size a run."""

    adjusted: torch.Tensor  # float32 [max_runs, vocab_size]: t of the rows that filter
    partial: torch.Tensor  # float32 [max_runs, num_splits, 4]: best score, raw maximum, raw exp sum, NaN count
    partial_ids: torch.Tensor  # int32 [max_runs, num_splits]
    weights: torch.Tensor  # float32 [max_runs, num_stretches, WEIGHTS_WIDTH]: the pivots' counts and masses
    candidate_values: torch.Tensor  # float32 [max_runs, CAPACITY]
    candidate_ids: torch.Tensor  # int32 [max_runs, CAPACITY]


@dataclass(frozen=True)
class Sampled:
    """One step's samples."""

    token_ids: torch.Tensor  # int32 [num_runs]
    logprobs: torch.Tensor  # float32 [num_runs]
    faults: torch.Tensor  # int32 [num_runs]: FAULT_NAN_LOGITS, FAULT_NO_TOKEN or 0
    top_ids: torch.Tensor  # int32 [num_runs, max_top_logprobs]; -1 past the row's number
    top_logprobs: torch.Tensor  # float32 [num_runs, max_top_logprobs]


def allocate_sampler_workspace(max_runs: int, vocab_size: int, device: torch.device | str) -> SamplerWorkspace:
    """Scratch for `max_runs` runs.

    Raises:
        ValueError: a vocabulary beyond MAX_VOCAB_SIZE.
    """
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"sampler: a vocabulary of {vocab_size} exceeds {MAX_VOCAB_SIZE} tokens")
    splits = triton.cdiv(vocab_size, philox.TILE_TOKENS)
    return SamplerWorkspace(
        adjusted=torch.empty((max_runs, vocab_size), dtype=torch.float32, device=device),
        partial=torch.empty((max_runs, splits, 4), dtype=torch.float32, device=device),
        partial_ids=torch.empty((max_runs, splits), dtype=torch.int32, device=device),
        weights=torch.empty(
            (max_runs, triton.cdiv(vocab_size, STRETCH_TOKENS), WEIGHTS_WIDTH), dtype=torch.float32, device=device
        ),
        candidate_values=torch.empty((max_runs, CAPACITY), dtype=torch.float32, device=device),
        candidate_ids=torch.empty((max_runs, CAPACITY), dtype=torch.int32, device=device),
    )


def allocate_sampled(max_runs: int, max_top_logprobs: int, device: torch.device | str) -> Sampled:
    """Output buffers; `max_top_logprobs` up to MAX_TOP_LOGPROBS.

    Raises:
        ValueError: more top log-probabilities than the kernel makes.
    """
    if max_top_logprobs > MAX_TOP_LOGPROBS:
        raise ValueError(f"sampler: at most {MAX_TOP_LOGPROBS} top log-probabilities, got {max_top_logprobs}")
    return Sampled(
        token_ids=torch.zeros(max_runs, dtype=torch.int32, device=device),
        logprobs=torch.zeros(max_runs, dtype=torch.float32, device=device),
        faults=torch.zeros(max_runs, dtype=torch.int32, device=device),
        top_ids=torch.full((max_runs, max_top_logprobs), -1, dtype=torch.int32, device=device),
        top_logprobs=torch.zeros((max_runs, max_top_logprobs), dtype=torch.float32, device=device),
    )


@triton.jit
def _finish_kernel(
    logits_ptr,
    run_rows_ptr,
    positions_ptr,
    parameters_ptr,
    adjusted_ptr,
    partial_ptr,
    partial_ids_ptr,
    weights_ptr,
    candidate_values_ptr,
    candidate_ids_ptr,
    token_ids_ptr,
    logprobs_ptr,
    faults_ptr,
    logits_stride,
    vocab_size,
    num_splits,
    num_stretches,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_STRETCHES: tl.constexpr,
    TILE: tl.constexpr,
    LIMIT: tl.constexpr,
    LANE: tl.constexpr,
    LOWEST: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    row = tl.load(run_rows_ptr + run).to(tl.int64)
    position = tl.load(positions_ptr + run)
    parameters = parameters_ptr + row * 16
    _, _, _, _, restricts = row_filters(parameters, vocab_size)
    splits = tl.arange(0, BLOCK_SPLITS)
    in_row = splits < num_splits
    partial = partial_ptr + (run * num_splits + splits) * 4
    best = tl.load(partial, mask=in_row, other=float("-inf"))
    raw_max = tl.load(partial + 1, mask=in_row, other=float("-inf"))
    raw_sum = tl.load(partial + 2, mask=in_row, other=0.0)
    num_nan = tl.sum(tl.load(partial + 3, mask=in_row, other=0.0), axis=0)
    ids = tl.load(partial_ids_ptr + run * num_splits + splits, mask=in_row, other=0x7FFFFFFF)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, ids, 0x7FFFFFFF), axis=0)
    peak = tl.max(raw_max, axis=0)
    log_total = peak + tl.log(tl.sum(raw_sum * tl.exp(raw_max - peak), axis=0))
    if restricts & (top > float("-inf")) & (top < float("inf")):
        token = filtered_token(
            adjusted_ptr + run * vocab_size,
            weights_ptr + run * num_stretches * 16,
            candidate_values_ptr + run * LIMIT,
            candidate_ids_ptr + run * LIMIT,
            parameters,
            vocab_size,
            num_stretches,
            top,
            position,
            BLOCK_STRETCHES,
            TILE,
            LIMIT,
            LANE,
            LOWEST,
        )
    # All -inf (or NaN): there is no token to draw. Stay inside the vocabulary and say so.
    token = tl.where((token < 0) | (token >= vocab_size), 0, token)
    drawable = (num_nan == 0.0) & (top > float("-inf")) & (top < float("inf"))
    chosen = tl.load(logits_ptr + run * logits_stride + token).to(tl.float32)
    tl.store(token_ids_ptr + run, token)
    tl.store(logprobs_ptr + run, chosen - log_total)
    # Sound logits of which the masks leave nothing are the request's fault, anything else is the model's.
    finite = (num_nan == 0.0) & (peak > float("-inf")) & (peak < float("inf"))
    tl.store(faults_ptr + run, tl.where(drawable, 0, tl.where(finite, 4, 2)))


@triton.jit
def _top_logprobs_kernel(
    logits_ptr,
    run_rows_ptr,
    parameters_ptr,
    partial_ptr,
    candidate_values_ptr,
    candidate_ids_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    logits_stride,
    vocab_size,
    num_splits,
    max_top,
    BLOCK_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    LIMIT: tl.constexpr,
    LOWEST: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    row = tl.load(run_rows_ptr + run).to(tl.int64)
    wanted = tl.minimum(tl.load(parameters_ptr + row * 16 + 11), tl.minimum(max_top, vocab_size))
    outputs = tl.arange(0, 32)
    tl.store(top_ids_ptr + run * max_top + outputs, tl.full([32], -1, tl.int32), mask=outputs < max_top)
    tl.store(top_logprobs_ptr + run * max_top + outputs, tl.zeros([32], tl.float32), mask=outputs < max_top)
    if wanted > 0:
        splits = tl.arange(0, BLOCK_SPLITS)
        in_row = splits < num_splits
        partial = partial_ptr + (run * num_splits + splits) * 4
        raw_max = tl.load(partial + 1, mask=in_row, other=float("-inf"))
        raw_sum = tl.load(partial + 2, mask=in_row, other=0.0)
        peak = tl.max(raw_max, axis=0)
        log_total = peak + tl.log(tl.sum(raw_sum * tl.exp(raw_max - peak), axis=0))
        values_ptr = logits_ptr + run * logits_stride
        scratch_values = candidate_values_ptr + run * LIMIT
        scratch_ids = candidate_ids_ptr + run * LIMIT
        high = float_to_key(peak)
        low = tl.full([], LOWEST, tl.int32)
        low, _, count, _ = narrow_interval(
            values_ptr, vocab_size, peak, low, high, wanted.to(tl.float32), wanted < 0, TILE, LIMIT
        )
        # With more ties at the lowest wanted value than fit, those above it come first.
        found = tl.full([], 0, tl.int32)
        if count > LIMIT:
            found = copy_candidates(
                values_ptr, vocab_size, low + 1, high, found, scratch_values, scratch_ids, TILE, LIMIT
            )
            high = low
        found = copy_candidates(values_ptr, vocab_size, low, high, found, scratch_values, scratch_ids, TILE, LIMIT)
        offsets = tl.arange(0, LIMIT)
        present = offsets < found
        values = tl.load(scratch_values + offsets, mask=present, other=float("-inf"))
        ids = tl.load(scratch_ids + offsets, mask=present, other=0x7FFFFFFF)
        # Keys, so that a token of -inf can still be told from one already taken.
        keys = tl.where(present, float_to_key(values), -2147483648)
        for place in range(0, wanted):
            best = tl.max(keys, axis=0)
            token = tl.min(tl.where(keys == best, ids, 0x7FFFFFFF), axis=0)
            tl.store(top_ids_ptr + run * max_top + place, token)
            tl.store(top_logprobs_ptr + run * max_top + place, key_to_float(best) - log_total)
            keys = tl.where(ids == token, -2147483648, keys)


def sample(
    logits: torch.Tensor,
    run_rows: torch.Tensor,
    sample_positions: torch.Tensor,
    rows: RowState,
    workspace: SamplerWorkspace,
    out: Sampled,
    *,
    masks: torch.Tensor | None = None,
    mask_rows: torch.Tensor | None = None,
    pdl: bool = False,
) -> Sampled:
    """Draw one token for every run into `out` (whose buffers may be longer than num_runs).

    run_rows, sample_positions: int32 [>= num_runs]; mask_rows: int32 [>= num_runs], the run's row of `masks` or -1.
    Top log-probabilities are made when `out` has room for them, as many as the row asks for.

    Raises:
        ValueError: logits that do not fit the workspace, or masks without mask_rows.
    """
    num_runs, vocab_size = logits.shape
    if workspace.adjusted.shape[0] < num_runs or workspace.adjusted.shape[1] != vocab_size or logits.stride(1) != 1:
        raise ValueError(
            f"sample: logits {tuple(logits.shape)} (contiguous columns) do not fit a workspace for "
            f"{tuple(workspace.adjusted.shape)}"
        )
    if (masks is None) != (mask_rows is None):
        raise ValueError("sample: give masks and mask_rows together")
    has_counts = rows.token_counts.shape[0] > 0
    if has_counts and rows.token_counts.shape[1] != vocab_size:
        raise ValueError(f"sample: token counts are for {rows.token_counts.shape[1]} tokens, logits for {vocab_size}")
    num_splits = triton.cdiv(vocab_size, philox.TILE_TOKENS)
    block_splits = triton.next_power_of_2(num_splits)
    options = launch_options(pdl)
    sampler_score_kernel[(num_splits, num_runs)](
        logits,
        run_rows,
        sample_positions,
        rows.parameters,
        rows.biases,
        rows.token_counts,
        run_rows if masks is None else masks,
        run_rows if mask_rows is None else mask_rows,
        workspace.adjusted,
        workspace.partial,
        workspace.partial_ids,
        logits.stride(0),
        0 if masks is None else masks.stride(0),
        vocab_size,
        MAX_BIASES=rows.biases.shape[2],
        HAS_MASKS=masks is not None,
        HAS_COUNTS=has_counts,
        LANE=philox.LANE_TOKENS,
        USE_PDL=pdl,
        num_warps=8,
        **options,
    )
    num_stretches = triton.cdiv(vocab_size, STRETCH_TOKENS)
    block_stretches = triton.next_power_of_2(num_stretches)
    for collects in (False, True):
        sampler_candidates_kernel[(num_stretches, num_runs)](
            run_rows,
            rows.parameters,
            workspace.adjusted,
            workspace.partial,
            workspace.weights,
            workspace.candidate_values,
            workspace.candidate_ids,
            vocab_size,
            num_splits,
            COLLECTS=collects,
            BLOCK_SPLITS=block_splits,
            BLOCK_STRETCHES=block_stretches,
            STRETCH=STRETCH_TOKENS,
            TILE=PASS_TILE if collects else WEIGH_WIDTH,
            LIMIT=CAPACITY,
            LOWEST=LOWEST_KEY,
            USE_PDL=pdl,
            num_warps=8 if collects else 4,
            **options,
        )
    _finish_kernel[(num_runs,)](
        logits,
        run_rows,
        sample_positions,
        rows.parameters,
        workspace.adjusted,
        workspace.partial,
        workspace.partial_ids,
        workspace.weights,
        workspace.candidate_values,
        workspace.candidate_ids,
        out.token_ids,
        out.logprobs,
        out.faults,
        logits.stride(0),
        vocab_size,
        num_splits,
        num_stretches,
        BLOCK_SPLITS=block_splits,
        BLOCK_STRETCHES=block_stretches,
        TILE=PASS_TILE,
        LIMIT=CAPACITY,
        LANE=philox.LANE_TOKENS,
        LOWEST=LOWEST_KEY,
        USE_PDL=pdl,
        num_warps=16,
        **options,
    )
    if out.top_ids.shape[1] > 0:
        _top_logprobs_kernel[(num_runs,)](
            logits,
            run_rows,
            rows.parameters,
            workspace.partial,
            workspace.candidate_values,
            workspace.candidate_ids,
            out.top_ids,
            out.top_logprobs,
            logits.stride(0),
            vocab_size,
            num_splits,
            out.top_ids.shape[1],
            BLOCK_SPLITS=block_splits,
            TILE=PASS_TILE,
            LIMIT=CAPACITY,
            LOWEST=LOWEST_KEY,
            USE_PDL=pdl,
            num_warps=16,
            **options,
        )
    return out
