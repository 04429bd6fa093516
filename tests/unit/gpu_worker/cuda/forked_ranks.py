"""Two ranks of a CUDA worker on a CPU: processes that share memory, as devices that map each other's do.

    python -m tests.unit.gpu_worker.cuda.forked_ranks MODEL_DIR tensor|dealt|early|pipeline

dealt: tensor parallel, and each draws for some of the rows wherever there are two. early: sums of two rows and more are
under way, a row at a time, while products go on. Both drive the same steps, under
Triton's interpreter. Prints a JSON line for each rank: what its results said.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stepwire_kernels.all_gather import gather_buffers, gather_region_words
from stepwire_kernels.all_reduce import AllReduceTuning, peer_buffers, region_words
from stepwire_kernels.all_reduce_choice import AllReduceChoice
from stepwire_kernels.dealt_sampling import line_words
from stepwire_kernels.sent_sums import sent_buffers, sent_region_words

from gpu_worker.cuda.early_sums import EarlySums
from gpu_worker.cuda.peer_collectives import PeerCollectives
from gpu_worker.cuda.stage_link import LinkSizes, StageLink
from gpu_worker.cuda.step_layout import StepPlanner
from gpu_worker.cuda.step_program import DEALT_ROWS
from gpu_worker.parallel.layout import GroupLayout, Place
from gpu_worker.parallel.process_group import RankGroup, StoreServer
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.runner_api import TokenMask
from load_tests.cpu_worker.step_driver import StepDriver, greedy, sampling
from tests.unit.gpu_worker.cuda.inline_runner import load_inline
from tests.unit.kernels.all_reduce_ranks import wait_politely
from tests.unit.kernels.checks import repair_interpreter

MAX_NUM_SEQS, MAX_TOP = 4, 20
HIDDEN, VOCAB_SIZE = 48, 300
MAX_ROWS, ROW_WORDS = 8, 48
SENT_WORDS = 128 * HIDDEN
LINE_WORDS = line_words(MAX_NUM_SEQS // 2, MAX_TOP)


def tensor_words() -> list[int]:
    """int64 words of a rank's region: for sums, for logits, for what was drawn."""
    return [
        region_words(2, MAX_ROWS, ROW_WORDS),
        gather_region_words(2, MAX_NUM_SEQS, VOCAB_SIZE // 2, torch.float32),
        gather_region_words(2, 1, LINE_WORDS, torch.int32),
        sent_region_words(2, SENT_WORDS),
    ]


def drive(driver: StepDriver) -> dict[str, Any]:
    """Chunks of prefills, log-probabilities, those of a prompt, penalties, steps in flight, masks, rows that follow."""
    found: dict[str, Any] = {"logprobs": []}
    driver.add(0, list(range(5, 11)), greedy(2))
    driver.add(1, [7, 8, 9], sampling(seed=3, temperature=0.8, repetition_penalty=1.2))
    driver.step({0: 4, 1: 3})
    driver.add(2, [90, 91, 92, 93], sampling(seed=5, top_k=20, num_prompt_logprobs=2))
    # Two steps in flight, with other rows each.
    first = driver.begin({0: 2, 2: 4})
    second = driver.begin({1: 1})
    result = driver.finish(first)
    driver.finish(second)
    found["prompts"] = [part.logprobs.tolist() for part in result.prompt_logprobs]
    found["awaits_prompts"] = result.awaits_prompts
    if result.logprobs is not None:
        found["logprobs"] = result.logprobs[:1].tolist()
    allowed = np.zeros((1, -(-VOCAB_SIZE // 32)), dtype=np.uint32)
    allowed[0, 2] = 0b1010
    driver.step({0: 1, 1: 1, 2: 1}, mask=TokenMask(np.array([1], dtype=np.uint32), allowed))
    found["dropped"] = driver.drop(1)
    driver.add(1, [33], greedy())
    for _ in range(2):
        driver.step()
    found["tokens"] = [driver.rows[row].tokens for row in range(3)]
    return found


def run_rank(directory: Path, mode: str, rank: int, regions: list[torch.Tensor], sizes: LinkSizes, store: str) -> None:
    stop = torch.zeros(1, dtype=torch.int32)
    early: EarlySums | None = None
    parallel, link = ParallelContext(stage=rank, stage_layers=(1, 1)), None
    if mode != "pipeline":
        server = None
        group = RankGroup(
            Place(rank, GroupLayout(2, (2,)), store_address=store, timeout_s=100.0), torch.device("cpu"), server
        )
        parts = [region.split(tensor_words()) for region in regions]
        peers = peer_buffers(rank, [part[0] for part in parts], MAX_ROWS, ROW_WORDS, stop)
        gathers = [
            gather_buffers(rank, [part[1] for part in parts], MAX_NUM_SEQS, VOCAB_SIZE // 2, torch.float32, stop),
            gather_buffers(rank, [part[2] for part in parts], 1, LINE_WORDS, torch.int32, stop),
        ]
        # Small sums one way, larger ones another, the largest as without peers.
        choices = (
            AllReduceChoice(HIDDEN * 4, AllReduceTuning()),
            AllReduceChoice(HIDDEN * 12, AllReduceTuning(two_shot=True, flagged=True)),
        )
        others = group.context().collectives
        assert others is not None
        collectives = PeerCollectives(others, peers, choices, choices, pdl=False, gathers=gathers)
        if mode == "early":
            sent = sent_buffers(rank, [part[3] for part in parts], SENT_WORDS, stop)
            early = EarlySums(sent, torch.device("cpu"), min_rows=2, num_pieces=3, multiple=1)
        parallel = ParallelContext(rank, 2, collectives, early=early)
    else:
        link = StageLink(rank, regions, sizes, stop, pdl=False)
    dealt_rows = 2 if mode == "dealt" else DEALT_ROWS
    runner = load_inline(directory, max_num_seqs=MAX_NUM_SEQS, parallel=parallel, link=link, dealt_rows=dealt_rows)
    found = {"rank": rank, **drive(StepDriver(runner)), "sums_begun": 0 if early is None else early.num_sums}
    # One write, end of line included: both ranks have the same output.
    os.write(sys.stdout.fileno(), f"{json.dumps(found)}\n".encode())


def main() -> None:
    directory, mode = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    repair_interpreter()
    wait_politely()
    planner = StepPlanner(MAX_NUM_SEQS, 128, with_graphs=False)
    sizes = LinkSizes(2, planner.max_tokens, planner.max_runs, MAX_TOP, HIDDEN, torch.float32)
    words = sizes.region_words if mode == "pipeline" else sum(tensor_words())
    regions = [torch.zeros(words, dtype=torch.int64).share_memory_() for _ in range(2)]
    # The store is the parent's: it outlives both ranks.
    server = StoreServer("127.0.0.1")
    store = torch.distributed.TCPStore(
        "127.0.0.1", int(server.address.rpartition(":")[2]), is_master=True, wait_for_workers=False,
        master_listen_fd=server.detach(),
    ) if mode != "pipeline" else None  # fmt: skip
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run_rank(directory, mode, rank, regions, sizes, server.address)
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    del store
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
