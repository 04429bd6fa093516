"""Products of 9 to some hundred tokens with packed weights on Hopper's matrix units: each weight is decoded once.

    out^T [rows, tokens] = W [rows, inputs] @ x^T [inputs, tokens]

The left operand of a warpgroup's product may come from registers, and lies there as it does for a warp's: a warp holds
16 rows, which is a row block of `packed_weight.py`. So a thread copies 16 bytes that are its own to shared memory and
reads them back a few iterations later (nothing crosses threads), makes them numbers of the inputs' type and multiplies.
Inputs arrive by asynchronous copies as well. Products run while the next 64 inputs' weights are decoded: two operands
take turns.

A weight is rounded to the inputs' type, as are its scale and its minimum before:

    W = round(round(scale) * (code - offset - zero) - round(minimum))

Written in Gluon, because Triton cannot be told in which registers an operand is to be made, nor to fetch scales ahead.
There is no interpreter for it: its arithmetic is held by a twin in torch (`reference_packed.py`), and its tests run its
source on torch tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from stepwire_kernels.dependent_launch import launch_options
from stepwire_kernels.packed_launch import format_constants, num_splits, weight_pointers
from stepwire_kernels.packed_weight import MAGIC_BITS, PackedWeight
from stepwire_kernels.split_k import LinearWorkspace

# Renamed after Triton 3.6.
barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@dataclass(frozen=True)
class WgmmaTuning:
    """Launch shape. `words_ahead` and `inputs_ahead`: iterations of 128 inputs that copies run ahead.

    A program has 16 * num_warps * row_blocks rows; `num_warps` 4 or 8; 2 <= `inputs_ahead` <= `words_ahead`.
    `first_pairs`: iterations of the first of `split_k` parts, of which the others share the rest; 0: all alike.
    Programs of first parts begin first. Where they do not fill the device, those of other parts, which are short,
    follow one another on what is left of it.
    """

    block_m: int = 64
    num_warps: int = 8
    row_blocks: int = 1
    split_k: int = 1
    words_ahead: int = 4
    inputs_ahead: int = 2
    first_pairs: int = 0


@gluon.jit
def _on_halves(op: gl.constexpr, a, b, X: gl.constexpr):
    """An operation on both halves of 32-bit words: "add", "sub" or "mul"."""
    TYPE: gl.constexpr = "bf16x2" if gl.bfloat16 == X else "f16x2"
    return gl.inline_asm_elementwise(
        op + ".rn." + TYPE + " $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _add_product(a, b, c, X: gl.constexpr):
    TYPE: gl.constexpr = "bf16x2" if gl.bfloat16 == X else "f16x2"
    return gl.inline_asm_elementwise(
        "fma.rn." + TYPE + " $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _part(values, PART: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr):
    """Of [rows * PARTS] values the PART-th of every row."""
    COUNT: gl.constexpr = values.shape[0] // PARTS
    if PARTS == 8:
        even, odd = gl.split(values.reshape([COUNT, 2, 2, 2]))
        values = _part((odd if PART % 2 else even).reshape([COUNT * 4]), PART // 2, 4, ROWS)
    elif PARTS == 4:
        even, odd = gl.split(values.reshape([COUNT, 2, 2]))
        values = _part((odd if PART % 2 else even).reshape([COUNT * 2]), PART // 2, 2, ROWS)
    elif PARTS == 2:
        even, odd = gl.split(values.reshape([COUNT, 2]))
        values = odd if PART % 2 else even
    return gl.convert_layout(values, ROWS, assert_trivial=True)


@gluon.jit
def _by_word(values, WORDS: gl.constexpr):
    """A value of each (lane, r) for the words (lane, h, r)."""
    LANES: gl.constexpr = values.shape[0] // 2
    both = gl.join(values, values).reshape([LANES, 2, 2])  # [lane, r, h]
    return gl.convert_layout(gl.permute(both, [0, 2, 1]).reshape([LANES * 4]), WORDS, assert_trivial=True)


@gluon.jit
def _pairs_of(values, X: gl.constexpr):
    """float32 values in both halves of int32 words, as X."""
    bits = values.to(X).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return bits | (bits << 16)


@gluon.jit
def halves(pairs, X: gl.constexpr):
    low = pairs.to(gl.int16).to(X, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(X, bitcast=True)
    return gl.join(low, high)


@gluon.jit
def _e2m1(words, F: gl.constexpr, X: gl.constexpr):
    """Field F of words, doubled (`packed_weight.py`)."""
    IS_BF16: gl.constexpr = gl.bfloat16 == X
    UP: gl.constexpr = (6 if IS_BF16 else 9) - 4 * F
    sign = (words << (12 - 4 * F)) & -0x7FFF8000
    rest = words << UP if UP >= 0 else words >> -UP
    rest = rest & (0x01C001C0 if IS_BF16 else 0x0E000E00)
    # Times 2^127, times 2^15.
    return _on_halves("mul", sign | rest, gl.full_like(words, 0x7F007F00 if IS_BF16 else 0x78007800), X)


@gluon.jit
def _integers(
    words, high, F: gl.constexpr, magic, zeros, HIGH_BITS: gl.constexpr, OFFSET: gl.constexpr, HAS_ZEROS: gl.constexpr,
    WORDS: gl.constexpr, X: gl.constexpr,
):  # fmt: skip
    """Field F as code - offset - zero: exact, as every number on the way. zeros: of (lane, r)."""
    low = ((words >> (4 * F)) & 0x000F000F) | magic
    if HIGH_BITS == 0:
        # The same float with another integer in its lowest bits.
        taken = gl.full_like(words, OFFSET * 0x10001)
        if HAS_ZEROS:
            taken = taken + _by_word(zeros.to(gl.int32) * 0x10001, WORDS)
        value = _on_halves("sub", low, taken | magic, X)
    else:
        # `magic` with the exponent of 16 times as much, whose unit is 16.
        UNITS: gl.constexpr = 0x02000200 if gl.bfloat16 == X else 0x10001000
        MASK: gl.constexpr = ((1 << HIGH_BITS) - 1) * 0x10001
        upper = ((high >> (HIGH_BITS * F)) & MASK) | (magic + UNITS)
        upper = _on_halves("sub", upper, gl.full_like(words, OFFSET // 16 * 0x10001) + (magic + UNITS), X)
        value = _on_halves("add", upper, _on_halves("sub", low, gl.full_like(words, 0) + magic, X), X)
        if HAS_ZEROS:
            value = _on_halves("sub", value, _by_word(_pairs_of(zeros.to(gl.float32), X), WORDS), X)
    return value


@gluon.jit
def _operand(f0, f1, f2, f3, A: gl.constexpr, X: gl.constexpr):
    """Four fields [blocks * 128] of pairs as the left operand [blocks * 16, 64]."""
    BLOCKS: gl.constexpr = f0.shape[0] // 128
    first = gl.join(halves(f0, X), halves(f1, X))  # [word, p, s]
    second = gl.join(halves(f2, X), halves(f3, X))
    joined = gl.join(first, second).reshape([BLOCKS, 8, 4, 2, 2, 2, 2, 2])  # [block, g, t, h, r, p, s, half]
    turned = gl.permute(joined, [0, 4, 1, 7, 6, 3, 2, 5])  # [block, r, g, half, s, h, t, p]
    return gl.convert_layout(turned.reshape([BLOCKS * 16, 64]), A, assert_trivial=True)


@gluon.jit
def _decode_field(
    words, high, scales, zeros, minima, outer, outer_low, magic, FIELD: gl.constexpr, PART: gl.constexpr,
    PARTS: gl.constexpr, HIGH_BITS: gl.constexpr, IS_E2M1: gl.constexpr, EXPONENTS: gl.constexpr, OFFSET: gl.constexpr,
    HAS_ZEROS: gl.constexpr, HAS_MINIMA: gl.constexpr, HAS_OUTER: gl.constexpr, WORDS: gl.constexpr,
    ROWS: gl.constexpr, X: gl.constexpr,
):  # fmt: skip
    """Weights of one field, two in a word, by the PART-th of PARTS scales."""
    scale = _scale(_part(scales, PART, PARTS, ROWS), EXPONENTS)
    if HAS_OUTER:
        scale = scale * outer
    scale = _by_word(_pairs_of(scale, X), WORDS)
    if IS_E2M1:
        value = _e2m1(words, FIELD, X)
    else:
        value = _integers(
            words, high, FIELD, magic, _part(zeros, PART, PARTS, ROWS), HIGH_BITS, OFFSET, HAS_ZEROS, WORDS, X
        )  # fmt: skip
    if HAS_MINIMA:
        low = _part(minima, PART, PARTS, ROWS).to(gl.float32)
        if HAS_OUTER:
            low = low * outer_low
        value = _add_product(value, scale, _by_word(_pairs_of(-low, X), WORDS), X)
    else:
        value = _on_halves("mul", value, scale, X)
    return value


@gluon.jit
def _decode(
    words, high, scales, zeros, minima, outer, outer_low, magic, TILE: gl.constexpr, PARTS: gl.constexpr,
    HIGH_BITS: gl.constexpr, IS_E2M1: gl.constexpr, EXPONENTS: gl.constexpr, OFFSET: gl.constexpr,
    HAS_ZEROS: gl.constexpr, HAS_MINIMA: gl.constexpr, HAS_OUTER: gl.constexpr, WORDS: gl.constexpr, ROWS: gl.constexpr,
    A: gl.constexpr, X: gl.constexpr,
):  # fmt: skip
    """The TILE-th (0 or 1) 64 of 128 inputs as an operand; scales and the like: all PARTS of the 128 inputs."""
    f0 = _decode_field(
        words, high, scales, zeros, minima, outer, outer_low, magic, 0, TILE * 4 * PARTS // 8, PARTS, HIGH_BITS,
        IS_E2M1, EXPONENTS, OFFSET, HAS_ZEROS, HAS_MINIMA, HAS_OUTER, WORDS, ROWS, X,
    )  # fmt: skip
    f1 = _decode_field(
        words, high, scales, zeros, minima, outer, outer_low, magic, 1, (TILE * 4 + 1) * PARTS // 8, PARTS, HIGH_BITS,
        IS_E2M1, EXPONENTS, OFFSET, HAS_ZEROS, HAS_MINIMA, HAS_OUTER, WORDS, ROWS, X,
    )  # fmt: skip
    f2 = _decode_field(
        words, high, scales, zeros, minima, outer, outer_low, magic, 2, (TILE * 4 + 2) * PARTS // 8, PARTS, HIGH_BITS,
        IS_E2M1, EXPONENTS, OFFSET, HAS_ZEROS, HAS_MINIMA, HAS_OUTER, WORDS, ROWS, X,
    )  # fmt: skip
    f3 = _decode_field(
        words, high, scales, zeros, minima, outer, outer_low, magic, 3, (TILE * 4 + 3) * PARTS // 8, PARTS, HIGH_BITS,
        IS_E2M1, EXPONENTS, OFFSET, HAS_ZEROS, HAS_MINIMA, HAS_OUTER, WORDS, ROWS, X,
    )  # fmt: skip
    return _operand(f0, f1, f2, f3, A, X)


@gluon.jit
def _scale(raw, EXPONENTS: gl.constexpr):
    scale = (raw.to(gl.int32) << 23).to(gl.float32, bitcast=True) if EXPONENTS else raw.to(gl.float32)
    return scale


@gluon.jit
def _load_groups(pointer, pair, rows, part, N, K, GROUP: gl.constexpr):
    """Scales or the like of the pair-th 128 inputs."""
    start = pair * 128 + part * GROUP if GROUP < 128 else pair * 128 + part * 128
    at = (start // GROUP) * N + rows
    return gl.load(pointer + at, mask=(rows < N) & (start < K), other=0.0)


@gluon.jit(do_not_specialize=("num_tokens", "num_tiles", "first_pairs", "pairs_each", "magic"))
def _wgmma_kernel(
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
    first_pairs,
    pairs_each,
    magic,
    x_stride,
    out_stride,
    HIGH_BITS: gl.constexpr,
    IS_E2M1: gl.constexpr,
    EXPONENTS: gl.constexpr,
    OFFSET: gl.constexpr,
    MAGIC: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
    HAS_MINIMA: gl.constexpr,
    HAS_OUTER: gl.constexpr,
    SUBTRACTS: gl.constexpr,
    HAS_ROW_SCALES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GROUP: gl.constexpr,
    EVEN_K: gl.constexpr,
    SPLIT_K: gl.constexpr,
    WARPS: gl.constexpr,
    ROW_BLOCKS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    WORDS_AHEAD: gl.constexpr,
    INPUTS_AHEAD: gl.constexpr,
    USE_PDL: gl.constexpr,
):
    X: gl.constexpr = x_ptr.dtype.element_ty
    BLOCKS: gl.constexpr = WARPS * ROW_BLOCKS
    BLOCK_N: gl.constexpr = BLOCKS * 16
    PARTS: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    X_SLOTS: gl.constexpr = INPUTS_AHEAD + 1
    WORDS: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    GROUPS: gl.constexpr = gl.BlockedLayout([2 * PARTS], [32], [WARPS], [0])
    ROWS: gl.constexpr = gl.BlockedLayout([2], [32], [WARPS], [0])
    INPUTS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_M, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

    token_block = gl.program_id(0)
    column = gl.program_id(1)
    split = gl.program_id(2)
    first = first_pairs + (split - 1) * pairs_each if split > 0 else 0
    last = gl.minimum(first + pairs_each if split > 0 else first_pairs, num_tiles // 2)

    word = gl.arange(0, BLOCKS * 128, layout=WORDS)
    block = column * BLOCKS + word // 128
    words_at = block.to(gl.int64) * (num_tiles * 128) + word % 128
    in_weight = block * 16 < N
    words_one = gl.allocate_shared_memory(gl.int32, [WORDS_AHEAD, BLOCKS * 128], FLAT)
    words_two = gl.allocate_shared_memory(gl.int32, [WORDS_AHEAD, BLOCKS * 128], FLAT)
    for ahead in gl.static_range(WORDS_AHEAD):
        pair = first + ahead
        mask = in_weight & (pair < last)
        async_copy.async_copy_global_to_shared(words_one.index(ahead), words_ptr + words_at + pair * 256, mask=mask)
        async_copy.async_copy_global_to_shared(
            words_two.index(ahead), words_ptr + words_at + (pair * 256 + 128), mask=mask
        )
    async_copy.commit_group()
    # Scales of (lane, r, part): of row 8 * r + lane // 4 of a block.
    at = gl.arange(0, BLOCKS * 64 * PARTS, layout=GROUPS)
    part = at % PARTS
    r = (at // PARTS) % 2
    lane = (at // (2 * PARTS)) % 32
    rows = column * BLOCK_N + (at // (64 * PARTS)) * 16 + r * 8 + lane // 4
    flat = gl.arange(0, BLOCKS * 64, layout=ROWS)
    outer_rows = column * BLOCK_N + (flat // 64) * 16 + (flat % 2) * 8 + ((flat // 2) % 32) // 4
    scales = _load_groups(scales_ptr, first, rows, part, N, K, GROUP)
    zeros, minima, outer, outer_low = scales, scales, scales, scales
    if HAS_ZEROS:
        zeros = _load_groups(zeros_ptr, first, rows, part, N, K, GROUP)
    if HAS_MINIMA:
        minima = _load_groups(minima_ptr, first, rows, part, N, K, GROUP)
    if HAS_OUTER:
        outer = _load_outer(outer_scales_ptr, first, outer_rows, N, K)
        if HAS_MINIMA:
            outer_low = _load_outer(outer_minima_ptr, first, outer_rows, N, K)

    tokens = token_block * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, INPUTS))
    cols = gl.arange(0, 64, layout=gl.SliceLayout(0, INPUTS))
    x_at = x_ptr + tokens.to(gl.int64)[:, None] * x_stride + cols[None, :]
    token_mask = (tokens < num_tokens)[:, None] & (cols >= 0)[None, :]
    x_one = gl.allocate_shared_memory(X, [X_SLOTS, BLOCK_M, 64], SWIZZLED)
    x_two = gl.allocate_shared_memory(X, [X_SLOTS, BLOCK_M, 64], SWIZZLED)
    if USE_PDL:
        grid_control("griddepcontrol.launch_dependents;")
        grid_control("griddepcontrol.wait;")
    for ahead in gl.static_range(INPUTS_AHEAD):
        _copy_inputs(x_one, x_two, x_at, token_mask, cols, first + ahead, last, ahead, K, EVEN_K)
        async_copy.commit_group()

    high_one, high_two = word, word
    if HIGH_BITS > 0:
        high_one = _load_high(high_ptr, words_at, first, last, in_weight, HIGH_BITS)
        high_two = _load_high(high_ptr, words_at + 128, first, last, in_weight, HIGH_BITS)
    # The first words and inputs are there, for every thread and for the matrix units.
    async_copy.wait_group(INPUTS_AHEAD - 1)
    fence_async_shared()
    barrier()
    acc = gl.zeros([BLOCK_N, BLOCK_M], dtype=gl.float32, layout=ACC)
    a_two = gl.zeros([BLOCK_N, 64], dtype=X, layout=A)
    words_slot = 0
    x_slot = 0
    free_slot = INPUTS_AHEAD
    for pair in range(first, last):
        one = words_one.index(words_slot).load(WORDS)
        two = words_two.index(words_slot).load(WORDS)
        # While the second half of the iteration before is multiplied.
        a_one = _decode(
            one, high_one, scales, zeros, minima, outer, outer_low, magic, 0, PARTS, HIGH_BITS, IS_E2M1, EXPONENTS,
            OFFSET, HAS_ZEROS, HAS_MINIMA, HAS_OUTER, WORDS, ROWS, A, X,
        )  # fmt: skip
        product = warpgroup_mma(a_one, x_one.index(x_slot).permute((1, 0)), acc, is_async=True)
        # A product reads its left operand until it is done: only then may the registers be written.
        product, a_two = warpgroup_mma_wait(1, deps=(product, a_two))
        a_two = _decode(
            two, high_two, scales, zeros, minima, outer, outer_low, magic, 1, PARTS, HIGH_BITS, IS_E2M1, EXPONENTS,
            OFFSET, HAS_ZEROS, HAS_MINIMA, HAS_OUTER, WORDS, ROWS, A, X,
        )  # fmt: skip
        product = warpgroup_mma(a_two, x_two.index(x_slot).permute((1, 0)), product, is_async=True)
        # The rest is done while both halves are multiplied.
        scales = _load_groups(scales_ptr, pair + 1, rows, part, N, K, GROUP)
        if HAS_ZEROS:
            zeros = _load_groups(zeros_ptr, pair + 1, rows, part, N, K, GROUP)
        if HAS_MINIMA:
            minima = _load_groups(minima_ptr, pair + 1, rows, part, N, K, GROUP)
        if HAS_OUTER:
            outer = _load_outer(outer_scales_ptr, pair + 1, outer_rows, N, K)
            if HAS_MINIMA:
                outer_low = _load_outer(outer_minima_ptr, pair + 1, outer_rows, N, K)
        if HIGH_BITS > 0:
            high_one = _load_high(high_ptr, words_at, pair + 1, last, in_weight, HIGH_BITS)
            high_two = _load_high(high_ptr, words_at + 128, pair + 1, last, in_weight, HIGH_BITS)
        # The next iteration's inputs and words are there. All warps are through with the iteration before this one,
        # whose slot is filled again.
        async_copy.wait_group(INPUTS_AHEAD - 2)
        fence_async_shared()
        barrier()
        _copy_inputs(x_one, x_two, x_at, token_mask, cols, pair + INPUTS_AHEAD, last, free_slot, K, EVEN_K)
        mask = in_weight & (pair + WORDS_AHEAD < last)
        following = words_ptr + words_at + (pair + WORDS_AHEAD) * 256
        async_copy.async_copy_global_to_shared(words_one.index(words_slot), following, mask=mask)
        async_copy.async_copy_global_to_shared(words_two.index(words_slot), following + 128, mask=mask)
        async_copy.commit_group()
        words_slot = words_slot + 1 if words_slot < WORDS_AHEAD - 1 else 0
        x_slot = x_slot + 1 if x_slot < X_SLOTS - 1 else 0
        free_slot = free_slot + 1 if free_slot < X_SLOTS - 1 else 0
        acc, a_one = warpgroup_mma_wait(1, deps=(product, a_one))
    acc, a_two = warpgroup_mma_wait(0, deps=(acc, a_two))
    async_copy.wait_group(0)

    OUT: gl.constexpr = gl.BlockedLayout([4, 1], [32, 1], [1, WARPS], [0, 1])
    place = token_block * gl.num_programs(1) + column
    finishes = split == SPLIT_K - 1
    if SPLIT_K > 1:
        own_rows = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, ACC))
        own_tokens = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, ACC))
        offsets = own_rows[:, None] * BLOCK_M + own_tokens[None, :]
        base = partial_ptr + place.to(gl.int64) * (SPLIT_K * BLOCK_N * BLOCK_M)
        gl.store(base + split * (BLOCK_N * BLOCK_M) + offsets, acc)
        barrier()
        arrived = gl.atomic_add(counters_ptr + place, 1, sem="acq_rel", scope="gpu")
        finishes = arrived == SPLIT_K - 1
        if finishes:
            if SPLIT_K == 2:
                # Two numbers have one sum, and this program's are still here.
                acc += gl.load(base + (1 - split) * (BLOCK_N * BLOCK_M) + offsets, cache_modifier=".cg")
            else:
                acc = gl.zeros([BLOCK_N, BLOCK_M], dtype=gl.float32, layout=ACC)
                for other in gl.static_range(SPLIT_K):
                    acc += gl.load(base + other * (BLOCK_N * BLOCK_M) + offsets, cache_modifier=".cg")
            gl.store(counters_ptr + place, 0)
    if finishes:
        acc_rows = column * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, ACC))
        if HAS_ROW_SCALES:
            acc *= gl.load(row_scales_ptr + acc_rows, mask=acc_rows < N, other=0.0)[:, None]
        if HAS_BIAS:
            acc += gl.load(bias_ptr + acc_rows, mask=acc_rows < N, other=0.0).to(gl.float32)[:, None]
        out = gl.convert_layout(acc.to(X), OUT)
        out_rows = column * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, OUT))
        out_tokens = token_block * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, OUT))
        out_at = out_ptr + out_tokens.to(gl.int64)[None, :] * out_stride + out_rows[:, None]
        gl.store(out_at, out, mask=(out_rows < N)[:, None] & (out_tokens < num_tokens)[None, :])


@gluon.jit
def grid_control(instruction: gl.constexpr):
    gl.inline_asm_elementwise(instruction + " // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _load_outer(pointer, pair, rows, N, K):
    return gl.load(pointer + (pair // 2) * N + rows, mask=(rows < N) & (pair * 128 < K), other=0.0).to(gl.float32)


@gluon.jit
def _load_high(high_ptr, at, pair, last, in_weight, HIGH_BITS: gl.constexpr):
    high = gl.load(high_ptr + at + pair * 256, mask=in_weight & (pair < last), other=0).to(gl.int32)
    if HIGH_BITS == 2:
        high = (high & 0xFF) | ((high & 0xFF00) << 8)
    if HIGH_BITS == 1:
        high = (high & 0xF) | ((high & 0xF0) << 12)
    return high


@gluon.jit
def _copy_inputs(x_one, x_two, x_at, token_mask, cols, pair, last, slot, K, EVEN_K: gl.constexpr):
    """Begin to copy the pair-th 128 inputs of all tokens."""
    first_mask = token_mask & (pair < last)
    second_mask = first_mask
    if not EVEN_K:
        first_mask = first_mask & (pair * 128 + cols < K)[None, :]
        second_mask = second_mask & (pair * 128 + 64 + cols < K)[None, :]
    async_copy.async_copy_global_to_shared(x_one.index(slot), x_at + pair * 128, mask=first_mask)
    async_copy.async_copy_global_to_shared(x_two.index(slot), x_at + (pair * 128 + 64), mask=second_mask)


def serves(x: torch.Tensor, weight: PackedWeight) -> bool:
    """Whether this kernel multiplies them: Hopper's matrix units, 16-bit inputs that 16 bytes can be copied of."""
    return (
        x.is_cuda
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.num_inputs % 16 == 0
        and x.stride(0) % 16 == 0
        and x.data_ptr() % 16 == 0
        and (weight.high_words is None or weight.offset % 16 == 0)
    )


