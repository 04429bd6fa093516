"""Loads a model in a process of its own and prints how far its memory rose; started by `test_loading_memory.py`.

Arguments: the model directory, the quantization while loading (or `auto`), `packed` for the layers of a GPU (which hold
packed weights and all experts of a layer together; the device is the host here, so its memory is counted as well).
Prints a JSON object of bytes. Counts anonymous memory only: pages of the mapped
checkpoint belong to the system's cache and can be taken away at any time.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.ops import TORCH_OPS, LayerOps
from gpu_worker.models.loader import load_weights, read_spec
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.quant.products import PackedKernels
from gpu_worker.quant.scheme import make_scheme

SAMPLE_EVERY_S = 0.001


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this needs Linux 4.5 or later")


class PeakSampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.finished = threading.Event()

    def run(self) -> None:
        while not self.finished.wait(SAMPLE_EVERY_S):
            self.peak = max(self.peak, anonymous_bytes())


def main() -> None:
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    # What the libraries set up at their first use is not the model's.
    torch.randn(64, 64) @ torch.randn(64, 64)
    spec, family = read_spec(directory)
    before = anonymous_bytes()
    sampler = PeakSampler()
    sampler.start()
    device = torch.device("cpu")
    ops: LayerOps = TORCH_OPS
    kernels: PackedKernels | None = None
    if sys.argv[3:] == ["packed"]:
        from gpu_worker.cuda.ops import TritonOps
        from gpu_worker.cuda.packed_linears import PackedLinears

        ops, kernels = TritonOps(device, pdl=False), PackedLinears(device, pdl=False)
        before = sampler.peak = anonymous_bytes()
    setting: Any = sys.argv[2]
    scheme = make_scheme(directory, family.name_rules, setting=setting, ops=ops, kernels=kernels)
    build = BuildContext(ParallelContext(), scheme, torch.bfloat16, device, ops)
    model = family(spec, 512, build)
    load_weights(model, directory)
    sampler.finished.set()
    sampler.join()
    peak = max(sampler.peak, anonymous_bytes())
    print(json.dumps({"peak": peak - before, "after": anonymous_bytes() - before, "weights": model.num_bytes()}))


if __name__ == "__main__":
    main()
