"""Sums over ranks through memory that they map of each other, alone or with the residual add and RMSNorm that follow.

    total    <- x_0 + x_1 + ... + x_(size-1)                  (in float32, in rank order; rounded to x's dtype)
    residual <- residual + total                              (rounded to the residual's dtype)
    out      <- residual / sqrt(mean(residual^2) + eps) * (weight_offset + weight)

x, residual, out: [num_rows, columns], weight: [columns], columns a multiple of what fills 32 bits. Every rank adds in
the same order, so all have the same bits, whichever way a sum takes.

A program owns a row on every rank and exchanges it with the same program of the others; nothing else is waited for.
Where there are more rows than programs (`num_programs`), program p owns rows p, p + num_programs and so on, and sends
its next row before it waits for this one, so that the link is busy meanwhile. More programs than the device runs at
once are right as well: those of the first rows begin first, on every rank, and wait for nobody that comes later.

Two ways of sharing the work:

* one-shot: a row goes to every peer, and every rank adds it up. One way through the link.
* two-shot: row r goes to its owner, rank r % size, who adds it up and sends the sum back. Two ways, and with more than
  two ranks fewer bytes.

and two ways of saying that a row is there:

* stamped: each 32-bit word travels in 64 bits with the number of the round beside it, and the reader polls the words
  themselves (64-bit stores are never seen in halves). Twice the bytes, no fence.
* flagged: the row travels as it is, then one system-scope release of a flag; the reader polls it with acquires.

Rounds are counted for each row, on the device, so that a captured graph replays as a new round. What waits looks for
the round itself, not for one that is past: a place that other ways have left alone may be any number of rounds behind,
which in numbers that wrap is soon as good as ahead. The inbox has two
places for each (source, row), used in turn. That is enough: whoever writes round n has taken all of round n - 1, for
which every peer had to begin it, and a kernel begins its stores when those before it in the stream have ended, round
n - 2 among them. Ranks must therefore issue the same calls in the same order, each on one stream: two calls that run
at once on one device (an eager one beside a graph's replay, say) take the same round, and ranks wait for ever.

Nobody waits for ever (`signals.py`). Only loads, stores and atomics on mapped memory: no multicast.

Source: PTX ISA, "Memory consistency model"; Thakur, Rabenseifner and Gropp, "Optimization of collective communication
operations in MPICH", 2005; stamped words as in NCCL's LL protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.signals import POLLS_PER_LOOK, await_round, publish

ELEMENT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class AllReduceTuning:
    """How a sum is formed."""

    two_shot: bool = False
    flagged: bool = False
    num_warps: int = 8
    num_programs: int = 0
    """At most so many, which share out the rows; 0: one for each."""


@dataclass(frozen=True)
class PeerBuffers:
    """One rank's view of the memory that all ranks map: `regions` has every rank's, in rank order, alike in shape."""

    rank: int
    max_rows: int
    stamped_rows: int
    """Of these, how many at most go stamped; more are flagged, whatever a tuning says."""
    row_words: int
    """32-bit words of a row at most."""
    stamped: tuple[torch.Tensor, ...]  # int64 [2 * size * stamped_rows * row_words] each
    plain: tuple[torch.Tensor, ...]  # int32 [2 * size * max_rows * row_words] each
    flags: tuple[torch.Tensor, ...]  # int32 [2 * size * max_rows] each
    rounds: torch.Tensor  # int32 [max_rows]: rounds that each row has been through, this rank's own
    stop: torch.Tensor  # int32 [1]: the host's, page-locked; not zero: wait no more

    @property
    def size(self) -> int:
        return len(self.stamped)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x [num_rows, columns] can be summed here."""
        words, rest = divmod(x.shape[-1] * x.element_size(), 4)
        return x.dtype in ELEMENT_TYPES and x.ndim == 2 and x.is_contiguous() and rest == 0 and (
            len(x) <= self.max_rows and words <= self.row_words
        )  # fmt: skip


def region_words(size: int, max_rows: int, row_words: int, stamped_rows: int | None = None) -> int:
    """int64 words of a rank's region; `row_words` must be a multiple of 4. `stamped_rows`: None: all may go stamped."""
    plain, stamped = (2 * size * rows for rows in (max_rows, max_rows if stamped_rows is None else stamped_rows))
    return stamped * row_words + plain * row_words // 2 + -(-plain // 2)


