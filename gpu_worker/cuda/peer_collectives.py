"""What ranks of a stage exchange: small sums and logits through memory that all of them map, the rest by NCCL."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
import torch
from stepwire_kernels.all_gather import GatherBuffers, all_gather, deal_rows, gather_buffers, gather_region_words
from stepwire_kernels.all_reduce import (
    PeerBuffers,
    all_reduce,
    all_reduce_add_rms_norm,
    peer_buffers,
    region_words,
)
from stepwire_kernels.all_reduce_choice import (
    MEASURED_ROW_BYTES,
    AllReduceChoice,
    all_reduce_choices,
    choose,
    default_choices,
    reach,
)
from stepwire_kernels.dealt_sampling import line_words
from stepwire_kernels.sent_sums import obstacle, sent_buffers, sent_region_words

from gpu_worker.cuda.early_sums import MIN_ROWS, EarlySums
from gpu_worker.parallel.peer_memory import map_peers
from gpu_worker.parallel.process_group import RankGroup
from gpu_worker.parallel.shares import Collectives

log = structlog.get_logger(__name__)

# Of a rank's memory, for the rows that it is sent: 1,024 of 8,192 in bfloat16 with four ranks, 4,096 of 4,096 with two.
# What does not fit goes through NCCL, whatever a table says.
MAX_INBOX_BYTES = 128 << 20
# And for those of sums that are begun early, of which a rank sends every peer all: 16,384 of 4,096 in bfloat16.
MAX_SENT_BYTES = 256 << 20
# With more of them NCCL sends fewer bytes.
MAX_SENDING_RANKS = 2


class PeerCollectives:
    """Implements `Collectives`.

    Args:
        others: for what is too large or of another kind.
        sums, norms: which way by size, for sums alone and for those with the norm that follows.
        gathers: for logits, and for what each rank has drawn; what fits none of them goes through NCCL.
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
        gathers: Sequence[GatherBuffers] = (),
        held: object = None,
    ) -> None:
        self._others, self._peers, self._pdl = others, peers, pdl
        self._gathers, self._held = gathers, held
        self._sums, self._norms = sums, norms
        # Those that have been gathered into since the last sum: a peer may still read what came, and only a sum waits
        # until it has.
        self._unread: set[int] = set()
        self._nothing = torch.zeros(1, 1, dtype=torch.float32, device=peers.rounds.device)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self._unread.clear()
        rows = x.view(-1, x.shape[-1]) if x.is_contiguous() and x.ndim > 0 else x
        if self._peers.takes(rows):
            tuning = choose(self._sums, x.numel() * x.element_size())
            if tuning is not None:
                all_reduce(rows, self._peers, tuning=tuning, pdl=self._pdl)
                return x
        return self._others.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        buffers = self._buffers_for(x)
        return self._others.all_gather(x) if buffers is None else all_gather(x, buffers, pdl=self._pdl)

    def deal_rows(self, x: torch.Tensor, rows_each: int) -> torch.Tensor:
        buffers = self._buffers_for(x)
        if buffers is None:
            return self._others.deal_rows(x, rows_each)
        return deal_rows(x, buffers, rows_each, pdl=self._pdl)

    def _buffers_for(self, x: torch.Tensor) -> GatherBuffers | None:
        """Into which all ranks may write now."""
        for number, buffers in enumerate(self._gathers):
            if buffers.takes(x):
                if number in self._unread:
                    # Logits of a prompt's parts, one after the other, where the last norm sums nothing.
                    self.all_reduce(self._nothing)
                self._unread.add(number)
                return buffers
        return None

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> torch.Tensor | None:
        if not self._peers.takes(x) or x.dtype != residual.dtype or x.dtype != weight.dtype:
            return None
        tuning = choose(self._norms, x.numel() * x.element_size())
        if tuning is None:
            return None
        self._unread.clear()
        return all_reduce_add_rms_norm(
            x, residual, weight, eps, self._peers, weight_offset=weight_offset, tuning=tuning, pdl=self._pdl
        )

    def give_up(self) -> None:
        """Let kernels that wait for a peer end. What they leave is worthless, and so is every later sum."""
        self._peers.stop.fill_(1)


Choices = tuple[AllReduceChoice, ...]


def agree_on_choices(group: RankGroup, device: torch.device) -> tuple[Choices, Choices]:
    """Which way sums take, and sums with a norm, by size: the same on every rank of the group, all of which call it."""
    size, name = group.layout.tensor_parallel_size, torch.cuda.get_device_name(device)
    sums, norms = (all_reduce_choices(name, size, has_norm=has_norm) for has_norm in (False, True))
    # Ranks on devices of different kinds would go different ways.
    number = zlib.crc32(repr((sums, norms)).encode())
    least, greatest = group.least([number, -number])
    return (sums, norms) if least == -greatest else (default_choices(size), default_choices(size))


