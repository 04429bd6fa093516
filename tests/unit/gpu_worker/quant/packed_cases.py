"""Small weights of every form that kernels multiply by; nothing here needs the package that reads GGUF files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gpu_worker.loading.gguf_blocks import GGML_TYPES
from gpu_worker.quant.weights import AffineWeight, Float4Weight, GgufWeight, OffsetWeight

KERNEL_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4")


def affine(
    n: int,
    k: int,
    group_size: int,
    bits: int,
    *,
    symmetric: bool = False,
    groups: torch.Tensor | None = None,
    seed: int = 0,
) -> AffineWeight:
    generator = torch.Generator().manual_seed(n * k + bits + seed)
    num_groups = -(-k // group_size) if groups is None else int(groups.max()) + 1
    top = 1 << bits
    zeros = torch.randint(0, top, (n, num_groups), generator=generator).to(torch.uint8)
    return AffineWeight(
        torch.randint(0, top, (n, k), generator=generator).to(torch.uint8),
        torch.full((1, 1), top // 2, dtype=torch.uint8) if symmetric else zeros,
        (torch.rand(n, num_groups, generator=generator) * 0.1).half().float(),
        group_size,
        bits,
        groups,
    )


def random_blocks(name: str, n: int, k: int, *, seed: int = 5) -> GgufWeight:
    """Random bits, with scales that are small numbers."""
    kind = next(kind for kind in GGML_TYPES.values() if kind.name == name)
    num_blocks = n * k // kind.block_elements
    rng = np.random.default_rng(seed)
    blocks = torch.from_numpy(rng.integers(0, 256, (num_blocks, kind.block_bytes), dtype=np.uint8))
    halves = {"Q6_K": [208], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(name, [0])
    if name == "MXFP4":
        blocks[:, 0] = torch.from_numpy(rng.integers(115, 130, num_blocks, dtype=np.uint8))
        halves = []
    for offset in halves:
        values = torch.from_numpy(rng.normal(size=(num_blocks, 1)).astype(np.float16) * np.float16(0.05))
        blocks[:, offset : offset + 2] = values.view(torch.uint8)
    return GgufWeight(blocks.reshape(n, -1), kind)


def float4(n: int, k: int, group_size: int, *, seed: int = 0) -> Float4Weight:
    generator = torch.Generator().manual_seed(k + seed)
    packed = torch.randint(0, 256, (n, k // 2), generator=generator).to(torch.uint8)
    if group_size == 16:
        scales: torch.Tensor = torch.rand(n, k // 16, generator=generator).mul(8).to(torch.float8_e4m3fn)
    else:
        scales = torch.randint(115, 130, (n, k // 32), generator=generator).to(torch.uint8)
    return Float4Weight(packed, scales, torch.rand(n, generator=generator) * 100 + 1, group_size)


def with_offsets(n: int, k: int, group_size: int, bits: int, *, wide: bool = False) -> OffsetWeight:
    """`wide`: offsets that 16 bits do not hold, as those are that a zero point is multiplied into."""
    generator = torch.Generator().manual_seed(n * k + bits)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator).to(torch.uint8)
    scales = (torch.rand(n, k // group_size, generator=generator) * 0.1).bfloat16().float()
    offsets = torch.randn(n, k // group_size, generator=generator) * 0.3
    offsets = offsets if wide else offsets.bfloat16().float()
    return OffsetWeight(codes, scales, offsets, group_size, bits)


WEIGHTS: dict[str, Any] = {
    "int4-g128": lambda: affine(40, 512, 128, 4),
    "int4-g64-odd-k": lambda: affine(24, 576, 64, 4),
    "int4-g32-symmetric": lambda: affine(24, 320, 32, 4, symmetric=True),
    "int4-g16": lambda: affine(16, 96, 16, 4),
    "int4-channel": lambda: affine(24, 200, 200, 4),
    "int3-g32": lambda: affine(8, 96, 32, 3),
    "int8-g128": lambda: affine(24, 384, 128, 8),
    "int8-channel": lambda: affine(24, 100, 100, 8, symmetric=True),
    "offsets-4-g64": lambda: with_offsets(24, 320, 64, 4),
    "offsets-4-g16-wide": lambda: with_offsets(16, 96, 16, 4, wide=True),
    "offsets-6-g32": lambda: with_offsets(8, 96, 32, 6),
    "nvfp4": lambda: float4(24, 208, 16),
    "mxfp4": lambda: float4(24, 160, 32),
    **{name: (lambda name=name: random_blocks(name, 24, 512)) for name in KERNEL_TYPES},
    "Q8_0-odd-k": lambda: random_blocks("Q8_0", 8, 96),
}
