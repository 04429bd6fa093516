"""Sums over ranks whose summands the devices' copy engines bring, alone or with the residual add and RMSNorm after.

    total    <- x_0 + x_1 + ... + x_(size-1)                  (in float32, in rank order; rounded to x's dtype)
    residual <- residual + total                              (rounded to the residual's dtype)
    out      <- residual / sqrt(mean(residual^2) + eps) * (weight_offset + weight)

x, residual, out: [num_rows, columns], weight: [columns], as in `all_reduce.py`, and with the same bits.

`send` copies rows of a summand into an inbox of every peer and then writes a flag there, both by the stream they are
launched on: no multiprocessor has a part in it, so that a matrix product beside it keeps all of them. `add_sent` waits
for the peers' flags, and adds what has come to what this rank has itself. Rows of a round may travel in several pieces,
each with a flag of its own, at most `MAX_PIECES`.

An inbox has two places for every source, used in turn, round by round. That is enough where every rank adds up all
pieces of a round before it sends the first of the next: whoever sends round n has taken its peers' round n - 1, which
they sent after they had added up round n - 2.

One-shot, so that each rank sends its whole summand to every peer: for few ranks. Nobody waits for ever (`signals.py`).
Only copies, loads, stores and atomics on mapped memory: no multicast.

Source: CUDA driver API, "Stream memory operations": a write is behind a fence of the system's scope, for what its
stream did before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.all_reduce import ELEMENT_TYPES, add_norm, check_norm_operands, pack, unpack
from stepwire_kernels.signals import await_round

MAX_PIECES = 8


@dataclass(frozen=True)
class SentBuffers:
    """One rank's view of the memory that all ranks map, theirs in rank order, alike in shape.

    A rank's sources are its peers in rank order.
    """

    rank: int
    words: int
    """32-bit words of a summand at most."""
    inboxes: tuple[torch.Tensor, ...]  # int32 [2, size - 1, words] each
    flags: tuple[torch.Tensor, ...]  # int32 [2 * (size - 1) * MAX_PIECES] each
    stop: torch.Tensor  # int32 [1]: the host's, page-locked; not zero: wait no more

    @property
    def size(self) -> int:
        return len(self.inboxes)

    def flag(self, round_: int, source: int, piece: int) -> int:
        """The number of a flag, of a rank's `source`-th peer."""
        return ((round_ % 2) * (self.size - 1) + source) * MAX_PIECES + piece


@dataclass(frozen=True)
class Piece:
    """Which rows of which round: the same on all ranks."""

    round_: int
    """From 1 on, one more for each summand."""
    number: int
    first_row: int


def sent_region_words(size: int, words: int) -> int:
    """int64 words of a rank's region; `words` must be a multiple of 4."""
    return (size - 1) * (words + MAX_PIECES)


def sent_buffers(rank: int, regions: Sequence[torch.Tensor], words: int, stop: torch.Tensor) -> SentBuffers:
    """Lay `regions` (int64 [sent_region_words], every rank's as this one maps it, all zero) out.

    Raises:
        ValueError: summands that are no multiple of 16 bytes.
    """
    if words % 4:
        raise ValueError(f"words must be a multiple of 4, so that summands begin at 16 bytes; got {words}")
    sources = len(regions) - 1
    return SentBuffers(
        rank=rank,
        words=words,
        inboxes=tuple(region[: sources * words].view(torch.int32).view(2, sources, words) for region in regions),
        flags=tuple(region[sources * words :].view(torch.int32) for region in regions),
        stop=stop,
    )


def obstacle(buffers: SentBuffers) -> str | None:
    """Why this rank cannot send; None: it can. Before anything was sent: flags that are zero stay so."""
    try:
        for flags in buffers.flags:
            _write_flag(flags, 0, 0)
        if buffers.flags[0].is_cuda:
            torch.cuda.synchronize(buffers.flags[0].device)
    except (RuntimeError, AttributeError) as error:
        # A driver or a torch without such writes.
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def send(rows: torch.Tensor, buffers: SentBuffers, piece: Piece) -> None:
    """Bring rows [num_rows, columns] of this rank's summand to every peer, on the current stream.

    Raises:
        ValueError: rows that are not contiguous, no whole 32-bit words, or do not fit.
    """
    words, at = _fitting(rows, buffers, piece)
    peers = [(buffers.rank + step) % buffers.size for step in range(1, buffers.size)]
    source = [buffers.rank - (buffers.rank > peer) for peer in range(buffers.size)]
    for peer in peers:
        place = buffers.inboxes[peer][piece.round_ % 2, source[peer]]
        place[at : at + words.numel()].copy_(words.view(-1), non_blocking=True)
    for peer in peers:
        _write_flag(buffers.flags[peer], buffers.flag(piece.round_, source[peer], piece.number), piece.round_)


