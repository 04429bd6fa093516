"""Products of up to 16 tokens with packed 4-bit weights: inputs stay in registers, all rows' words stream past them.

A program has a run of inputs, and rows that it takes some blocks of 16 at a time (a turn). Its warps share the inputs:
of every `WARPS` times 128 of them (a step) each has 128, as operands in registers, once for all rows. Words come by
asynchronous copies into a ring of slots, which are filled again as soon as a turn has read them, so that memory never
waits for a program to end and for another to begin. A thread copies the 16 bytes that are its own (`packed_weight.py`)
and reads them back. One barrier a turn: behind it the warps' sums are added, each number by one thread, and the turn's
slot is filled again.

The lowest 8 bits of a bfloat16 whose other bits are zero are an integer, times 2^-133: numbers below the normal ones
and those of the first exponent are equally far apart. So two codes of a byte are made numbers by a mask each, the upper
one as 16 times its value; inputs (below 2^31) are multiplied by 2^96, or by 2^92 where they meet upper codes.
In float16 only codes that lie lowest are taken (times 2^-24). Nothing is added to codes, so sums lose nothing to what
would be subtracted. Zero points are subtracted as in `packed_in_flight.py`.

Written in Gluon, as that file and for its reasons.
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
from stepwire_kernels.packed_in_flight import check_served
from stepwire_kernels.packed_inputs import (
    MAX_DIRECT_TOKENS,
    load_lines,
    load_operands,
    operands_at,
    operands_of_lines,
)
from stepwire_kernels.packed_launch import format_constants, weight_pointers
from stepwire_kernels.packed_weight import PackedWeight
from stepwire_kernels.packed_wgmma import barrier, grid_control, halves
from stepwire_kernels.split_k import LinearWorkspace

# Turns that are compiled one behind another instead of as a loop.
MAX_FLAT_TURNS = 6


@dataclass(frozen=True)
class RingTuning:
    """Launch shape: a program has 128 * `num_warps` * `steps` inputs, and 16 * `row_blocks` rows a turn.

    `columns`: programs that share the rows. `slots`: turns whose words are in shared memory or on their way there, at
    least 2. `max_registers` of a thread, 0: as many as the compiler takes. `trigger_first`: the next kernel may begin
    before this one's words are asked for.
    """

    columns: int = 128
    row_blocks: int = 1
    num_warps: int = 16
    steps: int = 2
    slots: int = 4
    max_registers: int = 0
    trigger_first: bool = False


@gluon.jit
def _operand(one, two, PLACE: gl.constexpr, A: gl.constexpr, X: gl.constexpr):
    """Of two tiles' words [WARPS, 128] the PLACE-th 32 inputs as the left operand [WARPS, 16, 32], scaled."""
    WARPS: gl.constexpr = one.shape[0]
    FIELD: gl.constexpr = 2 * (PLACE % 2)
    words = one if PLACE < 2 else two
    words = words >> (4 * FIELD) if FIELD > 0 else words
    first = words & 0x000F000F
    second = (words & 0x00F000F0) if gl.bfloat16 == X else ((words >> 4) & 0x000F000F)
    both = gl.join(halves(first, X), halves(second, X))  # [warp, word, p, s]
    split = both.reshape([WARPS, 8, 4, 2, 2, 2, 2])  # [warp, g, t, h, r, p, s]
    turned = gl.permute(split, [0, 4, 1, 6, 3, 2, 5])  # [warp, r, g, s, h, t, p]
    return gl.convert_layout(turned.reshape([WARPS, 16, 32]), A, assert_trivial=True)


@gluon.jit
def _value(pointer, at, mask, EVEN: gl.constexpr):
    return gl.load(pointer + at) if EVEN else gl.load(pointer + at, mask=mask, other=0)