def wgmma_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    workspace: LinearWorkspace,
    tuning: WgmmaTuning,
    out: torch.Tensor,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """x [num_tokens, K] -> out [num_tokens, N]; other checks and the choice of a road: `packed_linear`.

    Raises:
        ValueError: this kernel does not serve them, or has no such launch shape.
    """
    if not serves(x, weight):
        raise ValueError(f"wgmma_linear: takes 16-bit inputs on a device of capability 9, got {x.dtype} on {x.device}")
    if not 2 <= tuning.inputs_ahead <= tuning.words_ahead:
        raise ValueError(f"wgmma_linear: {tuning}: inputs must be 2 iterations ahead at least, and words as far")
    n, num_tokens = weight.num_outputs, x.shape[0]
    rows, pairs = 16 * tuning.num_warps * tuning.row_blocks, weight.num_tiles // 2
    columns, token_blocks = triton.cdiv(n, rows), triton.cdiv(num_tokens, tuning.block_m)
    splits = num_splits(tuning.split_k, columns * token_blocks, pairs, rows * tuning.block_m, workspace)
    first_pairs = pairs_each = triton.cdiv(pairs, splits)
    if splits > 1 and tuning.first_pairs:
        first_pairs = min(tuning.first_pairs, pairs)
        pairs_each = triton.cdiv(pairs - first_pairs, splits - 1)
    _wgmma_kernel[(token_blocks, columns, splits)](
        x,
        *weight_pointers(weight),
        weight.scales if weight.row_scales is None else weight.row_scales,
        x if bias is None else bias,
        out,
        workspace.partial,
        workspace.counters,
        num_tokens,
        n,
        weight.num_inputs,
        weight.num_tiles,
        first_pairs,
        pairs_each,
        MAGIC_BITS[x.dtype],
        x.stride(0),
        out.stride(0),
        **format_constants(weight, x.dtype, streams=False),
        HAS_ROW_SCALES=weight.row_scales is not None,
        HAS_BIAS=bias is not None,
        EVEN_K=weight.num_inputs % 128 == 0,
        SPLIT_K=splits,
        WARPS=tuning.num_warps,
        ROW_BLOCKS=tuning.row_blocks,
        BLOCK_M=tuning.block_m,
        WORDS_AHEAD=tuning.words_ahead,
        INPUTS_AHEAD=tuning.inputs_ahead,
        USE_PDL=pdl,
        num_warps=tuning.num_warps,
        **launch_options(pdl),
    )
    return out
