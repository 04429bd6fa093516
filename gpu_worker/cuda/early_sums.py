"""Sums over ranks that are under way while matrix products go on: those of steps with many tokens.

A row-parallel product is made in pieces of rows. Each piece is copied to the peers on a stream of its own as soon as it
is there, beside the product of the next one, and the last beside the norm and product that read the first. Nothing of
it is ever captured: steps of so many tokens have no graph (`step_layout.GRAPH_TOKENS`, and decodes of `max_num_seqs`).

A step whose kernels are compiled and not run sends all the same, on every rank alike: its rows are read by nobody, and
the next round's are behind them on the stream.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from stepwire_kernels.sent_sums import Piece, SentBuffers, add_sent, add_sent_rms_norm, send

from gpu_worker.cuda.step_layout import GRAPH_TOKENS

# Sums of fewer rows are not begun early. It depends on nothing but the step's shape, so all ranks do alike.
MIN_ROWS = GRAPH_TOKENS[-1][0] + 1
NUM_PIECES = 2
# Rows of a piece, but of the last: whole tiles of any matrix product.
PIECE_MULTIPLE = 256


def pieces_of(num_rows: int, num_pieces: int = NUM_PIECES, multiple: int = PIECE_MULTIPLE) -> tuple[slice, ...]:
    """Rows in pieces that are as alike as whole multiples allow; none is empty."""
    each = -(-num_rows // (num_pieces * multiple)) * multiple
    return tuple(slice(first, min(num_rows, first + each)) for first in range(0, num_rows, each))


@dataclass(frozen=True, slots=True)
class _UnderWay:
    rows: torch.Tensor  # [num_rows, columns]: this rank's
    piece: Piece
    copied: torch.cuda.Event | None
    """After this rank's copies of them."""


class EarlySums:
    """Implements `shares.EarlySums` for ranks that map each other's memory.

    Every rank begins and ends the same sums in the same order, and ends all pieces of one before it begins the next.

    Args:
        min_rows: `PeerSizes.min_sent_rows`.
        num_pieces, multiple: for tests and benchmarks.
    """

    def __init__(
        self,
        buffers: SentBuffers,
        device: torch.device,
        *,
        min_rows: int = MIN_ROWS,
        num_pieces: int = NUM_PIECES,
        multiple: int = PIECE_MULTIPLE,
        held: object = None,
    ) -> None:
        self._buffers, self._held = buffers, held
        self.min_rows, self._num_pieces, self._multiple = min_rows, num_pieces, multiple
        # Begun so far; the last one's number is its round's.
        self.num_sums = 0
        self._under_way: deque[_UnderWay] = deque()
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            # A piece's own; by the time that one is recorded again, what it was recorded for has been waited for.
            self._ready, self._copied = ([torch.cuda.Event() for _ in range(num_pieces)] for _ in range(2))

    def pieces(self, num_rows: int, row_bytes: int) -> tuple[slice, ...]:
        if num_rows < self.min_rows or row_bytes % 4 or num_rows * row_bytes > 4 * self._buffers.words:
            return ()
        return pieces_of(num_rows, self._num_pieces, self._multiple)

    def begin(self, x: torch.Tensor, rows: slice) -> None:
        if rows.start == 0:
            if self._under_way:
                raise RuntimeError("a sum is begun while the one before is still under way")
            self.num_sums += 1
        part, number = x[rows], len(self._under_way)
        piece = Piece(self.num_sums, number, rows.start)
        copied: torch.cuda.Event | None = None
        if self.stream is None:
            send(part, self._buffers, piece)
        else:
            ready, copied = self._ready[number], self._copied[number]
            ready.record()
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(ready)
                send(part, self._buffers, piece)
                copied.record()
        # It holds the rows' memory until the current stream has waited for the copies.
        self._under_way.append(_UnderWay(part, piece, copied))

    def under_way(self, x: torch.Tensor) -> tuple[slice, ...]:
        if not self._under_way or self._under_way[0].rows.data_ptr() != x.data_ptr():
            return ()
        found, num_rows = [], 0
        for each in self._under_way:
            if num_rows < len(x):
                found.append(slice(num_rows, num_rows + len(each.rows)))
                num_rows += len(each.rows)
        if num_rows != len(x):
            raise RuntimeError(f"{len(x)} rows are asked for where pieces of {found} are under way")
        return tuple(found)

    def end(self, x: torch.Tensor) -> torch.Tensor:
        for _ in self.under_way(x):
            part = self._next()
            add_sent(part.rows, self._buffers, part.piece)
        return x

    def end_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> torch.Tensor | None:
        if not x.dtype == residual.dtype == weight.dtype:
            return None
        for rows in self.under_way(x):
            part = self._next()
            add_sent_rms_norm(
                part.rows, residual[rows], weight, eps, self._buffers, part.piece, weight_offset=weight_offset
            )
        return x

    def _next(self) -> _UnderWay:
        part = self._under_way.popleft()
        if part.copied is not None:
            # The sum overwrites what is copied.
            torch.cuda.current_stream().wait_event(part.copied)
        return part
