"""A rank's connections to the others: the store where ranks find each other, and torch's process groups over it.

Process groups are made directly and not through `torch.distributed`'s global state: a rank has two of them (its stage,
and everybody), each says at which address it listens, and nothing is read from the environment.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed import PrefixStore, ReduceOp, TCPStore
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions, AllToAllOptions, ProcessGroupGloo

# torch's stubs of its process groups lack nearly all methods: they are `Any` here.
from gpu_worker.parallel.layout import GroupError, GroupLayout, Place
from gpu_worker.parallel.multicast import keep_multicast_off
from gpu_worker.parallel.shares import ParallelContext

# A collective that takes longer has lost a rank that nobody saw end. Loading is among what ranks wait for.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# How often gloo tries to connect two ranks, for its timeout each. All of them are there by then.
_CONNECT_TRIES = 5
# Point-to-point messages carry the number of their step and what they are.
_HIDDEN, _TOKENS = 0, 1
_NUM_TAGS = 1 << 20


class StoreServer:
    """The store's socket, listening before any rank looks for it."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, 0), family=family)
        except OSError as error:
            raise GroupError(
                f"the group's store cannot listen on {host}: {error.strerror}; set --group-listen to an address of "
                "this machine"
            ) from error
        self.address = f"{host}:{self._socket.getsockname()[1]}"

    def detach(self) -> int:
        """The file descriptor, the caller's from here on."""
        return self._socket.detach()


def _connect_store(place: Place, server: StoreServer | None) -> TCPStore:
    host, _, port = place.store_address.rpartition(":")
    try:
        return TCPStore(
            host,
            int(port),
            place.layout.world_size,
            is_master=server is not None,
            timeout=timedelta(seconds=place.timeout_s),
            wait_for_workers=False,
            master_listen_fd=None if server is None else server.detach(),
        )
    except (RuntimeError, ValueError) as error:
        raise GroupError(
            f"{place.label} cannot reach its group's store at {place.store_address} within {place.timeout_s:g} s: let "
            f"this node reach that address of rank 0's node, on every port ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _in_equal_parts(x: torch.Tensor, size: int, rows_each: int) -> torch.Tensor:
    """x [num_rows, n] with rows that mean nothing at its end: [size * rows_each, n], a part for each rank."""
    missing = size * rows_each - len(x)
    return F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


def _side_by_side(parts: torch.Tensor, size: int, rank: int, num_rows: int) -> torch.Tensor:
    """The parts [size * rows_each, n] that came from every rank as this rank's rows of `num_rows`."""
    by_rank = parts.view(size, -1, parts.shape[-1])
    rows_each = by_rank.shape[1]
    num_own = max(0, min(rows_each, num_rows - rank * rows_each))
    return torch.cat(by_rank[:, :num_own].unbind(), dim=-1)


class GlooCollectives:
    """Among ranks of one stage, on the host."""

    def __init__(self, group: Any, size: int) -> None:
        self._group, self._size = group, size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self._group.allreduce([x]).wait()
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self._size)]
        self._group.allgather([parts], [x.contiguous()]).wait()
        return torch.cat(parts, dim=-1)

    def deal_rows(self, x: torch.Tensor, rows_each: int) -> torch.Tensor:
        sent = _in_equal_parts(x, self._size, rows_each)
        # As bytes, whatever the element type.
        got = torch.empty_like(sent)
        self._group.alltoall_base(got.view(torch.uint8), sent.view(torch.uint8), [], []).wait()
        return _side_by_side(got, self._size, self._group.rank(), len(x))

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> torch.Tensor | None:
        return None


class NcclCollectives:
    """Among ranks of one stage, on the device: launched on the current stream, so that a CUDA graph can hold them."""

    def __init__(self, group: Any, size: int) -> None:
        self._group, self._size = group, size
        # On the current stream, with nothing to wait for on the host.
        self._reduce, self._gather, self._deal = AllreduceOptions(), AllgatherOptions(), AllToAllOptions()
        self._reduce.asyncOp = self._gather.asyncOp = self._deal.asyncOp = False

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self._group.allreduce([x], self._reduce)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.new_empty(self._size, *x.shape)
        self._group._allgather_base(parts, x.contiguous(), self._gather)
        return torch.cat(parts.unbind(), dim=-1)

    def deal_rows(self, x: torch.Tensor, rows_each: int) -> torch.Tensor:
        sent = _in_equal_parts(x, self._size, rows_each)
        got = torch.empty_like(sent)
        self._group.alltoall_base(got, sent, [], [], self._deal)
        return _side_by_side(got, self._size, self._group.rank(), len(x))

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> torch.Tensor | None:
        return None


@dataclass(slots=True)
class Arriving:
    """A message that has been asked for."""

    work: Any
    buffer: torch.Tensor
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_there: bool = False

    def get(self) -> torch.Tensor:
        """Block until it is there. Any thread, any number of times."""
        with self._lock:
            if not self._is_there:
                self.work.wait()
                self._is_there = True
            return self.buffer