def peer_buffers(
    rank: int,
    regions: Sequence[torch.Tensor],
    max_rows: int,
    row_words: int,
    stop: torch.Tensor,
    stamped_rows: int | None = None,
) -> PeerBuffers:
    """Lay `regions` (int64 [region_words], every rank's as this one maps it, all zero) out.

    Raises:
        ValueError: rows that are no multiple of 16 bytes.
    """
    if row_words % 4:
        raise ValueError(f"row_words must be a multiple of 4, so that rows begin at 16 bytes; got {row_words}")
    stamped_rows = max_rows if stamped_rows is None else stamped_rows
    rows = 2 * len(regions) * max_rows
    middle = 2 * len(regions) * stamped_rows * row_words
    end = middle + rows * row_words // 2
    return PeerBuffers(
        rank=rank,
        max_rows=max_rows,
        stamped_rows=stamped_rows,
        row_words=row_words,
        stamped=tuple(region[:middle] for region in regions),
        plain=tuple(region[middle:end].view(torch.int32) for region in regions),
        flags=tuple(region[end:].view(torch.int32)[:rows] for region in regions),
        rounds=torch.zeros(max_rows, dtype=torch.int32, device=regions[rank].device),
        stop=stop,
    )


@triton.jit
def unpack(words, ELEMENT: tl.constexpr):
    """int32 words as float32: the lower half's elements and the upper half's (zeros where an element fills a word)."""
    if tl.float32 == ELEMENT:
        low = words.to(tl.float32, bitcast=True)
        high = tl.zeros(words.shape, dtype=tl.float32)
    else:
        low = words.to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def pack(low, high, ELEMENT: tl.constexpr):
    if tl.float32 == ELEMENT:
        words = low.to(tl.int32, bitcast=True)
    else:
        upper = high.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) << 16
        words = upper | (low.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)
    return words


@triton.jit
def _send(words, stamped_ptr, plain_ptr, flag_ptr, round_, cols, mask, FLAGGED: tl.constexpr):
    """One row into a peer's inbox; all pointers are the row's own."""
    if FLAGGED:
        tl.store(plain_ptr + cols, words, mask=mask)
        publish(flag_ptr, round_)
    else:
        tl.store(stamped_ptr + cols, (round_.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF), mask=mask)


@triton.jit
def _take(stamped_ptr, plain_ptr, flag_ptr, stop_ptr, round_, cols, mask, FLAGGED: tl.constexpr):
    """Wait for one row of this rank's inbox and return its words."""
    if FLAGGED:
        await_round(flag_ptr, round_, stop_ptr, EXACTLY=True)
        words = tl.load(plain_ptr + cols, mask=mask, other=0, volatile=True)
    else:
        polls = 0
        stamped = tl.load(stamped_ptr + cols, mask=mask, other=0, volatile=True)
        waits = tl.max((mask & ((stamped >> 32).to(tl.int32) != round_)).to(tl.int32), axis=0) != 0
        while waits:
            polls += 1
            stopped = tl.load(stop_ptr, mask=polls % POLLS_PER_LOOK == 0, other=0, volatile=True)
            stamped = tl.load(stamped_ptr + cols, mask=mask, other=0, volatile=True)
            missing = tl.max((mask & ((stamped >> 32).to(tl.int32) != round_)).to(tl.int32), axis=0)
            waits = (missing != 0) & (stopped == 0)
        words = stamped.to(tl.int32)
    return words


@triton.jit
def _begin(
    words,
    row,
    round_,
    stamped,
    plain,
    flags,
    inbox_rows,
    row_words,
    cols,
    mask,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    FLAGGED: tl.constexpr,
):
    """Send this rank's `words` of a row where they are added up. Waits for nobody."""
    sent = (((round_ & 1) * SIZE + RANK) * inbox_rows + row).to(tl.int64)
    at = sent * row_words
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            if TWO_SHOT:
                if row % SIZE == peer:
                    _send(words, stamped[peer] + at, plain[peer] + at, flags[peer] + sent, round_, cols, mask, FLAGGED)
            else:
                _send(words, stamped[peer] + at, plain[peer] + at, flags[peer] + sent, round_, cols, mask, FLAGGED)


