"""What ranks of a stage exchange: small sums and logits through memory that all of them map, the rest by NCCL."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from stepwire_kernels.all_gather import GatherBuffers, all_gather, gather_buffers, gather_region_words
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
        gather: for the logits; None: NCCL.
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
        gather: GatherBuffers | None = None,
        held: object = None,
    ) -> None:
        self._others, self._peers, self._pdl = others, peers, pdl
        self._gather, self._held = gather, held
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
        if self._gather is not None and self._gather.takes(x):
            return all_gather(x, self._gather, pdl=self._pdl)
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


@dataclass(frozen=True, slots=True)
class PeerSizes:
    """What ranks exchange through each other's memory, the same on all of them."""

    num_ranks: int
    hidden_size: int
    vocab_size: int
    max_logits: int
    """Rows of logits of a step."""
    dtype: torch.dtype

    @property
    def row_words(self) -> int:
        """32-bit words of a row of hidden states; rows begin at 16 bytes."""
        return -(-self.hidden_size * self.dtype.itemsize // 16) * 4

    @property
    def columns(self) -> int:
        """Of a rank's logits; 0: they are not whole words, and go through NCCL."""
        columns = -(-self.vocab_size // self.num_ranks)
        return columns if columns * self.dtype.itemsize % 4 == 0 else 0

    @property
    def words(self) -> tuple[int, int]:
        """int64 words of a rank's region: for sums, and for logits."""
        if self.num_ranks == 1:
            return 0, 0
        sums = region_words(self.num_ranks, MAX_ROWS, self.row_words)
        return -(-sums // 2) * 2, gather_region_words(self.num_ranks, self.max_logits, self.columns, self.dtype)


def open_peer_collectives(
    group: RankGroup, others: Collectives, device: torch.device, sizes: PeerSizes, *, pdl: bool
) -> Collectives:
    """`others`, with small sums and logits through peers' memory where ranks map it. All ranks call it together."""
    size, rank = group.layout.tensor_parallel_size, group.place.rank
    memory = map_peers(group, device, group.layout.stage_ranks(rank), sum(sizes.words), "sums and logits")
    if memory is None:
        return others
    stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    parts = [region.split(sizes.words) for region in memory.regions]
    peers = peer_buffers(rank % size, [part[0] for part in parts], MAX_ROWS, sizes.row_words, stop)
    gather = None
    if sizes.columns:
        regions = [part[1] for part in parts]
        gather = gather_buffers(rank % size, regions, sizes.max_logits, sizes.columns, sizes.dtype, stop)
    name = torch.cuda.get_device_name(device)
    sums, norms = (all_reduce_choices(name, size, has_norm=has_norm) for has_norm in (False, True))
    # Ranks on devices of different kinds would go different ways.
    number = zlib.crc32(repr((sums, norms)).encode())
    least, greatest = group.least([number, -number])
    if least != -greatest:
        sums = norms = default_choices(size)
    return PeerCollectives(others, peers, sums, norms, pdl=pdl, gather=gather, held=memory)
