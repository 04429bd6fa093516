"""Sums over the ranks of a stage: small ones through memory that they map of each other, the rest by NCCL."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from stepwire_kernels.all_reduce import (
    PeerBuffers,
    all_reduce,
    all_reduce_add_rms_norm,
    peer_buffers,
    region_words,
)
from stepwire_kernels.all_reduce_choice import AllReduceChoice, all_reduce_choices, choose, default_choices

from gpu_worker.parallel.peer_memory import map_peers
from gpu_worker.parallel.process_group import RankGroup
from gpu_worker.parallel.shares import Collectives

# Rows that are summed through peers' memory at most: decodes, and small mixed steps. A program for each, two of which
# fit on a multiprocessor.
MAX_ROWS = 256


class PeerCollectives:
    """Implements `Collectives`.

    Args:
        others: for what is too large or of another kind.
        sums, norms: which way by size, for sums alone and for those with the norm that follows.
        held: what must live as long as `peers`.
    """

    def __init__(
        self,
        others: Collectives,
        peers: PeerBuffers,
        sums: Sequence[AllReduceChoice],
        norms: Sequence[AllReduceChoice],
        *,
        pdl: bool,
        held: object = None,
    ) -> None:
        self._others, self._peers, self._pdl = others, peers, pdl
        self._held = held
        self._sums, self._norms = sums, norms

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, x.shape[-1]) if x.is_contiguous() and x.ndim > 0 else x
        if self._peers.takes(rows):
            tuning = choose(self._sums, x.numel() * x.element_size())
            if tuning is not None:
                all_reduce(rows, self._peers, tuning=tuning, pdl=self._pdl)
                return x
        return self._others.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._others.all_gather(x)

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> torch.Tensor | None:
        if not self._peers.takes(x) or x.dtype != residual.dtype or x.dtype != weight.dtype:
            return None
        tuning = choose(self._norms, x.numel() * x.element_size())
        if tuning is None:
            return None
        return all_reduce_add_rms_norm(
            x, residual, weight, eps, self._peers, weight_offset=weight_offset, tuning=tuning, pdl=self._pdl
        )

    def give_up(self) -> None:
        """Let kernels that wait for a peer end. What they leave is worthless, and so is every later sum."""
        self._peers.stop.fill_(1)


def row_words(hidden_size: int, dtype: torch.dtype) -> int:
    """32-bit words of a row of hidden states, as peers' memory holds it."""
    return -(-hidden_size * dtype.itemsize // 16) * 4


def peer_bytes(size: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Memory of a rank's region."""
    return 0 if size == 1 else 8 * region_words(size, MAX_ROWS, row_words(hidden_size, dtype))


def open_peer_collectives(
    group: RankGroup, others: Collectives, device: torch.device, hidden_size: int, dtype: torch.dtype, *, pdl: bool
) -> Collectives:
    """`others`, with small sums through peers' memory where ranks can map it. All ranks call it at the same time."""
    size = group.layout.tensor_parallel_size
    words = row_words(hidden_size, dtype)
    ranks = group.layout.stage_ranks(group.place.rank)
    memory = map_peers(group, device, ranks, region_words(size, MAX_ROWS, words), "sums")
    if memory is None:
        return others
    stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    peers = peer_buffers(group.place.rank % size, memory.regions, MAX_ROWS, words, stop)
    name = torch.cuda.get_device_name(device)
    sums, norms = (all_reduce_choices(name, size, has_norm=has_norm) for has_norm in (False, True))
    # Ranks on devices of different kinds would go different ways.
    number = zlib.crc32(repr((sums, norms)).encode())
    least, greatest = group.least([number, -number])
    if least != -greatest:
        sums = norms = default_choices(size)
    return PeerCollectives(others, peers, sums, norms, pdl=pdl, held=memory)