@triton.jit
def _end(
    words,
    row,
    round_,
    stamped,
    plain,
    flags,
    rounds_ptr,
    stop_ptr,
    inbox_rows,
    row_words,
    cols,
    mask,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    ELEMENT: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    FLAGGED: tl.constexpr,
):
    """The sum over ranks of a row that every rank has begun or will, as words; `words` are this rank's."""
    place = (round_ & 1) * SIZE
    sent = ((place + RANK) * inbox_rows + row).to(tl.int64)
    at = sent * row_words
    owner = row % SIZE
    total = words
    if TWO_SHOT and owner != RANK:
        took = ((place + owner) * inbox_rows + row).to(tl.int64)
        from_ = took * row_words
        total = _take(
            stamped[RANK] + from_, plain[RANK] + from_, flags[RANK] + took, stop_ptr, round_, cols, mask, FLAGGED
        )
    else:
        low = tl.zeros(words.shape, dtype=tl.float32)
        high = tl.zeros(words.shape, dtype=tl.float32)
        for source in tl.static_range(SIZE):
            part = words
            if source != RANK:
                took = ((place + source) * inbox_rows + row).to(tl.int64)
                from_ = took * row_words
                part = _take(
                    stamped[RANK] + from_,
                    plain[RANK] + from_,
                    flags[RANK] + took,
                    stop_ptr,
                    round_,
                    cols,
                    mask,
                    FLAGGED,
                )
            part_low, part_high = unpack(part, ELEMENT)
            low += part_low
            high += part_high
        total = pack(low, high, ELEMENT)
        if TWO_SHOT:
            for peer in tl.static_range(SIZE):
                if peer != RANK:
                    _send(total, stamped[peer] + at, plain[peer] + at, flags[peer] + sent, round_, cols, mask, FLAGGED)
    tl.store(rounds_ptr + row, round_)
    return total


@triton.jit
def add_norm(total, residual, weight, residual_at, num_cols, eps, weight_offset, mask, ELEMENT: tl.constexpr):
    """Store the residual with `total` added, and return its norm; all as words of a row."""
    low, high = unpack(total, ELEMENT)
    residual_low, residual_high = unpack(residual, ELEMENT)
    added = pack(residual_low + low, residual_high + high, ELEMENT)
    tl.store(residual_at, added, mask=mask)
    low, high = unpack(added, ELEMENT)
    weight_low, weight_high = unpack(weight, ELEMENT)
    scale = tl.rsqrt(tl.sum(low * low + high * high, axis=0) / num_cols + eps)
    return pack(low * scale * (weight_low + weight_offset), high * scale * (weight_high + weight_offset), ELEMENT)


# One kernel for all numbers of rows.
@triton.jit(do_not_specialize=["num_rows"])
def _all_reduce_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    stamped,
    plain,
    flags,
    rounds_ptr,
    stop_ptr,
    num_rows,
    num_words,
    num_cols,
    residual_stride,
    inbox_rows,
    row_words,
    eps,
    weight_offset,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    ELEMENT: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    FLAGGED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SHARES_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_words
    if HAS_NORM:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    at = row.to(tl.int64) * num_words + cols
    words = tl.load(x_ptr + at, mask=mask, other=0)
    # They wrap, and by then a row's memory holds no zero that it began with.
    round_ = tl.load(rounds_ptr + row) + 1
    if SHARES_ROWS:
        num_programs = tl.num_programs(0)
        _begin(
            words, row, round_, stamped, plain, flags, inbox_rows, row_words, cols, mask, RANK, SIZE, TWO_SHOT, FLAGGED
        )
        for turn in range(0, tl.cdiv(num_rows - row, num_programs)):
            own = row + turn * num_programs
            later = own + num_programs
            if later < num_rows:
                ahead = tl.load(x_ptr + later.to(tl.int64) * num_words + cols, mask=mask, other=0)
                ahead_round = tl.load(rounds_ptr + later) + 1
                _begin(
                    ahead, later, ahead_round, stamped, plain, flags, inbox_rows, row_words, cols, mask,
                    RANK, SIZE, TWO_SHOT, FLAGGED,
                )  # fmt: skip
            # Read again rather than kept: registers decide how many programs a multiprocessor holds.
            own_at = own.to(tl.int64) * num_words + cols
            own_words = tl.load(x_ptr + own_at, mask=mask, other=0)
            own_round = tl.load(rounds_ptr + own) + 1
            if HAS_NORM:
                own_residual_at = residual_ptr + own.to(tl.int64) * residual_stride + cols
                own_residual = tl.load(own_residual_at, mask=mask, other=0)
            own_total = _end(
                own_words, own, own_round, stamped, plain, flags, rounds_ptr, stop_ptr, inbox_rows, row_words, cols,
                mask, RANK, SIZE, ELEMENT, TWO_SHOT, FLAGGED,
            )  # fmt: skip
            if HAS_NORM:
                own_total = add_norm(
                    own_total, own_residual, weight, own_residual_at, num_cols, eps, weight_offset, mask, ELEMENT
                )
            tl.store(out_ptr + own_at, own_total, mask=mask)
    else:
        if HAS_NORM:
            residual_at = residual_ptr + row.to(tl.int64) * residual_stride + cols
            residual = tl.load(residual_at, mask=mask, other=0)
        _begin(
            words, row, round_, stamped, plain, flags, inbox_rows, row_words, cols, mask, RANK, SIZE, TWO_SHOT, FLAGGED
        )
        total = _end(
            words, row, round_, stamped, plain, flags, rounds_ptr, stop_ptr, inbox_rows, row_words, cols, mask,
            RANK, SIZE, ELEMENT, TWO_SHOT, FLAGGED,
        )  # fmt: skip
        if HAS_NORM:
            total = add_norm(total, residual, weight, residual_at, num_cols, eps, weight_offset, mask, ELEMENT)
        tl.store(out_ptr + at, total, mask=mask)


