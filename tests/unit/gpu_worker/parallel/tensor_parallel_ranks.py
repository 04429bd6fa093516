"""A tensor-parallel group of processes: computes a prompt's logits, which rank 0 saves.

    python -m tests.unit.gpu_worker.parallel.tensor_parallel_ranks SIZE expert|width MODEL_DIR OUTPUT_FILE

expert: splits experts whole. Ranks are forked, so that torch is imported once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from gpu_worker.assembly import attention_spec, load_model
from gpu_worker.attention.api import StepMetadata
from gpu_worker.attention.indexed_backend import torch_attention
from gpu_worker.config import WorkerSettings
from gpu_worker.kv_cache import KVCache, KVCacheShape
from gpu_worker.layers.linear import BuildContext
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.layout import GroupLayout, Place
from gpu_worker.parallel.process_group import RankGroup, StoreServer
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.quant.scheme import make_scheme

TOKEN_IDS = [3, 141, 59, 26, 53, 58, 97, 93, 238, 46, 300, 0]


@torch.inference_mode()
def prompt_logits(directory: Path, parallel: ParallelContext) -> torch.Tensor:
    """[num_tokens, vocab_size]: a prefill of all but two tokens, then two decodes."""
    spec, family = read_spec(directory)
    scheme = make_scheme(directory, family.name_rules)
    build = BuildContext(parallel, scheme, torch.float32, torch.device("cpu"))
    model = load_model(WorkerSettings(model=directory), family, spec, build, 64)
    cache = KVCache(KVCacheShape.of(spec, parallel, 4, torch.float32), 8, build.device)
    attention = torch_attention(attention_spec(spec, parallel), cache, torch.float32)
    model.allocate_states(1)
    table = np.array([[5, 2, 7, 1]])
    logits = []
    for start, stop in ((0, 10), (10, 11), (11, 12)):
        positions = np.arange(start, stop)
        metadata = StepMetadata(
            int(stop - start == 1), np.array([stop - start]), np.array([stop]), table, positions, np.array([0])
        )
        attention.plan(metadata)
        if model.states is not None:
            model.states.plan(metadata)
        hidden = model.hidden_states(torch.tensor(TOKEN_IDS[start:stop]), torch.from_numpy(positions), attention)
        logits.append(model.logits(hidden))
    return torch.cat(logits)


def run_rank(rank: int, layout: GroupLayout, directory: Path, output: Path, address: str, tell: int) -> None:
    """tell: where rank 0 writes its store's address."""
    server = StoreServer("127.0.0.1") if rank == 0 else None
    if server is not None:
        address = server.address
        os.write(tell, address.encode())
    group = RankGroup(Place(rank, layout, store_address=address, timeout_s=100.0), torch.device("cpu"), server)
    logits = prompt_logits(directory, group.context())
    if rank == 0:
        save_file({"logits": logits.contiguous()}, output)
    # The store is rank 0's: it ends last.
    group.least([0])


def fork(run: Callable[[], None]) -> int:
    """The process id of a child that ends with 0 if `run` returns."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def main() -> None:
    size, experts, directory, output = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    layout = GroupLayout(size, (read_spec(directory)[0].num_layers,), experts == "expert")
    told, tell = os.pipe()
    children = [fork(lambda: run_rank(0, layout, directory, output, "", tell))]
    os.close(tell)
    address = os.read(told, 1024).decode()
    for rank in range(1, size):
        children.append(fork(lambda rank=rank: run_rank(rank, layout, directory, output, address, -1)))  # type: ignore[misc]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
