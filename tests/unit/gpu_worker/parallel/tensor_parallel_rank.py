"""One rank of a tensor-parallel group, started by `test_parallel.py`: computes a prompt's logits, rank 0 saves them.

Arguments: rank, size, expert (split experts whole) or width, model directory, output file, store address (for ranks
above 0; rank 0 prints it).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from gpu_worker.assembly import attention_spec
from gpu_worker.attention.api import StepMetadata
from gpu_worker.attention.torch_backend import TorchAttention
from gpu_worker.kv_cache import KVCache, KVCacheShape
from gpu_worker.layers.linear import BuildContext
from gpu_worker.models.loader import load_weights, read_spec
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
    model = family(spec, 64, build)
    load_weights(model, directory)
    cache = KVCache(KVCacheShape.of(spec, parallel, 4, torch.float32), 8, build.device)
    attention = TorchAttention(attention_spec(spec, parallel), cache.layers, torch.float32)
    table = np.array([[5, 2, 7, 1]])
    logits = []
    for start, stop in ((0, 10), (10, 11), (11, 12)):
        positions = np.arange(start, stop)
        attention.plan(
            StepMetadata(int(stop - start == 1), np.array([stop - start]), np.array([stop]), table, positions)
        )
        hidden = model.hidden_states(torch.tensor(TOKEN_IDS[start:stop]), torch.from_numpy(positions), attention)
        logits.append(model.logits(hidden))
    return torch.cat(logits)


def main() -> None:
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    directory, output = Path(sys.argv[4]), Path(sys.argv[5])
    torch.set_num_threads(1)
    server = StoreServer("127.0.0.1") if rank == 0 else None
    address = sys.argv[6] if server is None else server.address
    if server is not None:
        print(address, flush=True)
    layout = GroupLayout(size, (read_spec(directory)[0].num_layers,), sys.argv[3] == "expert")
    group = RankGroup(Place(rank, layout, store_address=address, timeout_s=100.0), torch.device("cpu"), server)
    logits = prompt_logits(directory, group.context())
    if rank == 0:
        save_file({"logits": logits.contiguous()}, output)
    # The store is rank 0's: it ends last.
    group.least([0])


if __name__ == "__main__":
    main()