def all_reduce(
    x: torch.Tensor, peers: PeerBuffers, *, tuning: AllReduceTuning | None = None, pdl: bool = False
) -> torch.Tensor:
    """The sum of every rank's x [num_rows, columns], in place.

    Raises:
        ValueError: `peers.takes(x)` is not so.
    """
    _launch(x, None, None, peers, 0.0, 0.0, tuning or AllReduceTuning(), pdl)
    return x


def all_reduce_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    peers: PeerBuffers,
    *,
    weight_offset: float = 0.0,
    tuning: AllReduceTuning | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """The normalised hidden states, in x's memory; `residual` gets the sum of every rank's x added, in place.

    Raises:
        ValueError: `peers.takes(x)` is not so, or another shape, dtype or layout does not go with x.
    """
    check_norm_operands("all_reduce_add_rms_norm", x, residual, weight)
    _launch(x, residual, weight, peers, eps, weight_offset, tuning or AllReduceTuning(), pdl)
    return x


def check_norm_operands(name: str, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    """Whether a sum x [num_rows, columns] can go on into a residual and a norm.

    Raises:
        ValueError: another shape, dtype or layout does not go with x.
    """
    fits = residual.shape == x.shape and weight.shape == x.shape[1:] and x.dtype == residual.dtype == weight.dtype
    if not fits or residual.stride(1) != 1 or weight.stride(0) != 1 or residual.stride(0) * x.element_size() % 4:
        raise ValueError(
            f"{name}: x is {x.dtype} {tuple(x.shape)}, so residual must be the same with contiguous rows that begin at "
            f"4 bytes, and weight {tuple(x.shape[1:])}; got {residual.dtype} {tuple(residual.shape)}, {weight.dtype} "
            f"{tuple(weight.shape)}"
        )


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    peers: PeerBuffers,
    eps: float,
    weight_offset: float,
    tuning: AllReduceTuning,
    pdl: bool,
) -> None:
    if not peers.takes(x):
        raise ValueError(
            f"all_reduce: x is {x.dtype} {tuple(x.shape)}; it must be contiguous float32, float16 or bfloat16 of at "
            f"most {peers.max_rows} rows of whole 32-bit words, {peers.row_words} at most"
        )
    if len(x) == 0:
        return
    words = x.view(torch.int32)  # [num_rows, num_words]
    rest = words if residual is None else residual.view(torch.int32)
    num_rows, num_words = words.shape
    flagged = tuning.flagged or num_rows > peers.stamped_rows
    num_programs = min(num_rows, tuning.num_programs or num_rows)
    _all_reduce_kernel[(num_programs,)](
        words,
        rest,
        words if weight is None else weight.view(torch.int32),
        words,
        peers.stamped,
        peers.plain,
        peers.flags,
        peers.rounds,
        peers.stop,
        num_rows,
        num_words,
        x.shape[1],
        rest.stride(0),
        peers.max_rows if flagged else peers.stamped_rows,
        peers.row_words,
        eps,
        weight_offset,
        RANK=peers.rank,
        SIZE=peers.size,
        ELEMENT=ELEMENT_TYPES[x.dtype],
        TWO_SHOT=tuning.two_shot,
        FLAGGED=flagged,
        HAS_NORM=residual is not None,
        SHARES_ROWS=num_programs < num_rows,
        BLOCK=triton.next_power_of_2(num_words),
        USE_PDL=pdl,
        num_warps=max(1, min(tuning.num_warps, triton.next_power_of_2(num_words) // 32)),
        **launch_options(pdl),
    )
