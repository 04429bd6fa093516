"""Products of up to 16 tokens with packed 4-bit weights, all of a program's words on their way at once.

A program has some blocks of 16 rows and a run of inputs. It begins by copying all of their words to shared memory,
asynchronously, and only then waits for the kernel ahead of it. Shared memory, unlike registers, has room for the words
of this kernel's program beside those of the next kernel's, which therefore load while this one multiplies; and where a
device has more programs than room, those that wait for words share a multiprocessor with those that multiply.

Warps share the inputs: of every `WARPS` times 128 of them (a step) each takes 128. A thread copies the 16 bytes that
are its own (`packed_weight.py`) and reads them back, so that nothing crosses threads until warps' sums are added.
Codes enter the products as small integers plus a constant (`MAGIC`); a product of ones with the same inputs says how
much of that, and of the group's zero point, is to be subtracted; scales multiply float32 sums. Both are made ready
before the wait. Inputs are loaded straight into the registers from which products take them, once for all row blocks.

Written in Gluon, because Triton cannot be told what to copy before a wait. There is no interpreter for it: its tests
run its source on torch tensors, and again compiled on a GPU.
"""

# ruff: noqa: RUF005 (Triton's compiler knows no stars in tuples)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from stepwire_kernels.dependent_launch import launch_options
from stepwire_kernels.packed_inputs import (
    MAX_DIRECT_TOKENS,
    load_lines,
    load_operands,
    operands_at,
    operands_of_lines,
)
from stepwire_kernels.packed_launch import format_constants, weight_pointers
from stepwire_kernels.packed_weight import MAGIC_BITS, PackedWeight
from stepwire_kernels.packed_wgmma import barrier, grid_control, halves
from stepwire_kernels.split_k import LinearWorkspace

MAX_TOKENS = 16
# Scales and minima of a thread, two registers each, that are made ready before the wait.
MAX_SCALES_AHEAD = 24


@dataclass(frozen=True)
class InFlightTuning:
    """Launch shape: a program has 16 * `row_blocks` rows and 128 * `num_warps` * `steps` inputs.

    `inputs_ahead`: how many steps' inputs are in registers or on their way there. `max_registers` of a thread, 0: as
    many as the compiler takes.
    """

    row_blocks: int = 2
    num_warps: int = 8
    steps: int = 4
    inputs_ahead: int = 2
    max_registers: int = 0


@gluon.jit
def _operand(one, two, PLACE: gl.constexpr, magic, A: gl.constexpr, X: gl.constexpr):
    """Of two tiles' words [WARPS, 128] the PLACE-th 32 inputs as the left operand [WARPS, 16, 32]."""
    WARPS: gl.constexpr = one.shape[0]
    FIELD: gl.constexpr = 2 * (PLACE % 2)
    words = one if PLACE < 2 else two
    first = ((words >> (4 * FIELD)) & 0x000F000F) | magic
    second = ((words >> (4 * FIELD + 4)) & 0x000F000F) | magic
    both = gl.join(halves(first, X), halves(second, X))  # [warp, word, p, s]
    split = both.reshape([WARPS, 8, 4, 2, 2, 2, 2])  # [warp, g, t, h, r, p, s]
    turned = gl.permute(split, [0, 4, 1, 6, 3, 2, 5])  # [warp, r, g, s, h, t, p]
    return gl.convert_layout(turned.reshape([WARPS, 16, 32]), A, assert_trivial=True)


