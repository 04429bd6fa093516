"""Experts with packed weights beside the same in bf16: section `packed_experts` of the bench, and what a sweep tries.

GPT-OSS-20B in MXFP4 as it is published, Qwen3-30B-A3B in 4-bit groups of 128 as AWQ and GPTQ have it. The share of read
counts packed bytes of the experts that were chosen, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from stepwire_kernels.expert_packed import MAX_STREAM_ROWS, PackedExpertTuning, PackedExpertWeights
from stepwire_kernels.experts import default_packed_tuning, mix_packed_experts
from stepwire_kernels.packed_weight import PackedWeight

from load_tests.kernels.measure import Report, time_graph
from load_tests.kernels.mixtures import BF16, MANY_TOKENS, MIXTURES, QWEN3_30B, Mixture, MixtureCase, two_layers
from load_tests.kernels.quantized import packed_weight

GPT_OSS = next(one for one in MIXTURES if one.name == "gpt-oss-20b")
PACKED_MIXTURES = ((GPT_OSS, "MXFP4"), (QWEN3_30B, "int4-g128"))
NUM_TOKENS = (1, 32, 256, 8192)


def _stack(kind: str, count: int, n: int, k: int) -> PackedWeight:
    """`count` weights of one kind, one behind another."""
    ones = [packed_weight(kind, n, k) for _ in range(count)]

    def together(name: str) -> Any:
        value = getattr(ones[0], name)
        return torch.stack([getattr(one, name) for one in ones]) if isinstance(value, torch.Tensor) else value

    return PackedWeight(**{name: together(name) for name in vars(ones[0])})


def packed_layers(mixture: Mixture, kind: str) -> list[PackedExpertWeights]:
    """Two, so that a single token's experts are cold when they come again."""

    def bias(size: int) -> torch.Tensor | None:
        return torch.randn(mixture.num_experts, size, device="cuda", dtype=BF16) if mixture.has_bias else None

    return [
        PackedExpertWeights(
            _stack(kind, mixture.num_experts, 2 * mixture.inner, mixture.hidden),
            _stack(kind, mixture.num_experts, mixture.hidden, mixture.inner),
            bias(2 * mixture.inner),
            bias(mixture.hidden),
        )
        for _ in range(2)
    ]


@dataclass
class PackedCase:
    """The routings of a `MixtureCase`, over packed layers."""

    case: MixtureCase
    layers: list[PackedExpertWeights]

    @classmethod
    def make(cls, mixture: Mixture, num_tokens: int, layers: list[PackedExpertWeights]) -> PackedCase:
        return cls(MixtureCase.make(mixture, num_tokens, []), layers)

    def launches(self, tuning: PackedExpertTuning | None = None) -> list[Callable[[], object]]:
        case = self.case

        def launch(routing: tuple[torch.Tensor, torch.Tensor], held: PackedExpertWeights) -> torch.Tensor:
            return mix_packed_experts(case.x, *routing, held, case.mixture.kind, tuning=tuning, pdl=True)

        return [
            partial(launch, routing, held) for routing, held in zip(case.routings, cycle(self.layers), strict=False)
        ]

    def num_bytes(self) -> float:
        held = self.layers[0]
        return self.case.num_bytes() / self._dense_bytes() * held.num_bytes()

    def _dense_bytes(self) -> int:
        mixture = self.case.mixture
        return 6 * mixture.num_experts * mixture.hidden * mixture.inner

    def work(self) -> dict[str, float]:
        many = self.case.x.shape[0] >= MANY_TOKENS
        return {"flop": self.case.flop()} if many else {"num_bytes": self.num_bytes()}


def bench_packed_experts(report: Report) -> None:
    """`of_bf16`: how many times faster than the same experts in bf16, by their default launch shapes."""
    for mixture, kind in PACKED_MIXTURES:
        plain, packed = two_layers(mixture), packed_layers(mixture, kind)
        for num_tokens in NUM_TOKENS:
            case = PackedCase.make(mixture, num_tokens, packed)
            bf16_ms = time_graph(MixtureCase.make(mixture, num_tokens, plain).launches(), target_ms=10, repeats=3)
            ms = time_graph(case.launches(), target_ms=10, repeats=3)
            name = f"{mixture.name} {kind} {num_tokens} tokens"
            report.add("packed_experts", name, ms, **case.work(), of_bf16=round(bf16_ms / ms, 2))
        del plain, packed
        torch.cuda.empty_cache()


def packed_expert_candidates(num_tokens: int, mixture: Mixture) -> Iterator[PackedExpertTuning]:
    """The default first, then launch shapes around it."""
    default = default_packed_tuning(num_tokens, mixture.num_chosen, mixture.num_experts, BF16)
    yield default
    if num_tokens * mixture.num_chosen <= 32 * mixture.num_experts:
        for rows, warps in product((8, MAX_STREAM_ROWS), (2, 4, 8)):
            yield PackedExpertTuning(rows, num_warps=warps)
    if num_tokens < 32:
        return
    rows = max(32, default.tile_rows)
    for tile_rows in sorted({32, rows, min(128, 2 * rows)}):
        for block_n, warps, stages in ((32, 4, 3), (64, 4, 2), (64, 4, 3), (64, 8, 3), (128, 8, 2), (128, 8, 3)):
            yield PackedExpertTuning(tile_rows, block_n, warps, stages)
