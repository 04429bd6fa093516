"""Rows from one device to another through memory that both map, in the order of the two devices' streams.

The sender stores a row into the receiver's inbox and releases a flag; the receiver copies it out and releases an
acknowledgement in the sender's memory. An inbox has `places` for each row, used in turn, and the sender waits for one
to be free: it may run that many rounds ahead. Rounds are counted for each row, on both devices, so that a captured
graph replays as a new round. Row r of a round is exchanged by program r on either side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stepwire_kernels.dependent_launch import launch_options, release_downstream, wait_upstream
from stepwire_kernels.signals import await_round, publish


@dataclass(frozen=True)
class Mailbox:
    """One direction between two devices, as one of them maps it.

    What stands at the receiver: inbox, flags. At the sender: acknowledged. `rounds` is the user's own.
    """

    inbox: torch.Tensor  # int32 [places, max_rows, row_words]
    flags: torch.Tensor  # int32 [places, max_rows]
    acknowledged: torch.Tensor  # int32 [max_rows]
    rounds: torch.Tensor  # int32 [max_rows]
    stop: torch.Tensor  # int32 [1]: the host's, page-locked; not zero: wait no more


def mailbox_words(places: int, max_rows: int, row_words: int) -> tuple[int, int]:
    """int32 words that stand at the receiver, and at the sender."""
    return places * max_rows * (row_words + 1), max_rows


def lay_out_mailbox(
    at_receiver: torch.Tensor, at_sender: torch.Tensor, places: int, max_rows: int, row_words: int,
    rounds: torch.Tensor, stop: torch.Tensor,
) -> Mailbox:  # fmt: skip
    """A mailbox in int32 words that `mailbox_words` counts, all zero."""
    middle = places * max_rows * row_words
    return Mailbox(
        inbox=at_receiver[:middle].view(places, max_rows, row_words),
        flags=at_receiver[middle:].view(places, max_rows),
        acknowledged=at_sender,
        rounds=rounds,
        stop=stop,
    )


@triton.jit
def _send_rows_kernel(
    x_ptr,
    inbox_ptr,
    flags_ptr,
    acknowledged_ptr,
    rounds_ptr,
    stop_ptr,
    num_words,
    max_rows,
    row_words,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    round_ = tl.load(rounds_ptr + row) + 1
    slot = (((round_ % PLACES) + PLACES) % PLACES * max_rows + row).to(tl.int64)
    await_round(acknowledged_ptr + row, round_ - PLACES, stop_ptr)
    for start in range(0, num_words, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < num_words
        words = tl.load(x_ptr + row.to(tl.int64) * num_words + cols, mask=mask, other=0)
        tl.store(inbox_ptr + slot * row_words + cols, words, mask=mask)
    publish(flags_ptr + slot, round_)
    tl.store(rounds_ptr + row, round_)


@triton.jit
def _receive_rows_kernel(
    out_ptr,
    inbox_ptr,
    flags_ptr,
    acknowledged_ptr,
    rounds_ptr,
    stop_ptr,
    num_words,
    max_rows,
    row_words,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0)
    release_downstream(USE_PDL)
    wait_upstream(USE_PDL)
    round_ = tl.load(rounds_ptr + row) + 1
    slot = (((round_ % PLACES) + PLACES) % PLACES * max_rows + row).to(tl.int64)
    await_round(flags_ptr + slot, round_, stop_ptr)
    for start in range(0, num_words, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < num_words
        words = tl.load(inbox_ptr + slot * row_words + cols, mask=mask, other=0, volatile=True)
        tl.store(out_ptr + row.to(tl.int64) * num_words + cols, words, mask=mask)
    publish(acknowledged_ptr + row, round_)
    tl.store(rounds_ptr + row, round_)


def send_rows(x: torch.Tensor, mailbox: Mailbox, *, pdl: bool = False) -> None:
    """Send x [num_rows, columns], any dtype whose rows fill 32-bit words.

    Raises:
        ValueError: x is not contiguous, or does not fit.
    """
    _launch(_send_rows_kernel, x, mailbox, pdl)


def receive_rows(out: torch.Tensor, mailbox: Mailbox, *, pdl: bool = False) -> torch.Tensor:
    """Receive into out [num_rows, columns] what was sent with the same shape, and return it.

    Raises:
        ValueError: out is not contiguous, or does not fit.
    """
    _launch(_receive_rows_kernel, out, mailbox, pdl)
    return out


def _launch(kernel: triton.JITFunction, x: torch.Tensor, mailbox: Mailbox, pdl: bool) -> None:
    places, max_rows, row_words = mailbox.inbox.shape
    num_words, rest = divmod(x.shape[1] * x.element_size(), 4)
    if not x.is_contiguous() or rest or len(x) > max_rows or num_words > row_words:
        raise ValueError(
            f"mailbox: {x.dtype} {tuple(x.shape)} must be contiguous, at most {max_rows} rows of at most {row_words} "
            "whole 32-bit words"
        )
    if len(x) == 0:
        return
    block = min(4096, triton.next_power_of_2(num_words))
    kernel[(len(x),)](
        x.view(torch.int32),
        mailbox.inbox,
        mailbox.flags,
        mailbox.acknowledged,
        mailbox.rounds,
        mailbox.stop,
        num_words,
        max_rows,
        row_words,
        PLACES=places,
        BLOCK=block,
        USE_PDL=pdl,
        num_warps=max(1, min(8, block // 128)),
        **launch_options(pdl),
    )