@gluon.jit
def _scales(
    scales_ptr, zeros_ptr, minima_ptr, first_input, BEYOND: gl.constexpr, rows, ROW: gl.constexpr, N, K,
    EXPONENTS: gl.constexpr, OFFSET: gl.constexpr, MAGIC: gl.constexpr, HAS_ZEROS: gl.constexpr,
    HAS_MINIMA: gl.constexpr, GROUP: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """(scale, minimum) of rows `rows` + ROW and the group of the inputs first_input [WARPS, 1] + BEYOND, [WARPS, 16].

    Zeros beyond the weight.
    """
    if GROUP <= 128:
        # `first_input` is a multiple of 128. What differs between two steps is one number for all threads.
        at = (first_input // GROUP) * N + rows + (BEYOND // GROUP) * N
    else:
        at = ((first_input + BEYOND) // GROUP) * N + rows
    mask = (rows + ROW < N) & (first_input + BEYOND < K)
    raw = _value(scales_ptr, at, ROW, mask, EVEN)
    scale = (raw.to(gl.int32) << 23).to(gl.float32, bitcast=True) if EXPONENTS else raw.to(gl.float32)
    minimum = scale * (OFFSET + MAGIC)
    if HAS_ZEROS:
        minimum = scale * (_value(zeros_ptr, at, ROW, mask, EVEN).to(gl.float32) + (OFFSET + MAGIC))
    if HAS_MINIMA:
        minimum = minimum + _value(minima_ptr, at, ROW, mask, EVEN).to(gl.float32)
    return scale, minimum


@gluon.jit
def _value(pointer, at, ROW: gl.constexpr, mask, EVEN: gl.constexpr):
    return gl.load(pointer + at + ROW) if EVEN else gl.load(pointer + at + ROW, mask=mask, other=0)


@gluon.jit(do_not_specialize=("num_tokens", "num_tiles", "magic"))
def _in_flight_kernel(
    x_ptr,
    words_ptr,
    high_ptr,
    scales_ptr,
    zeros_ptr,
    minima_ptr,
    outer_scales_ptr,
    outer_minima_ptr,
    row_scales_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    num_tokens,
    N,
    K,
    num_tiles,
    magic,
    x_stride,
    out_stride,
    EXPONENTS: gl.constexpr,
    OFFSET: gl.constexpr,
    MAGIC: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
    HAS_MINIMA: gl.constexpr,
    HAS_ROW_SCALES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GROUP: gl.constexpr,
    EVEN: gl.constexpr,
    SPLIT_K: gl.constexpr,
    STEPS: gl.constexpr,
    INPUTS_AHEAD: gl.constexpr,
    SCALES_AHEAD: gl.constexpr,
    WARPS: gl.constexpr,
    ROW_BLOCKS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    DIRECT: gl.constexpr,
    USE_PDL: gl.constexpr,
):
    X: gl.constexpr = x_ptr.dtype.element_ty
    # Inputs between two scales, and how many such runs there are in 128.
    RUN: gl.constexpr = 128 if GROUP > 128 else GROUP
    RUNS: gl.constexpr = 128 // RUN
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    B: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=ACC, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(2, ACC)
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0])
    SUMS: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[2, 1, 0])
    TAIL: gl.constexpr = gl.BlockedLayout([WARPS, 1, 1], [1, 16, 2], [1, 1, WARPS], [1, 2, 0])

    column = gl.program_id(0)
    split = gl.program_id(1)
    block = column * ROW_BLOCKS
    first_pair = split * (WARPS * STEPS)

    # Weights do not depend on earlier kernels: all of them are on their way before waiting for those.
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, WORDS))[:, None]
    word = gl.arange(0, 128, layout=gl.SliceLayout(0, WORDS))[None, :]
    words_at = words_ptr + (block.to(gl.int64) * num_tiles + 2 * first_pair) * 128 + (warp * 256 + word)
    apart = num_tiles * 128
    # One of its own for each copy: of one for all of them the compiler thinks that copies meet there.
    words = ()
    for step in gl.static_range(STEPS):
        for row in gl.static_range(ROW_BLOCKS):
            at = words_at + (row * apart + step * (WARPS * 256))
            one = gl.allocate_shared_memory(gl.int32, [WARPS, 128], FLAT)
            two = gl.allocate_shared_memory(gl.int32, [WARPS, 128], FLAT)
            if EVEN:
                async_copy.async_copy_global_to_shared(one, at)
                async_copy.async_copy_global_to_shared(two, at + 128)
            else:
                mask = (first_pair + step * WARPS + warp < num_tiles // 2) & ((block + row) * 16 < N) & (word >= 0)
                async_copy.async_copy_global_to_shared(one, at, mask=mask)
                async_copy.async_copy_global_to_shared(two, at + 128, mask=mask)
            words = words + (one, two)
        async_copy.commit_group()
    if USE_PDL:
        grid_control("griddepcontrol.launch_dependents;")
    own_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, ROWS))[:, None]
    own_row = block * 16 + gl.arange(0, 16, layout=gl.SliceLayout(0, ROWS))[None, :]
    own_input = (first_pair + own_warp) * 128
    ahead = ()
    if SCALES_AHEAD:
        for step in gl.static_range(STEPS):
            for row in gl.static_range(ROW_BLOCKS):
                for run in gl.static_range(RUNS):
                    scale, minimum = _scales(
                        scales_ptr, zeros_ptr, minima_ptr, own_input, step * (WARPS * 128) + run * RUN, own_row,
                        row * 16, N, K, EXPONENTS, OFFSET, MAGIC, HAS_ZEROS, HAS_MINIMA, GROUP, EVEN,
                    )  # fmt: skip
                    ahead = ahead + (scale, minimum)
    if USE_PDL:
        grid_control("griddepcontrol.wait;")

    x_at, lanes = operands_at(x_ptr, x_stride, first_pair * 128, num_tokens, B, WARPS, BLOCK_M)
    loaded = ()
    for step in gl.static_range(INPUTS_AHEAD):
        if DIRECT:
            loaded = loaded + (load_operands(x_at, lanes, step * (WARPS * 128), K, EVEN),)
        else:
            first_input = (first_pair + step * WARPS) * 128
            loaded = loaded + (load_lines(x_ptr, x_stride, first_input, num_tokens, K, EVEN, WARPS, BLOCK_M),)

    ones = gl.full([WARPS, 16, 32], 1.0, X, layout=A)
    nothing = gl.zeros([WARPS, 16, BLOCK_M], gl.float32, layout=ACC)
    sums = ()
    for _row in gl.static_range(ROW_BLOCKS):
        sums = sums + (nothing,)
    for step in gl.static_range(STEPS):
        if step + INPUTS_AHEAD < STEPS:
            if DIRECT:
                loaded = loaded + (load_operands(x_at, lanes, (step + INPUTS_AHEAD) * (WARPS * 128), K, EVEN),)
            else:
                first_input = (first_pair + (step + INPUTS_AHEAD) * WARPS) * 128
                loaded = loaded + (load_lines(x_ptr, x_stride, first_input, num_tokens, K, EVEN, WARPS, BLOCK_M),)
        inputs = loaded[step] if DIRECT else operands_of_lines(loaded[step], B)
        totals = ()
        for run in gl.static_range(RUNS):
            total = nothing
            for product in gl.static_range(RUN // 32):
                total = mma_v2(ones, inputs[run * (RUN // 32) + product], total)
            totals = totals + (total,)
        async_copy.wait_group(STEPS - 1 - step)
        following = ()
        for row in gl.static_range(ROW_BLOCKS):
            one = words[(step * ROW_BLOCKS + row) * 2].load(WORDS)
            two = words[(step * ROW_BLOCKS + row) * 2 + 1].load(WORDS)
            acc = sums[row]
            for run in gl.static_range(RUNS):
                part = nothing
                for product in gl.static_range(RUN // 32):
                    a = _operand(one, two, run * (RUN // 32) + product, magic, A, X)
                    part = mma_v2(a, inputs[run * (RUN // 32) + product], part)
                if SCALES_AHEAD:
                    scale = ahead[((step * ROW_BLOCKS + row) * RUNS + run) * 2]
                    minimum = ahead[((step * ROW_BLOCKS + row) * RUNS + run) * 2 + 1]
                else:
                    scale, minimum = _scales(
                        scales_ptr, zeros_ptr, minima_ptr, own_input, step * (WARPS * 128) + run * RUN, own_row,
                        row * 16, N, K, EXPONENTS, OFFSET, MAGIC, HAS_ZEROS, HAS_MINIMA, GROUP, EVEN,
                    )  # fmt: skip
                acc = acc + scale[:, :, None] * part
                acc = acc - minimum[:, :, None] * totals[run]
            following = following + (acc,)
        sums = following

    # Sums of the warps are added in their order, each number by one thread.
    by_warp = ()
    for row in gl.static_range(ROW_BLOCKS):
        by_warp = by_warp + (gl.allocate_shared_memory(gl.float32, [WARPS, 16, BLOCK_M], SUMS, sums[row]),)
    barrier()
    tail_row = gl.arange(0, 16, layout=gl.SliceLayout(1, gl.SliceLayout(0, TAIL)))[:, None]
    tail_token = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, gl.SliceLayout(0, TAIL)))[None, :]
    place = column.to(gl.int64) * (SPLIT_K * ROW_BLOCKS * 16 * BLOCK_M)
    offsets = tail_row * BLOCK_M + tail_token
    finished = ()
    for row in gl.static_range(ROW_BLOCKS):
        total = gl.sum(by_warp[row].load(TAIL), axis=0)
        if SPLIT_K > 1:
            gl.store(partial_ptr + place + (split * ROW_BLOCKS + row) * (16 * BLOCK_M) + offsets, total)
        finished = finished + (total,)
    finishes = split == SPLIT_K - 1
    if SPLIT_K > 1:
        # Every thread's stores must precede the one atomic that publishes them.
        barrier()
        finishes = gl.atomic_add(counters_ptr + column, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
    if finishes:
        out_at = out_ptr + tail_token.to(gl.int64) * out_stride
        for row in gl.static_range(ROW_BLOCKS):
            total = finished[row]
            if SPLIT_K > 1:
                total = gl.zeros([16, BLOCK_M], gl.float32, layout=gl.SliceLayout(0, TAIL))
                for other in gl.static_range(SPLIT_K):
                    part_at = partial_ptr + place + (other * ROW_BLOCKS + row) * (16 * BLOCK_M) + offsets
                    total = total + gl.load(part_at, cache_modifier=".cg")
            rows = (block + row) * 16 + tail_row
            if HAS_ROW_SCALES:
                total = total * gl.load(row_scales_ptr + rows, mask=rows < N, other=0.0)
            if HAS_BIAS:
                total = total + gl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(gl.float32)
            gl.store(out_at + rows, total.to(X), mask=(rows < N) & (tail_token < num_tokens))
        if SPLIT_K > 1:
            gl.store(counters_ptr + column, 0)


def takes(x: torch.Tensor, weight: PackedWeight) -> bool:
    """Whether the kernel is for such inputs and weights: 16 bits, 4-bit integers in groups with one level of scales."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and weight.high_words is None
        and not weight.is_e2m1
        and weight.outer_scales is None
        and weight.group_size % 32 == 0
    )


def serves(x: torch.Tensor, weight: PackedWeight) -> bool:
    """Whether the kernels of few tokens, this and `packed_ring`, multiply them: on devices with asynchronous copies."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 8 and takes(x, weight)


def check_served(name: str, x: torch.Tensor, weight: PackedWeight) -> None:
    """Raise ValueError for what the kernels of few tokens do not take."""
    if not takes(x, weight):
        raise ValueError(f"{name}: takes 16-bit inputs and 4-bit integers, got {x.dtype}")
    if x.shape[0] > MAX_TOKENS:
        raise ValueError(f"{name}: takes up to {MAX_TOKENS} tokens, got {x.shape[0]}")


def shared_memory(tuning: InFlightTuning) -> int:
    """Bytes that a program takes: words, and where inputs change threads."""
    return tuning.num_warps * (tuning.row_blocks * tuning.steps * 1024 + 1024)


def in_flight_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    workspace: LinearWorkspace,
    tuning: InFlightTuning,
    out: torch.Tensor,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """x [num_tokens, K] -> out [num_tokens, N]; other checks and the choice of a road: `packed_linear`.

    Raises:
        ValueError: this kernel does not serve them, or has no such launch shape.
    """
    num_tokens, n, k = x.shape[0], weight.num_outputs, weight.num_inputs
    check_served("in_flight_linear", x, weight)
    pairs, rows = weight.num_tiles // 2, 16 * tuning.row_blocks
    block_m = 8 if num_tokens <= 8 else 16
    columns, splits = triton.cdiv(n, rows), triton.cdiv(pairs, tuning.num_warps * tuning.steps)
    if splits > 1 and (
        columns * splits * rows * block_m > workspace.partial.numel() or columns > workspace.counters.numel()
    ):
        raise ValueError(f"in_flight_linear: {tuning} takes more workspace for [{n}, {k}] than there is")
    constants = format_constants(weight, x.dtype, streams=False)
    for name in ("HIGH_BITS", "IS_E2M1", "HAS_OUTER", "SUBTRACTS"):
        del constants[name]
    options = launch_options(pdl) | ({"maxnreg": tuning.max_registers} if tuning.max_registers else {})
    scales = tuning.row_blocks * tuning.steps * (128 // min(128, weight.group_size))
    _in_flight_kernel[(columns, splits)](
        x,
        *weight_pointers(weight),
        weight.scales if weight.row_scales is None else weight.row_scales,
        x if bias is None else bias,
        out,
        workspace.partial,
        workspace.counters,
        num_tokens,
        n,
        k,
        weight.num_tiles,
        MAGIC_BITS[x.dtype],
        x.stride(0),
        out.stride(0),
        **constants,
        HAS_ROW_SCALES=weight.row_scales is not None,
        HAS_BIAS=bias is not None,
        EVEN=k % (128 * tuning.num_warps * tuning.steps) == 0 and n % rows == 0,
        SPLIT_K=splits,
        STEPS=tuning.steps,
        INPUTS_AHEAD=min(tuning.inputs_ahead, tuning.steps),
        SCALES_AHEAD=scales <= MAX_SCALES_AHEAD,
        WARPS=tuning.num_warps,
        ROW_BLOCKS=tuning.row_blocks,
        BLOCK_M=block_m,
        DIRECT=num_tokens <= MAX_DIRECT_TOKENS,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **options,
    )
    return out