class RankGroup:
    """One rank's view of its worker group, once all ranks have found each other.

    Args:
        server: on rank 0, the store's socket.

    Raises:
        GroupError: the store or a rank is not reached in time.
    """

    def __init__(self, place: Place, device: torch.device, server: StoreServer | None = None) -> None:
        self.place = place
        self.layout = layout = place.layout
        self._sending: tuple[deque[tuple[Any, torch.Tensor]], ...] = (deque(), deque())
        self._max_sending = (layout.num_stages + 2, 64 * layout.world_size)
        self._everyone: Any = None
        self._stage: Any = None
        if layout.world_size == 1:
            return
        self.store = _connect_store(place, server)
        self._await_others()
        try:
            self._everyone = self._gloo("all", place.rank, layout.world_size)
            if layout.tensor_parallel_size > 1:
                self._stage = self._join_stage(device)
        except RuntimeError as error:
            raise GroupError(
                f"{place.label} does not reach the other ranks from {place.host} within {place.timeout_s:g} s: all "
                f"nodes of a group must reach each other on every port ({_first_line(error)})"
            ) from error
        self._everyone._set_default_timeout(COLLECTIVE_TIMEOUT)

    def _await_others(self) -> None:
        """Until every rank has found the store: gloo would not say in words who has not."""
        keys = [f"rank {rank} is here" for rank in range(self.layout.world_size)]
        self.store.set(keys[self.place.rank], "")
        try:
            self.store.wait(keys, timedelta(seconds=self.place.timeout_s))
        except RuntimeError as error:
            missing = [self.layout.describe_rank(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
            raise GroupError(
                f"{' and '.join(missing)} did not come to the group's store at {self.place.store_address} within "
                f"{self.place.timeout_s:g} s: see what that process waits for, let its node reach that address of rank "
                "0's node on every port, or give it longer with --group-timeout-s"
            ) from error

    def _join_stage(self, device: torch.device) -> Any:
        layout, rank = self.layout, self.place.rank
        name, number = f"stage {layout.stage_of(rank)}", rank % layout.tensor_parallel_size
        if device.type != "cuda":
            group = self._gloo(name, number, layout.tensor_parallel_size)
            group._set_default_timeout(COLLECTIVE_TIMEOUT)
            return group
        from torch.distributed import ProcessGroupNCCL

        keep_multicast_off()
        options: Any = ProcessGroupNCCL.Options()
        options._timeout = COLLECTIVE_TIMEOUT
        nccl: Any = ProcessGroupNCCL(PrefixStore(name, self.store), number, layout.tensor_parallel_size, options)
        nccl.eager_connect_single_device(device)
        return nccl

    def _gloo(self, name: str, rank: int, size: int) -> Any:
        kind: Any = ProcessGroupGloo
        options = kind._Options()
        options._devices = [kind.create_device(hostname=self.place.host)]
        options._timeout = timedelta(seconds=self.place.timeout_s / _CONNECT_TRIES)
        return kind(PrefixStore(name, self.store), rank, size, options)

    @property
    def samples(self) -> bool:
        """Whether this rank takes part in drawing the tokens: those of the last stage do."""
        return self.layout.stage_of(self.place.rank) == self.layout.num_stages - 1

    def context(self) -> ParallelContext:
        layout, rank = self.layout, self.place.rank
        collectives: GlooCollectives | NcclCollectives | None = None
        if self._stage is not None:
            kind = GlooCollectives if isinstance(self._stage, ProcessGroupGloo) else NcclCollectives
            collectives = kind(self._stage, layout.tensor_parallel_size)
        return ParallelContext(
            rank=rank % layout.tensor_parallel_size,
            size=layout.tensor_parallel_size,
            collectives=collectives,
            splits_experts_whole=layout.expert_parallel,
            stage=layout.stage_of(rank),
            stage_layers=layout.stage_layers,
        )

    def least(self, values: list[int]) -> list[int]:
        """The least of every rank's values, entry by entry: what all ranks can agree on."""
        if self._everyone is None:
            return values
        agreed = torch.tensor(values, dtype=torch.int64)
        self._everyone.allreduce([agreed], ReduceOp.MIN).wait()
        return [int(value) for value in agreed]

    # From stage to stage, on the host. `step` counts what this rank has executed: the same on all ranks.

    def send_hidden(self, hidden: torch.Tensor, step: int) -> None:
        """To the same rank of the next stage. Returns at once."""
        self._send(hidden, self.place.rank + self.layout.tensor_parallel_size, step, _HIDDEN)

    def receive_hidden(self, buffer: torch.Tensor, step: int) -> torch.Tensor:
        """From the same rank of the stage before; blocks."""
        return self._expect(buffer, self.place.rank - self.layout.tensor_parallel_size, step, _HIDDEN).get()

    def send_tokens(self, words: torch.Tensor, step: int) -> None:
        """From a rank of the last stage to all of the others: each of its ranks has them. Returns at once."""
        for rank in range(self.layout.world_size - self.layout.tensor_parallel_size):
            if self.layout.sender_of_tokens(rank) == self.place.rank:
                self._send(words, rank, step, _TOKENS)

    def expect_tokens(self, buffer: torch.Tensor, step: int) -> Arriving:
        """On a stage before the last."""
        return self._expect(buffer, self.layout.sender_of_tokens(self.place.rank), step, _TOKENS)

    def _send(self, tensor: torch.Tensor, rank: int, step: int, kind: int) -> None:
        if self._everyone is None:
            return
        sending = self._sending[kind]
        if len(sending) == self._max_sending[kind]:
            sending.popleft()[0].wait()
        # Whoever sends keeps the tensor until it has gone.
        sending.append((self._everyone.send([tensor], rank, (2 * step + kind) % _NUM_TAGS), tensor))

    def _expect(self, buffer: torch.Tensor, rank: int, step: int, kind: int) -> Arriving:
        if self._everyone is None:
            raise RuntimeError("a group of one rank has nobody to receive from")
        return Arriving(self._everyone.recv([buffer], rank, (2 * step + kind) % _NUM_TAGS), buffer)


def single_rank(num_layers: int) -> RankGroup:
    """A group of one."""
    return RankGroup(Place(0, GroupLayout(1, (num_layers,))), torch.device("cpu"))