@gluon.jit
def _load_scales(
    scales_ptr, zeros_ptr, minima_ptr, first_input, first_row, turn, N, K, HAS_ZEROS: gl.constexpr,
    HAS_MINIMA: gl.constexpr, GROUP: gl.constexpr, EVEN: gl.constexpr, STEPS: gl.constexpr, WARPS: gl.constexpr,
    ROW_BLOCKS: gl.constexpr,
):  # fmt: skip
    """(scale, zero, minimum) as they lie there, for each row block, step and run of inputs; [WARPS, 16] each.

    first_row: rows of the first turn's first block. Zeros beyond the weight; what a format lacks is its scale.
    """
    rows = first_row + turn * (ROW_BLOCKS * 16)
    RUN: gl.constexpr = 128 if GROUP > 128 else GROUP
    found = ()
    for row in gl.static_range(ROW_BLOCKS):
        for step in gl.static_range(STEPS):
            for run in gl.static_range(128 // RUN):
                beyond = step * (WARPS * 128) + run * RUN
                if GROUP <= 128:
                    at = (first_input // GROUP + beyond // GROUP) * N + rows + row * 16
                else:
                    at = ((first_input + beyond) // GROUP) * N + rows + row * 16
                mask = (rows + row * 16 < N) & (first_input + beyond < K)
                scale = _value(scales_ptr, at, mask, EVEN)
                zero, minimum = scale, scale
                if HAS_ZEROS:
                    zero = _value(zeros_ptr, at, mask, EVEN)
                if HAS_MINIMA:
                    minimum = _value(minima_ptr, at, mask, EVEN)
                found = found + (scale, zero, minimum)
    return found


@gluon.jit
def _copy_words(
    slot, first_at, turn, apart, pair_mask, first_block, N, EVEN: gl.constexpr, STEPS: gl.constexpr,
    WARPS: gl.constexpr, ROW_BLOCKS: gl.constexpr,
):  # fmt: skip
    """Begin to copy a turn's words. pair_mask: which of the weight's inputs there are, [WARPS, 128] for each step.

    first_at, first_block: of the first turn.
    """
    at = first_at + turn * (ROW_BLOCKS * apart)
    block = first_block + turn * ROW_BLOCKS
    for row in gl.static_range(ROW_BLOCKS):
        for step in gl.static_range(STEPS):
            one = slot[(row * STEPS + step) * 2]
            two = slot[(row * STEPS + step) * 2 + 1]
            words_at = at + (row * apart + step * (WARPS * 256))
            if EVEN:
                async_copy.async_copy_global_to_shared(one, words_at)
                async_copy.async_copy_global_to_shared(two, words_at + 128)
            else:
                mask = pair_mask[step] & ((block + row) * 16 < N)
                async_copy.async_copy_global_to_shared(one, words_at, mask=mask)
                async_copy.async_copy_global_to_shared(two, words_at + 128, mask=mask)


@gluon.jit
def _multiply(
    slot, sums, inputs, totals, scales, ACC: gl.constexpr, A: gl.constexpr, WORDS: gl.constexpr, X: gl.constexpr,
    EXPONENTS: gl.constexpr, OFFSET: gl.constexpr, HAS_ZEROS: gl.constexpr, HAS_MINIMA: gl.constexpr,
    RUN: gl.constexpr, STEPS: gl.constexpr, WARPS: gl.constexpr, ROW_BLOCKS: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Leave in `sums` what each warp's inputs bring to a turn's rows."""
    RUNS: gl.constexpr = 128 // RUN
    nothing = gl.zeros([WARPS, 16, BLOCK_M], gl.float32, layout=ACC)
    for row in gl.static_range(ROW_BLOCKS):
        acc = nothing
        for step in gl.static_range(STEPS):
            one = slot[(row * STEPS + step) * 2].load(WORDS)
            two = slot[(row * STEPS + step) * 2 + 1].load(WORDS)
            for run in gl.static_range(RUNS):
                part = nothing
                for product in gl.static_range(RUN // 32):
                    a = _operand(one, two, run * (RUN // 32) + product, A, X)
                    part = mma_v2(a, inputs[step * 4 + run * (RUN // 32) + product], part)
                raw = scales[((row * STEPS + step) * RUNS + run) * 3]
                scale = (raw.to(gl.int32) << 23).to(gl.float32, bitcast=True) if EXPONENTS else raw.to(gl.float32)
                acc = acc + scale[:, :, None] * part
                if HAS_ZEROS:
                    zero = scales[((row * STEPS + step) * RUNS + run) * 3 + 1].to(gl.float32)
                    acc = acc - (scale * (zero + OFFSET))[:, :, None] * totals[step * RUNS + run][:, None, :]
                elif OFFSET != 0:
                    acc = acc - (scale * OFFSET)[:, :, None] * totals[step * RUNS + run][:, None, :]
                if HAS_MINIMA:
                    minimum = scales[((row * STEPS + step) * RUNS + run) * 3 + 2].to(gl.float32)
                    acc = acc - minimum[:, :, None] * totals[step * RUNS + run][:, None, :]
        sums[row].store(acc)


@gluon.jit
def _add_up(
    sums, turn_block, row_scales_ptr, bias_ptr, out_at, token_mask, partial_at, tail_row, N, SUM_SCALE: gl.constexpr,
    HAS_ROW_SCALES: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT_K: gl.constexpr, TAIL: gl.constexpr,
    ROW_BLOCKS: gl.constexpr, X: gl.constexpr,
):  # fmt: skip
    """Add the warps' sums of a turn, in their order, and store them: as outputs, or as a part of them."""
    for row in gl.static_range(ROW_BLOCKS):
        total = gl.sum(sums[row].load(TAIL), axis=0) * SUM_SCALE
        if SPLIT_K > 1:
            gl.store(partial_at + (row * 16 + tail_row), total, mask=token_mask)
        else:
            _store_rows(
                total, (turn_block + row) * 16 + tail_row, row_scales_ptr, bias_ptr, out_at, token_mask, N,
                HAS_ROW_SCALES, HAS_BIAS, X,
            )  # fmt: skip


@gluon.jit
def _store_rows(
    total, rows, row_scales_ptr, bias_ptr, out_at, token_mask, N, HAS_ROW_SCALES: gl.constexpr, HAS_BIAS: gl.constexpr,
    X: gl.constexpr,
):  # fmt: skip
    if HAS_ROW_SCALES:
        total = total * gl.load(row_scales_ptr + rows, mask=rows < N, other=0.0)
    if HAS_BIAS:
        total = total + gl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(gl.float32)
    gl.store(out_at + rows, total.to(X), mask=(rows < N) & token_mask)


@gluon.jit(do_not_specialize=("num_tokens", "num_tiles"))
def _ring_kernel(
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
    x_stride,
    out_stride,
    EXPONENTS: gl.constexpr,
    OFFSET: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
    HAS_MINIMA: gl.constexpr,
    HAS_ROW_SCALES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GROUP: gl.constexpr,
    EVEN: gl.constexpr,
    SPLIT_K: gl.constexpr,
    TURNS: gl.constexpr,
    FLAT_TURNS: gl.constexpr,
    PADDED_ROWS: gl.constexpr,
    SLOTS: gl.constexpr,
    STEPS: gl.constexpr,
    WARPS: gl.constexpr,
    ROW_BLOCKS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    DIRECT: gl.constexpr,
    TRIGGER_FIRST: gl.constexpr,
    USE_PDL: gl.constexpr,
):
    X: gl.constexpr = x_ptr.dtype.element_ty
    # Inputs between two scales, and how many such runs there are in 128.
    RUN: gl.constexpr = 128 if GROUP > 128 else GROUP
    RUNS: gl.constexpr = 128 // RUN
    IS_BF16: gl.constexpr = gl.bfloat16 == X
    # Of what is 2^96 * 2^-133 and 2^-24 times too small.
    SUM_SCALE: gl.constexpr = 2.0**37 if IS_BF16 else 2.0**24
    # Turns of one iteration: slots and the two tensors of sums have then had their turns.
    UNROLLED: gl.constexpr = SLOTS if SLOTS % 2 == 0 else 2 * SLOTS
    # Of those that are on their way, the slots whose turn is not the next.
    LATER_SLOTS: gl.constexpr = SLOTS - 2 if SLOTS > 2 else 0
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    B: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=ACC, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(2, ACC)
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0])
    SUMS: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[2, 1, 0])
    # A warp's 32 numbers lie one behind another.
    ROW_WARPS: gl.constexpr = WARPS if WARPS < BLOCK_M // 2 else BLOCK_M // 2
    TAIL: gl.constexpr = gl.BlockedLayout(
        [WARPS, 1, 1], [1, 32 // BLOCK_M, BLOCK_M], [1, ROW_WARPS, WARPS // ROW_WARPS], [2, 1, 0]
    )

    column = gl.program_id(0)
    split = gl.program_id(1)
    first_block = column * (TURNS * ROW_BLOCKS)
    first_pair = split * (WARPS * STEPS)
    # A program whose rows end before takes its last turn again, of which nothing is stored.
    last_turn = gl.minimum((N + ROW_BLOCKS * 16 - 1) // (ROW_BLOCKS * 16) - column * TURNS, TURNS) - 1

    # Weights do not depend on earlier kernels: the first of them are on their way before waiting for those.
    if USE_PDL and TRIGGER_FIRST:
        grid_control("griddepcontrol.launch_dependents;")
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, WORDS))[:, None]
    word = gl.arange(0, 128, layout=gl.SliceLayout(0, WORDS))[None, :]
    apart = num_tiles * 128
    words_at = words_ptr + (first_block.to(gl.int64) * num_tiles + 2 * first_pair) * 128 + (warp * 256 + word)
    pair_mask = ()
    for step in gl.static_range(STEPS):
        pair_mask = pair_mask + ((first_pair + step * WARPS + warp < num_tiles // 2) & (word >= 0),)
    # One of its own for each copy: of one for all of them the compiler thinks that copies meet there.
    ring = ()
    for turn in gl.static_range(SLOTS):
        slot = ()
        for _number in gl.static_range(2 * ROW_BLOCKS * STEPS):
            slot = slot + (gl.allocate_shared_memory(gl.int32, [WARPS, 128], FLAT),)
        ring = ring + (slot,)
        _copy_words(
            slot, words_at, gl.minimum(last_turn, turn), apart, pair_mask, first_block, N, EVEN, STEPS, WARPS,
            ROW_BLOCKS,
        )  # fmt: skip
        async_copy.commit_group()
    if USE_PDL and not TRIGGER_FIRST:
        grid_control("griddepcontrol.launch_dependents;")
    own_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, ROWS))[:, None]
    own_row = first_block * 16 + gl.arange(0, 16, layout=gl.SliceLayout(0, ROWS))[None, :]
    own_input = (first_pair + own_warp) * 128
    scales = _load_scales(
        scales_ptr, zeros_ptr, minima_ptr, own_input, own_row, 0, N, K, HAS_ZEROS, HAS_MINIMA, GROUP, EVEN, STEPS,
        WARPS, ROW_BLOCKS,
    )  # fmt: skip
    if USE_PDL:
        grid_control("griddepcontrol.wait;")

    # All of them are on their way before the first is scaled.
    loaded = ()
    x_at, lanes = operands_at(x_ptr, x_stride, first_pair * 128, num_tokens, B, WARPS, BLOCK_M)
    for step in gl.static_range(STEPS):
        if DIRECT:
            loaded = loaded + (load_operands(x_at, lanes, step * (WARPS * 128), K, EVEN),)
        else:
            first_input = (first_pair + step * WARPS) * 128
            loaded = loaded + (load_lines(x_ptr, x_stride, first_input, num_tokens, K, EVEN, WARPS, BLOCK_M),)
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, B)))[None, :, None]
    inputs = ()
    for step in gl.static_range(STEPS):
        operands = loaded[step] if DIRECT else operands_of_lines(loaded[step], B)
        for run in gl.static_range(4):
            x = operands[run]
            if IS_BF16:
                x = x * gl.where(lane < 16, 2.0**96, 2.0**92).to(X)
            inputs = inputs + (x,)
    # Sums of a turn's row blocks, and of those of the turn before; where inputs changed threads until here.
    sums = ()
    for _turn in gl.static_range(2):
        of_turn = ()
        for _row in gl.static_range(ROW_BLOCKS):
            of_turn = of_turn + (gl.allocate_shared_memory(gl.float32, [WARPS, 16, BLOCK_M], SUMS),)
        sums = sums + (of_turn,)
    # A code of one, at all inputs.
    place = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, None, :]
    bits = gl.where(place < 16, 1, 16 if IS_BF16 else 1) + gl.zeros([WARPS, 16, 32], gl.int32, layout=A)
    ones = bits.to(gl.int16).to(X, bitcast=True)
    totals = ()
    for run in gl.static_range(STEPS * RUNS):
        total = gl.zeros([WARPS, 16, BLOCK_M], gl.float32, layout=ACC)
        for product in gl.static_range(RUN // 32):
            total = mma_v2(ones, inputs[run * (RUN // 32) + product], total)
        # Sixteen rows alike are one.
        totals = totals + (gl.sum(total, axis=1) * 0.0625,)

    tail_row = gl.arange(0, 16, layout=gl.SliceLayout(1, gl.SliceLayout(0, TAIL)))[:, None]
    tail_token = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, gl.SliceLayout(0, TAIL)))[None, :]
    token_mask = (tail_token < num_tokens) & (tail_row >= 0)
    out_at = out_ptr + tail_token.to(gl.int64) * out_stride
    # Of a part: all rows of one token behind those of another.
    OWN_ROWS: gl.constexpr = TURNS * ROW_BLOCKS * 16
    parts_at = partial_ptr + column.to(gl.int64) * (SPLIT_K * OWN_ROWS * BLOCK_M)
    partial_at = parts_at + split * (OWN_ROWS * BLOCK_M) + tail_token * OWN_ROWS

    async_copy.wait_group(SLOTS - 1)
    for first in range(0, TURNS - FLAT_TURNS, UNROLLED):
        for number in gl.static_range(UNROLLED):
            following = _load_scales(
                scales_ptr, zeros_ptr, minima_ptr, own_input, own_row,
                gl.minimum(last_turn, first + number + 1), N, K, HAS_ZEROS, HAS_MINIMA, GROUP, EVEN, STEPS, WARPS,
                ROW_BLOCKS,
            )  # fmt: skip
            _multiply(
                ring[number % SLOTS], sums[number % 2], inputs, totals, scales, ACC, A, WORDS, X, EXPONENTS, OFFSET,
                HAS_ZEROS, HAS_MINIMA, RUN, STEPS, WARPS, ROW_BLOCKS, BLOCK_M,
            )  # fmt: skip
            scales = following
            # The next turn's words are there, this turn's are read and its sums written.
            async_copy.wait_group(LATER_SLOTS)
            _copy_words(
                ring[number % SLOTS], words_at, gl.minimum(last_turn, first + number + SLOTS), apart, pair_mask,
                first_block, N, EVEN, STEPS, WARPS, ROW_BLOCKS,
            )  # fmt: skip
            async_copy.commit_group()
            _add_up(
                sums[number % 2], first_block + (first + number) * ROW_BLOCKS, row_scales_ptr, bias_ptr, out_at,
                token_mask, partial_at + (first + number) * (ROW_BLOCKS * 16), tail_row, N, SUM_SCALE, HAS_ROW_SCALES,
                HAS_BIAS, SPLIT_K, TAIL, ROW_BLOCKS, X,
            )  # fmt: skip
    for number in gl.static_range(FLAT_TURNS):
        turn = TURNS - FLAT_TURNS + number
        following = scales
        if number + 1 < FLAT_TURNS:
            following = _load_scales(
                scales_ptr, zeros_ptr, minima_ptr, own_input, own_row, gl.minimum(last_turn, turn + 1),
                N, K, HAS_ZEROS, HAS_MINIMA, GROUP, EVEN, STEPS, WARPS, ROW_BLOCKS,
            )  # fmt: skip
        _multiply(
            ring[number % SLOTS], sums[number % 2], inputs, totals, scales, ACC, A, WORDS, X, EXPONENTS, OFFSET,
            HAS_ZEROS, HAS_MINIMA, RUN, STEPS, WARPS, ROW_BLOCKS, BLOCK_M,
        )  # fmt: skip
        scales = following
        async_copy.wait_group(LATER_SLOTS)
        if number + SLOTS < FLAT_TURNS:
            _copy_words(
                ring[number % SLOTS], words_at, gl.minimum(last_turn, turn + SLOTS), apart, pair_mask, first_block, N,
                EVEN, STEPS, WARPS, ROW_BLOCKS,
            )  # fmt: skip
        async_copy.commit_group()
        _add_up(
            sums[number % 2], first_block + turn * ROW_BLOCKS, row_scales_ptr, bias_ptr, out_at, token_mask,
            partial_at + turn * (ROW_BLOCKS * 16), tail_row, N, SUM_SCALE, HAS_ROW_SCALES, HAS_BIAS, SPLIT_K, TAIL,
            ROW_BLOCKS, X,
        )  # fmt: skip

    if SPLIT_K > 1:
        # Every thread's stores must precede the one atomic that publishes them.
        barrier()
        finishes = gl.atomic_add(counters_ptr + column, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
        if finishes:
            # All of them at once: one after another they would wait for level 2 as often as there are turns.
            index = gl.arange(0, PADDED_ROWS * BLOCK_M, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
            of_row, of_token = index % PADDED_ROWS, index // PADDED_ROWS
            mask = (of_row < OWN_ROWS) & (of_token < num_tokens)
            added = gl.zeros([PADDED_ROWS * BLOCK_M], gl.float32, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
            for other in gl.static_range(SPLIT_K):
                part_at = parts_at + other * (OWN_ROWS * BLOCK_M) + (of_token * OWN_ROWS + of_row)
                added = added + gl.load(part_at, mask=mask, other=0.0, cache_modifier=".cg")
            _store_rows(
                added, first_block * 16 + of_row, row_scales_ptr, bias_ptr,
                out_ptr + of_token.to(gl.int64) * out_stride, mask, N, HAS_ROW_SCALES, HAS_BIAS, X,
            )  # fmt: skip
            gl.store(counters_ptr + column, 0)


def shared_memory(tuning: RingTuning, block_m: int = 8) -> int:
    """Bytes that a program takes."""
    return tuning.row_blocks * tuning.num_warps * (tuning.slots * tuning.steps * 1024 + 2 * 64 * block_m)


def ring_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    workspace: LinearWorkspace,
    tuning: RingTuning,
    out: torch.Tensor,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """x [num_tokens, K] -> out [num_tokens, N]; other checks and the choice of a road: `packed_linear`.

    Raises:
        ValueError: this kernel does not serve them, or has no such launch shape.
    """
    num_tokens, n, k = x.shape[0], weight.num_outputs, weight.num_inputs
    check_served("ring_linear", x, weight)
    if tuning.slots < 2:
        raise ValueError(f"ring_linear: {tuning}: words are read from one slot while others are filled")
    pairs, rows = weight.num_tiles // 2, 16 * tuning.row_blocks
    block_m = 8 if num_tokens <= 8 else 16
    turns, splits = triton.cdiv(n, rows * tuning.columns), triton.cdiv(pairs, tuning.num_warps * tuning.steps)
    columns = triton.cdiv(n, rows * turns)
    if splits > 1 and (
        columns * splits * turns * rows * block_m > workspace.partial.numel() or columns > workspace.counters.numel()
    ):
        raise ValueError(f"ring_linear: {tuning} takes more workspace for [{n}, {k}] than there is")
    slots = min(tuning.slots, turns)
    unrolled = slots if slots % 2 == 0 else 2 * slots
    flat = turns if turns <= MAX_FLAT_TURNS else slots + (turns - slots) % unrolled
    constants = format_constants(weight, x.dtype, streams=False)
    for name in ("HIGH_BITS", "IS_E2M1", "HAS_OUTER", "SUBTRACTS", "MAGIC"):
        del constants[name]
    options = launch_options(pdl) | ({"maxnreg": tuning.max_registers} if tuning.max_registers else {})
    _ring_kernel[(columns, splits)](
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
        x.stride(0),
        out.stride(0),
        **constants,
        HAS_ROW_SCALES=weight.row_scales is not None,
        HAS_BIAS=bias is not None,
        EVEN=k % (128 * tuning.num_warps * tuning.steps) == 0 and n % rows == 0,
        SPLIT_K=splits,
        TURNS=turns,
        FLAT_TURNS=flat,
        PADDED_ROWS=triton.next_power_of_2(turns * rows),
        SLOTS=slots,
        STEPS=tuning.steps,
        WARPS=tuning.num_warps,
        ROW_BLOCKS=tuning.row_blocks,
        BLOCK_M=block_m,
        DIRECT=num_tokens <= MAX_DIRECT_TOKENS,
        TRIGGER_FIRST=tuning.trigger_first,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **options,
    )
    return out