@dataclass(frozen=True, slots=True)
class PeerSizes:
    """What ranks exchange through each other's memory, the same on all of them."""

    num_ranks: int
    hidden_size: int
    vocab_size: int
    max_logits: int
    """Rows of logits of a step."""
    max_tokens: int
    """Rows of hidden states of a step."""
    max_top: int
    dtype: torch.dtype
    sums: Choices
    norms: Choices
    begins_sums: bool = True
    """Whether sums of many rows may be begun early."""

    @property
    def row_words(self) -> int:
        """32-bit words of a row of hidden states; rows begin at 16 bytes."""
        return -(-self.hidden_size * self.dtype.itemsize // 16) * 4

    @property
    def max_rows(self) -> int:
        """As far as mapped memory was measured to be faster than NCCL, within `MAX_INBOX_BYTES`."""
        inbox = MAX_INBOX_BYTES // (2 * self.num_ranks * 4 * self.row_words)
        return max(1, min(self._rows(stamped=False), inbox))

    @property
    def stamped_rows(self) -> int:
        """Of these, what is small enough to travel in words that carry their round."""
        return min(self._rows(stamped=True), self.max_rows)

    def _rows(self, *, stamped: bool) -> int:
        """Rows that tables send through mapped memory. Narrow ones are no more than were measured: a row has its price
        besides its bytes."""
        reached = max(reach(choices, stamped=stamped) for choices in (self.sums, self.norms))
        return min(self.max_tokens, reached // max(4 * self.row_words, MEASURED_ROW_BYTES))

    @property
    def columns(self) -> int:
        """Of a rank's logits; 0: they are not whole words, and go through NCCL."""
        columns = -(-self.vocab_size // self.num_ranks)
        return columns if columns * self.dtype.itemsize % 4 == 0 else 0

    @property
    def line_words(self) -> int:
        """32-bit words of what a rank draws."""
        return line_words(-(-self.max_logits // self.num_ranks), self.max_top)

    @property
    def min_sent_rows(self) -> int:
        """Of a sum that is begun early: more than any step has that has a graph, of prompts or of decodes."""
        return max(MIN_ROWS, self.max_logits + 1)

    @property
    def max_sent_rows(self) -> int:
        """Of a sum that is begun early; 0: none is."""
        rows = min(self.max_tokens, MAX_SENT_BYTES // (8 * self.row_words * max(1, self.num_ranks - 1)))
        begins = self.begins_sums and 1 < self.num_ranks <= MAX_SENDING_RANKS and rows >= self.min_sent_rows
        return rows if begins else 0

    @property
    def sent_words(self) -> int:
        """32-bit words of a summand that is sent early, at most; 0: none is."""
        return self.max_sent_rows * self.row_words

    @property
    def words(self) -> tuple[int, int, int, int]:
        """int64 words of a rank's region: for sums, for logits, for what was drawn, and for sums begun early."""
        if self.num_ranks == 1:
            return 0, 0, 0, 0
        sums = region_words(self.num_ranks, self.max_rows, self.row_words, self.stamped_rows)
        logits = gather_region_words(self.num_ranks, self.max_logits, self.columns, self.dtype)
        drawn = gather_region_words(self.num_ranks, 1, self.line_words, torch.int32)
        sent = sent_region_words(self.num_ranks, self.sent_words) if self.sent_words else 0
        return -(-sums // 2) * 2, logits, drawn, sent


def open_peer_collectives(
    group: RankGroup, others: Collectives, device: torch.device, sizes: PeerSizes, *, pdl: bool
) -> tuple[Collectives, EarlySums | None]:
    """`others`, with small sums and logits through peers' memory where ranks map it, and what begins large sums early.

    All ranks call it together.
    """
    size, rank = group.layout.tensor_parallel_size, group.place.rank
    memory = map_peers(group, device, group.layout.stage_ranks(rank), sum(sizes.words), "sums and logits")
    if memory is None:
        return others, None
    stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    parts = [region.split(sizes.words) for region in memory.regions]
    regions = [part[0] for part in parts]
    peers = peer_buffers(rank % size, regions, sizes.max_rows, sizes.row_words, stop, sizes.stamped_rows)
    gathers = [gather_buffers(rank % size, [part[2] for part in parts], 1, sizes.line_words, torch.int32, stop)]
    if sizes.columns:
        regions = [part[1] for part in parts]
        gathers.append(gather_buffers(rank % size, regions, sizes.max_logits, sizes.columns, sizes.dtype, stop))
    early = None
    if sizes.sent_words:
        sent = sent_buffers(rank % size, [part[3] for part in parts], sizes.sent_words, stop)
        reason = obstacle(sent)
        if group.least([int(reason is None)]) == [1]:
            early = EarlySums(sent, device, min_rows=sizes.min_sent_rows, held=memory)
        else:
            log.info(
                "sums of many tokens are not begun early",
                reason=reason or "another rank says so",
                mib_unused=sizes.words[3] >> 17,
            )
    return PeerCollectives(others, peers, sizes.sums, sizes.norms, pdl=pdl, gathers=gathers, held=memory), early
