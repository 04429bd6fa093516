"""Device memory that ranks map of each other, by torch's symmetric memory.

NVLink multicast is never used: it is switched off in torch and in NCCL before either looks for it, memory is not
exchanged where torch still reports it as on, and the kernels here know plain addresses only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch.distributed import PrefixStore

from gpu_worker.parallel.process_group import RankGroup

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """`regions`: int64 [num_words] of every rank that takes part, in rank order, as this one maps them; all zero."""

    regions: tuple[torch.Tensor, ...]
    # What must live as long as the mapping.
    held: tuple[Any, ...]


def map_peers(
    group: RankGroup, device: torch.device, ranks: Sequence[int], num_words: int, what: str
) -> PeerMemory | None:
    """Give each of `ranks` `num_words` int64 words that all of them map; None: they cannot, and this was logged.

    Every rank of the group calls it at the same time, with ranks among which it is, and all get the same answer.
    `what` says what the memory is for.
    """
    reason = _obstacle(group, device, ranks)
    memory: PeerMemory | None = None
    if group.least([int(reason is None)]) == [1]:
        try:
            memory = _exchange(group, device, ranks, num_words, what)
        except (RuntimeError, AttributeError, TypeError) as error:
            # The last two: torch's interface is not promised to stay as it is, and NCCL does without.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    # Also the barrier after which everybody's region is zero.
    if group.least([int(memory is not None)]) == [1]:
        log.info("ranks map each other's memory", purpose=what, mib_per_rank=num_words >> 17)
        return memory
    log.info("ranks do not map each other's memory", purpose=what, reason=reason or "another rank says so")
    return None


def _obstacle(group: RankGroup, device: torch.device, ranks: Sequence[int]) -> str | None:
    """Why this rank cannot map its peers' memory; None: nothing is known against it."""
    if device.type != "cuda":
        return f"{device.type} has no memory to map"
    per_node, place = group.layout.ranks_per_node, group.place
    if len({rank // per_node for rank in ranks}) > 1:
        return "they are on several nodes"
    for rank in ranks:
        index = place.local_rank - place.rank + rank
        if rank != place.rank and not torch.cuda.can_device_access_peer(device, torch.device("cuda", index)):
            return f"{device} does not reach cuda:{index}"
    if _symmetric_memory().has_multicast_support(torch._C._autograd.DeviceType.CUDA, device.index):
        return "torch would set up NVLink multicast"
    return None


def _symmetric_memory() -> Any:
    from torch._C._distributed_c10d import _SymmetricMemory

    return _SymmetricMemory


def _exchange(group: RankGroup, device: torch.device, ranks: Sequence[int], num_words: int, what: str) -> PeerMemory:
    import torch.distributed._symmetric_memory as symmetric_memory
    from torch._C import _distributed_c10d

    c10d: Any = _distributed_c10d
    symm_mem: Any = symmetric_memory
    own_place, size = list(ranks).index(group.place.rank), len(ranks)
    name = f"{what} of ranks {', '.join(map(str, ranks))}"
    store = PrefixStore(name, group.store)
    # torch finds ranks and store by the name of a group: one that carries nothing but these.
    named = c10d.ProcessGroup(store, own_place, size)
    named._set_group_name(name)
    c10d._register_process_group(name, named)
    if hasattr(_symmetric_memory(), "set_group_info"):
        # Older releases look the name up here.
        _symmetric_memory().set_group_info(name, own_place, size, store)
    own = symm_mem.empty(num_words, dtype=torch.int64, device=device)
    handle = symm_mem.rendezvous(own, name)
    own.zero_()
    torch.cuda.synchronize(device)
    regions = tuple(
        own if peer == own_place else handle.get_buffer(peer, (num_words,), torch.int64) for peer in range(size)
    )
    return PeerMemory(regions, (named, own, handle))
