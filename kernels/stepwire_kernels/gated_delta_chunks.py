"""The gated delta rule of runs of several tokens, 64 at a time.

Of a chunk, with g_t the product of its decays up to token t and S the matrix before it (`gated_delta.py` has the rule a
token at a time):

    A_ij = beta_i (g_i / g_j) (k_i . k_j) for j < i, else 0
    D = (I + A)^-1 diag(beta) (V - diag(g) K S)                       [tokens, value_dim]
    O = diag(g) Q S + tril((g_i / g_j) (q_i . k_j)) D
    S <- g_C S + sum over j of (g_C / g_j) k_j d_j^T

The inverses need no S: one launch computes those of all chunks at once (by substitution, a row at a time: products of
powers of A would lose everything to cancellation where keys are alike). Another goes through each run's chunks, S in
registers, a program for each part of a head's values. Quotients of decays are exponentials of differences, at most 1.
Products of bfloat16 models are rounded to TF32, others are three such products, which lose next to nothing.

Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024; Yang et al., "Parallelizing Linear Transformers with
the Delta Rule over Sequence Length", 2024.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepwire_kernels.delta_runs import DeltaColumns, DeltaRuns, load_unit, log_decay_of, run_of_place
from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream

CHUNK_TOKENS = 64
BLOCK_VALUES = 32


@triton.jit
def _strengths(pair_ptr, token, mask, pairs_stride, log_rate, bias, DECAY_AT: tl.constexpr):
    """beta (0 for tokens that are not there) and the sums of the logarithms of decays, [tokens] each."""
    at = pair_ptr + token.to(tl.int64) * pairs_stride
    beta = tl.where(mask, tl.sigmoid(tl.load(at, mask=mask, other=0.0).to(tl.float32)), 0.0)
    decay = log_decay_of(tl.load(at + DECAY_AT, mask=mask, other=0.0).to(tl.float32) + bias, log_rate)
    return beta, tl.cumsum(tl.where(mask, decay, 0.0), axis=0)


@triton.jit
def _delta_inverse_kernel(
    qkv_ptr,
    pairs_ptr,
    log_rate_ptr,
    bias_ptr,
    inverses_ptr,
    query_starts_ptr,
    kv_lens_ptr,
    num_runs,
    qkv_stride,
    pairs_stride,
    NUM_KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    DECAY_AT: tl.constexpr,
    STRENGTH_STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    place = tl.program_id(0)
    head = tl.program_id(1)
    group = head // GROUP
    log_rate = tl.load(log_rate_ptr + head)
    bias = tl.load(bias_ptr + head)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    run, chunk = run_of_place(query_starts_ptr, place, num_runs, CHUNK, BLOCK_RUNS)
    start = tl.load(query_starts_ptr + run)
    length = tl.load(query_starts_ptr + run + 1) - start
    if (chunk * CHUNK < length) & (length > 1) & (tl.load(kv_lens_ptr + run) > 0):
        line = tl.arange(0, CHUNK)
        token = start + chunk * CHUNK + line
        mask = chunk * CHUNK + line < length
        keys = NUM_KEY_HEADS * KEY_DIM + group * KEY_DIM + tl.arange(0, KEY_DIM)
        k = load_unit(qkv_ptr + token.to(tl.int64)[:, None] * qkv_stride + keys[None, :], mask, KEY_DIM)
        pair = pairs_ptr + group * STRENGTH_STRIDE + head % GROUP
        beta, total = _strengths(pair, token, mask, pairs_stride, log_rate, bias, DECAY_AT)
        between = tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0))
        system = beta[:, None] * between * tl.dot(k, tl.trans(k), input_precision=PRECISION)
        system = tl.where(line[:, None] > line[None, :], system, 0.0)
        inverse = tl.where(line[:, None] == line[None, :], 1.0, 0.0)
        for number in range(1, CHUNK):
            is_line = (line == number)[:, None]
            weights = tl.sum(tl.where(is_line, system, 0.0), axis=0)  # [CHUNK]: of the lines above
            above = tl.sum(weights[:, None] * inverse, axis=0)
            inverse = tl.where(is_line, inverse - above[None, :], inverse)
        at = inverses_ptr + (place.to(tl.int64) * (NUM_KEY_HEADS * GROUP) + head) * (CHUNK * CHUNK)
        tl.store(at + line[:, None] * CHUNK + line[None, :], inverse)


@triton.jit
def _delta_chunks_kernel(
    qkv_ptr,
    pairs_ptr,
    log_rate_ptr,
    bias_ptr,
    matrices_ptr,
    inverses_ptr,
    out_ptr,
    query_starts_ptr,
    kv_lens_ptr,
    run_rows_ptr,
    qkv_stride,
    pairs_stride,
    query_scale,
    NUM_KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DECAY_AT: tl.constexpr,
    STRENGTH_STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    run = tl.program_id(0)
    head = tl.program_id(1)
    values = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    keys = tl.arange(0, KEY_DIM)
    line = tl.arange(0, CHUNK)
    group = head // GROUP
    NUM_HEADS: tl.constexpr = NUM_KEY_HEADS * GROUP
    log_rate = tl.load(log_rate_ptr + head)
    bias = tl.load(bias_ptr + head)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    start = tl.load(query_starts_ptr + run)
    length = tl.load(query_starts_ptr + run + 1) - start
    kv_len = tl.load(kv_lens_ptr + run)
    num_chunks = (length + CHUNK - 1) // CHUNK
    out_at = out_ptr + head * VALUE_DIM + values[None, :]
    if kv_len == 0:
        for chunk in range(0, num_chunks):
            offset = chunk * CHUNK + line
            at = out_at + (start + offset).to(tl.int64)[:, None] * (NUM_HEADS * VALUE_DIM)
            nothing = tl.zeros([CHUNK, BLOCK_V], dtype=tl.float32).to(out_ptr.dtype.element_ty)
            tl.store(at, nothing, mask=(offset < length)[:, None])
    elif length > 1:
        number = tl.load(run_rows_ptr + run).to(tl.int64) * NUM_HEADS + head
        matrix_at = matrices_ptr + number * (KEY_DIM * VALUE_DIM) + keys[:, None] * VALUE_DIM + values[None, :]
        matrix = tl.load(matrix_at, mask=(keys[:, None] >= 0) & (kv_len > length), other=0.0)
        inverses_ptr += ((start // CHUNK + run).to(tl.int64) * NUM_HEADS + head) * (CHUNK * CHUNK)
        pair = pairs_ptr + group * STRENGTH_STRIDE + head % GROUP
        qkv_ptr += start.to(tl.int64) * qkv_stride + group * KEY_DIM
        value_ptr = qkv_ptr + 2 * NUM_KEY_HEADS * KEY_DIM + head * VALUE_DIM - group * KEY_DIM
        out_at += start.to(tl.int64) * (NUM_HEADS * VALUE_DIM)
        pair += start.to(tl.int64) * pairs_stride
        for chunk in range(0, num_chunks):
            offset = chunk * CHUNK + line
            mask = offset < length
            beta, total = _strengths(pair, offset, mask, pairs_stride, log_rate, bias, DECAY_AT)
            grown = tl.exp(total)[:, None]
            rows = offset[:, None] * qkv_stride
            k = load_unit(qkv_ptr + NUM_KEY_HEADS * KEY_DIM + rows + keys[None, :], mask, KEY_DIM)
            v = tl.load(value_ptr + rows + values[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
            wanted = beta[:, None] * (v - grown * tl.dot(k, matrix, input_precision=PRECISION))
            inverse = tl.load(inverses_ptr + line[:, None] * CHUNK + line[None, :])
            inverses_ptr += NUM_HEADS * CHUNK * CHUNK
            change = tl.dot(inverse, wanted, input_precision=PRECISION)  # [CHUNK, BLOCK_V]
            q = load_unit(qkv_ptr + rows + keys[None, :], mask, KEY_DIM) * query_scale
            seen = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            seen *= tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0))
            seen = tl.where(line[:, None] >= line[None, :], seen, 0.0)
            out = grown * tl.dot(q, matrix, input_precision=PRECISION)
            out += tl.dot(seen, change, input_precision=PRECISION)
            at = out_at + offset[:, None] * (NUM_HEADS * VALUE_DIM)
            tl.store(at, out.to(out_ptr.dtype.element_ty), mask=mask[:, None])
            # Tokens that are not there decay nothing: the last sum is that of the last token.
            whole = tl.sum(tl.where(line == CHUNK - 1, total, 0.0), axis=0)
            left = k * tl.exp(whole - total)[:, None]
            matrix = tl.exp(whole) * matrix + tl.dot(tl.trans(left), change, input_precision=PRECISION)
        tl.store(matrix_at, matrix)


def delta_chunks(
    qkv: torch.Tensor,
    pairs: torch.Tensor,
    log_rate: torch.Tensor,
    bias: torch.Tensor,
    matrices: torch.Tensor,
    columns: DeltaColumns,
    runs: DeltaRuns,
    out: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """The runs of several tokens, and padding, of `gated_delta`, whose arguments these are."""
    heads, num_places = columns.num_value_heads, runs.num_places(qkv.shape[0], CHUNK_TOKENS)
    # [places, value_heads, CHUNK, CHUNK]
    size = (num_places, heads, CHUNK_TOKENS, CHUNK_TOKENS)
    inverses = torch.empty(size, dtype=torch.float32, device=qkv.device)
    precision = "tf32" if qkv.dtype == torch.bfloat16 else "tf32x3"
    sizes = {
        "NUM_KEY_HEADS": columns.num_key_heads,
        "GROUP": columns.group_size,
        "KEY_DIM": columns.key_dim,
        "DECAY_AT": columns.decay,
        "STRENGTH_STRIDE": columns.strength_stride,
        "CHUNK": CHUNK_TOKENS,
        "PRECISION": precision,
    }
    _delta_inverse_kernel[(num_places, heads)](
        qkv,
        pairs,
        log_rate,
        bias,
        inverses,
        runs.query_starts,
        runs.kv_lens,
        runs.num_runs,
        qkv.stride(0),
        pairs.stride(0),
        **sizes,
        BLOCK_RUNS=triton.next_power_of_2(runs.num_runs),
        USE_PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    block = min(BLOCK_VALUES, columns.value_dim)
    _delta_chunks_kernel[(runs.num_runs, heads, columns.value_dim // block)](
        qkv,
        pairs,
        log_rate,
        bias,
        matrices,
        inverses,
        out,
        runs.query_starts,
        runs.kv_lens,
        runs.run_rows,
        qkv.stride(0),
        pairs.stride(0),
        columns.key_dim**-0.5,
        VALUE_DIM=columns.value_dim,
        **sizes,
        BLOCK_V=block,
        USE_PDL=pdl,
        num_warps=4,
        # Without room for tiles that are loaded ahead: the matrices of a chunk take half of the shared memory.
        num_stages=1,
        **launch_options(pdl),
    )
