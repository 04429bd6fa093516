"""A process for each device of this machine, as ranks of one stage: for kernels that several of them run together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from stepwire.process.parent import end_with_parent
from stepwire_kernels.all_gather import GatherBuffers, gather_buffers, gather_region_words
from stepwire_kernels.all_reduce import PeerBuffers, peer_buffers, region_words

from gpu_worker.parallel.layout import GroupLayout, Place
from gpu_worker.parallel.peer_memory import PeerMemory, map_peers
from gpu_worker.parallel.process_group import RankGroup, StoreServer
from gpu_worker.parallel.shares import Collectives

_ONE_NODE = "127.0.0.1"
# Llama 3's vocabulary, of a step of decodes.
LOGITS, LOGITS_ROWS = 128256, 256
# The largest sums that are tried, and the largest in words that carry their round.
MAX_ROWS, STAMPED_ROWS = 4096, 256


@dataclass(frozen=True)
class Rank:
    """What a rank works with."""

    rank: int
    size: int
    device: torch.device
    group: RankGroup
    nccl: Collectives
    peers: PeerBuffers
    gather: GatherBuffers
    memory: PeerMemory


def capture(launch: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of what `launch` launches, for the current stream, after one run that compiles it.

    Kernels that ranks run together count rounds, so a device runs them one after the other: what is still under way on
    the current stream comes before the run on the capturing one. Side by side both would count the same round, and
    the ranks be out of step from then on.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        launch()
    return graph


def run_ranks(module: str, arguments: Sequence[str], size: int, body: Callable[[Rank], None], hidden: int) -> NoReturn:
    """Call `body` on `size` ranks, of which this process is one, and end the process with the worst exit code.

    `module` runs again for the others: its `main` must come here with the same arguments. `hidden`: the widest row in
    float32.
    """
    if "--rank" in arguments:
        # One that waits for a peer on its device would stay for ever.
        end_with_parent(signal.SIGKILL)
        at = list(arguments).index("--rank")
        body(_join(int(arguments[at + 1]), size, arguments[at + 2], None, hidden))
        _end(0)
    server = StoreServer(_ONE_NODE)
    others = [
        subprocess.Popen([sys.executable, "-m", module, *arguments, "--rank", str(rank), server.address])
        for rank in range(1, size)
    ]
    try:
        body(_join(0, size, server.address, server, hidden))
        code = max(other.wait(timeout=60) for other in others)
    finally:
        for other in others:
            other.kill()
    _end(code)


def _end(code: int) -> NoReturn:
    # Not through the interpreter's end: NCCL's threads may wait for ranks that are gone.
    torch.cuda.synchronize()
    sys.stdout.flush()
    os._exit(code)


def _join(rank: int, size: int, address: str, server: StoreServer | None, hidden: int) -> Rank:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    place = Place(rank, GroupLayout(size, (1,)), rank, size, address, _ONE_NODE)
    group = RankGroup(place, device, server)
    nccl = group.context().collectives
    words = -(-hidden // 4) * 4
    sums = region_words(size, MAX_ROWS, words, STAMPED_ROWS)
    logits = gather_region_words(size, LOGITS_ROWS, LOGITS // size, torch.bfloat16)
    memory = map_peers(group, device, range(size), sums + logits, "sums and logits")
    if memory is None or nccl is None:
        raise SystemExit("these devices do not map each other's memory")
    stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    parts = [region.split([sums, logits]) for region in memory.regions]
    peers = peer_buffers(rank, [part[0] for part in parts], MAX_ROWS, words, stop, STAMPED_ROWS)
    gather = gather_buffers(rank, [part[1] for part in parts], LOGITS_ROWS, LOGITS // size, torch.bfloat16, stop)
    return Rank(rank, size, device, group, nccl, peers, gather, memory)