def _write_flag(flags: torch.Tensor, number: int, round_: int) -> None:
    if flags.is_cuda:
        torch.ops.symm_mem.stream_write_value32_(flags.view(torch.uint32), number, round_ & 0xFFFFFFFF)
    else:
        flags[number] = _as_int32(round_)


def _as_int32(value: int) -> int:
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def _fitting(x: torch.Tensor, buffers: SentBuffers, piece: Piece) -> tuple[torch.Tensor, int]:
    """x as int32 [num_rows, num_words], and where its words stand in an inbox."""
    row_words, rest = divmod(x.shape[-1] * x.element_size(), 4)
    is_whole = x.dtype in ELEMENT_TYPES and x.ndim == 2 and x.is_contiguous() and rest == 0
    at = piece.first_row * row_words
    if not is_whole or at + len(x) * row_words > buffers.words or not 0 <= piece.number < MAX_PIECES:
        raise ValueError(
            f"sent sums: x is {x.dtype} {tuple(x.shape)}, piece {piece.number} from row {piece.first_row} on; it must "
            f"be contiguous float32, float16 or bfloat16 of whole 32-bit words, {buffers.words} of all pieces at most, "
            f"and one of {MAX_PIECES} pieces"
        )
    return x.view(torch.int32), at


# One kernel for all rounds and pieces.
@triton.jit(do_not_specialize=["round_", "first_flag"])
def _add_sent_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    inbox_ptr,
    flags_ptr,
    stop_ptr,
    round_,
    first_flag,
    num_words,
    num_cols,
    residual_stride,
    source_words,
    eps,
    weight_offset,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    ELEMENT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    FLAGS_EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_words
    at = row * num_words + cols
    words = tl.load(x_ptr + at, mask=mask, other=0)
    if HAS_NORM:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0)
        residual_at = residual_ptr + row * residual_stride + cols
        residual = tl.load(residual_at, mask=mask, other=0)
    low = tl.zeros(words.shape, dtype=tl.float32)
    high = tl.zeros(words.shape, dtype=tl.float32)
    for rank in tl.static_range(SIZE):
        part = words
        if rank != RANK:
            source = rank - 1 if rank > RANK else rank
            await_round(flags_ptr + first_flag + source * FLAGS_EACH, round_, stop_ptr, EXACTLY=True)
            part = tl.load(inbox_ptr + source * source_words + at, mask=mask, other=0, volatile=True)
        part_low, part_high = unpack(part, ELEMENT)
        low += part_low
        high += part_high
    total = pack(low, high, ELEMENT)
    if HAS_NORM:
        total = add_norm(total, residual, weight, residual_at, num_cols, eps, weight_offset, mask, ELEMENT)
    tl.store(x_ptr + at, total, mask=mask)


def add_sent(x: torch.Tensor, buffers: SentBuffers, piece: Piece) -> torch.Tensor:
    """The sum of every rank's rows x [num_rows, columns] that `send` was given, in place, on the current stream.

    This rank's own copies must have been made.

    Raises:
        ValueError: as `send`.
    """
    _launch(x, None, None, buffers, piece, 0.0, 0.0)
    return x


def add_sent_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    buffers: SentBuffers,
    piece: Piece,
    *,
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """The normalised hidden states, in x's memory; `residual` gets the sum of every rank's x added, in place.

    Raises:
        ValueError: as `send`, or another shape, dtype or layout does not go with x.
    """
    check_norm_operands("add_sent_rms_norm", x, residual, weight)
    _launch(x, residual, weight, buffers, piece, eps, weight_offset)
    return x


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    buffers: SentBuffers,
    piece: Piece,
    eps: float,
    weight_offset: float,
) -> None:
    words, at = _fitting(x, buffers, piece)
    if len(x) == 0:
        return
    rest = words if residual is None else residual.view(torch.int32)
    num_rows, num_words = words.shape
    block = triton.next_power_of_2(num_words)
    _add_sent_kernel[(num_rows,)](
        words,
        rest,
        words if weight is None else weight.view(torch.int32),
        buffers.inboxes[buffers.rank][piece.round_ % 2].view(-1)[at:],
        buffers.flags[buffers.rank],
        buffers.stop,
        _as_int32(piece.round_),
        buffers.flag(piece.round_, 0, piece.number),
        num_words,
        x.shape[1],
        rest.stride(0),
        buffers.words,
        eps,
        weight_offset,
        RANK=buffers.rank,
        SIZE=buffers.size,
        ELEMENT=ELEMENT_TYPES[x.dtype],
        HAS_NORM=residual is not None,
        FLAGS_EACH=MAX_PIECES,
        BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )
