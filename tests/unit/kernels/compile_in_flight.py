"""Compiles Gluon kernels of packed weights for a device that is not there: `... compile_in_flight 9.0 few|all`.

Prints each launch as a JSON line. Triton decides at import whether it interprets, so this is a process of its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch
from stepwire_kernels.packed_in_flight import InFlightTuning
from stepwire_kernels.packed_linear import Tuning, packed_linear
from stepwire_kernels.packed_ring import RingTuning
from stepwire_kernels.packed_weight import PackedWeight
from stepwire_kernels.packed_wgmma import WgmmaTuning
from stepwire_kernels.split_k import allocate_linear_workspace

from tests.unit.gpu_worker.cuda.absent_device import DEVICES, absent

# (number of tokens, N, K, group size, launch shape): what divides and what does not, inputs in parts, either operand
# size, scales behind the products, rows that are no power of two.
CASES: list[tuple[int, int, int, int, Tuning]] = [
    (1, 6144, 4096, 128, InFlightTuning(3, 8, 4, 2, 128)),
    (16, 4100, 4032, 64, InFlightTuning(4, 8, 2, 2)),
    (3, 4096, 4096, 32, InFlightTuning(2, 4, 8, 1)),
    (1, 28672, 4096, 128, RingTuning(128, 1, 16, 2, 4, 128)),
    (16, 4100, 4032, 64, RingTuning(64, 2, 8, 2, 2)),
    (1, 4096, 14336, 128, RingTuning(37, 1, 8, 2, 6, 128)),
]
# One of each kernel.
FEW = [CASES[0], CASES[4]]
HOPPER: list[tuple[int, int, int, int, Tuning]] = [(16, 4096, 4096, 128, WgmmaTuning(16, 4, 1, 8, 6, 4))]


def main() -> None:
    device = DEVICES[sys.argv[1]]
    has_hopper = device.capability[0] == 9
    with absent(device) as launches:
        workspace = allocate_linear_workspace("cuda")
        cases = FEW if sys.argv[2] == "few" else CASES
        for count, n, k, group, tuning in cases + (HOPPER if has_hopper else []):
            words = torch.empty(-(-n // 16), 2 * -(-k // 128), 128, dtype=torch.int32, device="cuda")
            scales = torch.empty(-(-k // group), n, dtype=torch.float16, device="cuda")
            weight = PackedWeight(words, None, scales, scales.to(torch.uint8), None, None, None, None, k, group)
            x = torch.empty(count, k, dtype=torch.bfloat16, device="cuda")
            packed_linear(x, weight, x[0, :1], workspace, tuning=tuning, pdl=has_hopper)
    for launch in launches:
        print(json.dumps(asdict(launch)))


if __name__ == "__main__":
    main()
