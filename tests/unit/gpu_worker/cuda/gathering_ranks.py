"""Two ranks gather twice with no sum between: one reads what came first when the other has long sent the second.

    python -m tests.unit.gpu_worker.cuda.gathering_ranks

Processes that share memory, under Triton's interpreter. Prints what each rank read, as a JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
from stepwire_kernels.all_gather import gather_buffers, gather_region_words
from stepwire_kernels.all_reduce import AllReduceTuning, peer_buffers, region_words
from stepwire_kernels.all_reduce_choice import AllReduceChoice

from gpu_worker.cuda.peer_collectives import PeerCollectives
from gpu_worker.parallel.process_group import GlooCollectives
from tests.unit.kernels.all_reduce_ranks import fork_ranks, wait_politely
from tests.unit.kernels.checks import repair_interpreter

SIZE, ROWS, COLUMNS = 2, 3, 8


def run_rank(rank: int, regions: list[torch.Tensor], stop: torch.Tensor) -> None:
    words = region_words(SIZE, ROWS, COLUMNS)
    peers = peer_buffers(rank, [region[:words] for region in regions], ROWS, COLUMNS, stop)
    gathers = [gather_buffers(rank, [region[words:] for region in regions], ROWS, COLUMNS, torch.float32, stop)]
    choices = (AllReduceChoice(1 << 20, AllReduceTuning()),)
    others = GlooCollectives(None, SIZE)  # nothing is too large
    collectives = PeerCollectives(others, peers, choices, choices, pdl=False, gathers=gathers)
    read = []
    for round_ in range(3):
        came = collectives.all_gather(torch.full((ROWS, COLUMNS), 10.0 * round_ + rank))
        # Now one rank is late with reading, now the other.
        time.sleep(0.5 * (round_ % SIZE == rank))
        read.append(came[:, ::COLUMNS].tolist())
    os.write(sys.stdout.fileno(), f"{json.dumps({'rank': rank, 'read': read})}\n".encode())


def main() -> None:
    torch.set_num_threads(1)
    repair_interpreter()
    wait_politely()
    words = region_words(SIZE, ROWS, COLUMNS) + gather_region_words(SIZE, ROWS, COLUMNS, torch.float32)
    regions = [torch.zeros(words, dtype=torch.int64).share_memory_() for _ in range(SIZE)]
    stop = torch.zeros(1, dtype=torch.int32).share_memory_()
    sys.exit(max(map(abs, fork_ranks(SIZE, lambda rank: run_rank(rank, regions, stop)))))


if __name__ == "__main__":
    main()
