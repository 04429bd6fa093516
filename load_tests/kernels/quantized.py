"""Benchmarks of quantized linears at Llama-8B's shapes: against the weights' own bytes and against bf16 cuBLAS.

Sections `packed` (4-bit groups, GGUF types, MXFP4) and `scaled` (FP8 and INT8 W8A8, the quantization of inputs
included) of `load_tests.kernels.bench`; launch shapes: `load_tests.kernels.sweep packed` and
`load_tests.kernels.tiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from stepwire_kernels.packed_choice import multiply_packed
from stepwire_kernels.packed_dense import DenseTuning, dense_linear, dense_weight
from stepwire_kernels.packed_linear import MAX_STREAM_TOKENS, PackedTuning, StreamTuning, Tuning, packed_linear
from stepwire_kernels.packed_weight import PackedWeight
from stepwire_kernels.packed_wgmma import WgmmaTuning
from stepwire_kernels.quantize_input import quantize_input
from stepwire_kernels.scaled_choice import multiply_scaled
from stepwire_kernels.split_k import LinearWorkspace, allocate_linear_workspace

from load_tests.kernels.linears import LLAMA_8B_LAYER
from load_tests.kernels.measure import Report, time_graph

NUM_TOKENS = (1, 4, 16, 32, 64, 128, 256)
KINDS = ("int4-g128", "int8-g128", "Q4_0", "Q4_K", "Q6_K", "Q8_0", "MXFP4", "NVFP4")
L2_EVADING_BYTES = 240 << 20
BF16 = torch.bfloat16

Launch = Callable[[], torch.Tensor]


def _copies(num_bytes: int) -> int:
    return max(2, min(32, L2_EVADING_BYTES // max(num_bytes, 1)))


def packed_weight(kind: str, n: int, k: int) -> PackedWeight:
    """Random bits in the layout of a format; scales are small numbers."""
    group = {"int4-g128": 128, "int8-g128": 128, "Q6_K": 16, "NVFP4": 16}.get(kind, 32)
    high_bits = {"Q6_K": 2, "Q8_0": 4, "int8-g128": 4}.get(kind, 0)

    def ints(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        limit = torch.iinfo(dtype)
        return torch.randint(limit.min, limit.max, shape, dtype=dtype, device="cuda")

    def halves(groups: int) -> torch.Tensor:
        return torch.rand(groups, n, device="cuda").mul_(0.01).half()

    shape, is_k = (-(-n // 16), 2 * -(-k // 128), 128), kind.endswith("_K")
    scales = halves(k // group)
    if is_k:
        scales = ints(k // group, n, dtype=torch.int8 if kind == "Q6_K" else torch.uint8) // 4
    if kind == "MXFP4":
        scales = torch.full((k // group, n), 120, dtype=torch.uint8, device="cuda")
    if kind == "NVFP4":
        scales = scales.to(torch.float8_e4m3fn)
    is_e2m1 = kind in ("MXFP4", "NVFP4")
    return PackedWeight(
        words=ints(*shape, dtype=torch.int32),
        high_words=ints(*shape, dtype=torch.int16 if high_bits == 2 else torch.int32) if high_bits else None,
        scales=scales,
        zeros=ints(k // group, n, dtype=torch.uint8) % 16 if kind.startswith("int") else None,
        minima=ints(k // group, n, dtype=torch.uint8) // 4 if kind == "Q4_K" else None,
        outer_scales=halves(k // 256) if is_k else None,
        outer_minima=halves(k // 256) if kind == "Q4_K" else None,
        row_scales=torch.rand(n, device="cuda") if is_e2m1 else None,
        num_inputs=k,
        group_size=group,
        high_bits=high_bits,
        offset={"Q4_0": 8, "Q6_K": 32, "Q8_0": 128}.get(kind, 0),
        is_e2m1=is_e2m1,
        exponents=kind == "MXFP4",
    )


def bf16_ms(n: int, k: int, x: torch.Tensor) -> float:
    weights = [torch.randn(n, k, device="cuda", dtype=BF16) for _ in range(_copies(n * k * 2))]
    return time_graph([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])


def bench_packed(report: Report) -> None:
    """Share of the read bandwidth by packed bytes; `of_bf16`: how many times faster than cuBLAS in bf16."""
    workspace = allocate_linear_workspace("cuda")
    for name, (n, k) in LLAMA_8B_LAYER.items():
        inputs = {count: torch.randn(count, k, device="cuda", dtype=BF16) for count in NUM_TOKENS}
        plain = {count: bf16_ms(n, k, x) for count, x in inputs.items()}
        for kind in KINDS:
            num_bytes = packed_weight(kind, n, k).num_bytes()
            weights = [packed_weight(kind, n, k) for _ in range(_copies(num_bytes))]
            for count, x in inputs.items():
                ms = time_graph([lambda w=w, x=x: multiply_packed(x, w, None, workspace, pdl=True) for w in weights])
                report.add(
                    "packed_linear",
                    f"{kind} {name} M={count}",
                    ms,
                    num_bytes=num_bytes,
                    of_bf16=round(plain[count] / ms, 2),
                )


MANY_TOKENS = (128, 256, 512, 1024, 2048, 8192)
DENSE_TUNINGS = tuple(
    DenseTuning(*shape) for shape in ((1, 4, 2), (2, 2, 4), (2, 4, 4), (4, 2, 4), (4, 4, 8), (8, 2, 8))
)


def bench_packed_many(report: Report) -> None:
    """Many tokens: making weights dense (share of what is read and written), then both roads against cuBLAS in bf16."""
    workspace = allocate_linear_workspace("cuda")
    scratch = torch.empty(max(n * k for n, k in LLAMA_8B_LAYER.values()), device="cuda", dtype=BF16)
    for kind in ("int4-g128", "Q4_K", "Q6_K", "MXFP4"):
        for name, (n, k) in list(LLAMA_8B_LAYER.items())[: None if kind == "int4-g128" else 1]:
            weights = [packed_weight(kind, n, k) for _ in range(_copies(n * k // 2))]
            out = scratch[: n * k].view(n, k)
            moved = weights[0].num_bytes() + 2 * n * k
            for tuning in DENSE_TUNINGS:
                ms = time_graph(
                    [partial(dense_weight, w, out, tuning=tuning, pdl=True) for w in weights], target_ms=5, repeats=3
                )
                shape = f"{tuning.row_blocks},{tuning.tiles_each},{tuning.num_warps}"
                report.add("dense_weight", f"{kind} {name} {shape}", ms, num_bytes=moved)
    for name, (n, k) in LLAMA_8B_LAYER.items():
        weights = [packed_weight("int4-g128", n, k) for _ in range(_copies(n * k // 2))]
        for count in MANY_TOKENS:
            x = torch.randn(count, k, device="cuda", dtype=BF16)
            plain = bf16_ms(n, k, x)
            roads = {
                "direct": [partial(multiply_packed, x, w, None, workspace, pdl=True) for w in weights],
                "dense": [partial(dense_linear, x, w, None, scratch, workspace=workspace, pdl=True) for w in weights],
            }
            for road, launches in roads.items():
                ms = time_graph(launches, target_ms=5, repeats=3)
                flop = 2.0 * count * n * k
                report.add("packed_many", f"{name} M={count} {road}", ms, flop=flop, of_bf16=round(plain / ms, 2))


def _scaled_launch(
    x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, blocks: bool, workspace: LinearWorkspace
) -> Launch:
    def launch() -> torch.Tensor:
        values, x_scales = quantize_input(x, w.dtype, group_size=128 if blocks else None, pdl=True)
        return multiply_scaled(
            values,
            x_scales,
            w,
            scales,
            None,
            workspace,
            BF16,
            scale_rows=128 if blocks else 1,
            group_size=128 if blocks else None,
            pdl=True,
        )

    return launch


def bench_scaled(report: Report) -> None:
    """FP8 by channel and by 128-blocks, INT8 by channel; inputs are quantized in the measured time."""
    workspace = allocate_linear_workspace("cuda")
    for name, (n, k) in LLAMA_8B_LAYER.items():
        inputs = {count: torch.randn(count, k, device="cuda", dtype=BF16) for count in NUM_TOKENS}
        plain = {count: bf16_ms(n, k, x) for count, x in inputs.items()}
        for kind, dtype in (("fp8", torch.float8_e4m3fn), ("fp8-block", torch.float8_e4m3fn), ("int8", torch.int8)):
            blocks = kind == "fp8-block"
            shape = (n // 128, k // 128) if blocks else (n, 1)
            scales = torch.rand(shape, device="cuda") * 0.01
            weights = [
                torch.randn(n, k, device="cuda").mul_(30).clamp_(-127, 127).to(dtype) for _ in range(_copies(n * k))
            ]
            for count, x in inputs.items():
                ms = time_graph([_scaled_launch(x, w, scales, blocks, workspace) for w in weights])
                report.add(
                    "scaled_linear",
                    f"{kind} {name} M={count}",
                    ms,
                    num_bytes=n * k,
                    of_bf16=round(plain[count] / ms, 2),
                )


def packed_candidates(count: int) -> Iterator[Tuning]:
    """Launch shapes for so many tokens."""
    if count <= MAX_STREAM_TOKENS:
        for row_blocks, warps, split in product((1, 2), (2, 4, 8), (1, 2)):
            yield StreamTuning(row_blocks, warps, split)
        for row_blocks, warps, split in product((1, 2), (4, 8, 16), (1, 2, 4)):
            yield StreamTuning(row_blocks, warps, split, ahead=8)
    if count > MAX_STREAM_TOKENS:
        yield PackedTuning(64, min(128, max(32, count)), 2, 4, 3)
    small = count <= 64
    block_m = min(128, 1 << max(4, (count - 1).bit_length()))
    for split in (1, 2, 4, 8):
        yield WgmmaTuning(block_m, 8, 1, split, 6 if small else 4, 4 if small else 3)
        yield WgmmaTuning(block_m, 4, 1, split, 6 if small else 4, 4 if small else 2)
        if split <= 4:
            yield WgmmaTuning(block_m, 8, 2, split, 4 if small else 3, 3 if small else 2)
        if count > 128:
            yield WgmmaTuning(256, 8, 1, split, 3, 2)


def packed_launches(
    kind: str, n: int, k: int, count: int, workspace: LinearWorkspace
) -> tuple[int, Callable[[Tuning], list[Launch]]]:
    """Bytes of one weight, and launches over several of them for a tuning."""
    x = torch.randn(count, k, device="cuda", dtype=BF16)
    num_bytes = packed_weight(kind, n, k).num_bytes()
    weights = [packed_weight(kind, n, k) for _ in range(_copies(num_bytes))]

    def launches(tuning: Tuning) -> list[Launch]:
        return [partial(packed_linear, x, w, None, workspace, tuning=tuning, pdl=True) for w in weights]

    return num_bytes, launches
