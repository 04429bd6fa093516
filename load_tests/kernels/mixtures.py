"""Benchmarks of mixtures of experts at the shapes of real models, and the launch shapes that a sweep tries.

Sections `experts` and `scaled_experts` (8-bit weights) of `load_tests.kernels.bench`: routing, tiles, and the whole
mixture, against the bytes of the experts
that were chosen (each read once) or, from 1,024 tokens on, against the matrix rate. Routing is uniform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, product

import torch
from stepwire_kernels.activation import Activation
from stepwire_kernels.expert_gemm import TileTuning
from stepwire_kernels.expert_gemv import PairDownTuning, PairGateUpTuning
from stepwire_kernels.expert_routing import RouterLogits, choose_experts
from stepwire_kernels.expert_scaled import ScaledExpertWeights, ScaledStack, mix_scaled_experts
from stepwire_kernels.expert_tiles import build_expert_tiles
from stepwire_kernels.experts import (
    TILES,
    ExpertTuning,
    ExpertWeights,
    default_expert_tuning,
    mix_routed_experts,
)

from load_tests.kernels.measure import Report, time_graph

BF16 = torch.bfloat16
# Tokens from which on a mixture is bound by its matrix products.
MANY_TOKENS = 1024


@dataclass(frozen=True)
class Mixture:
    """One layer of a model."""

    name: str
    num_experts: int
    num_chosen: int
    hidden: int
    inner: int
    kind: Activation = "silu"
    has_bias: bool = False

    def weights(self) -> ExpertWeights:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=BF16)

        return ExpertWeights(
            randn(self.num_experts, 2 * self.inner, self.hidden),
            randn(self.num_experts, self.hidden, self.inner),
            randn(self.num_experts, 2 * self.inner) if self.has_bias else None,
            randn(self.num_experts, self.hidden) if self.has_bias else None,
        )


QWEN3_30B = Mixture("qwen3-30b-a3b", 128, 8, 2048, 768)
MIXTURES = (
    QWEN3_30B,
    Mixture("mixtral-8x7b", 8, 2, 4096, 14336),
    Mixture("gpt-oss-20b", 32, 4, 2880, 2880, "swiglu_oai", True),
)


@dataclass
class MixtureCase:
    """Inputs of one token count; several routings, so that no expert's weights are found in the level-2 cache."""

    mixture: Mixture
    x: torch.Tensor
    logits: list[torch.Tensor]
    routings: list[tuple[torch.Tensor, torch.Tensor]]
    layers: list[ExpertWeights]

    @classmethod
    def make(cls, mixture: Mixture, num_tokens: int, layers: list[ExpertWeights]) -> MixtureCase:
        logits = [torch.randn(num_tokens, mixture.num_experts, device="cuda").to(BF16) for _ in range(8)]
        return cls(
            mixture,
            torch.randn(num_tokens, mixture.hidden, device="cuda", dtype=BF16),
            logits,
            [choose_experts(values, mixture.num_chosen, renormalize=True) for values in logits],
            layers,
        )

    def launches(self, tuning: ExpertTuning | None = None) -> list[Callable[[], object]]:
        """From router logits on, so that choosing counts, whoever does it."""
        mixture = self.mixture

        def launch(logits: torch.Tensor, held: ExpertWeights) -> torch.Tensor:
            routed = RouterLogits(logits, mixture.num_chosen, renormalize=True)
            return mix_routed_experts(self.x, routed, held, mixture.kind, tuning=tuning, pdl=True)

        return [partial(launch, logits, held) for logits, held in zip(self.logits, cycle(self.layers), strict=False)]

    def num_bytes(self) -> float:
        """Of the experts that have work, a mean over the routings."""
        distinct = sum(len(torch.unique(experts)) for _, experts in self.routings) / len(self.routings)
        return distinct * 3 * self.mixture.hidden * self.mixture.inner * 2

    def flop(self) -> float:
        return 6.0 * self.x.shape[0] * self.mixture.num_chosen * self.mixture.hidden * self.mixture.inner

    def work(self) -> dict[str, float]:
        return {"flop": self.flop()} if self.x.shape[0] >= MANY_TOKENS else {"num_bytes": self.num_bytes()}


def two_layers(mixture: Mixture) -> list[ExpertWeights]:
    """With eight routings in turn, a single token's experts are cold when they come again."""
    return [mixture.weights() for _ in range(2)]


def bench_experts(report: Report) -> None:
    """Routing and tiles by themselves, then whole mixtures."""
    for num_tokens in (1, 32, 256, 8192):
        logits = torch.randn(num_tokens, 128, device="cuda", dtype=BF16)
        launch = [lambda v=logits: choose_experts(v, 8, renormalize=True, pdl=True)] * 8
        report.add("choose_experts", f"128 top 8, {num_tokens} tokens", time_graph(launch))
        _, experts = choose_experts(logits, 8)
        rows = max(16, default_expert_tuning(num_tokens, 8, 128, BF16).tile_rows)
        tiles = [lambda e=experts, r=rows: build_expert_tiles(e, 128, r, pdl=True)] * 8
        report.add("expert_tiles", f"128 top 8, {num_tokens} tokens", time_graph(tiles))
    for mixture in MIXTURES:
        layers = two_layers(mixture)
        for num_tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 8192):
            case = MixtureCase.make(mixture, num_tokens, layers)
            report.add("experts", f"{mixture.name} {num_tokens} tokens", time_graph(case.launches()), **case.work())
        del layers
        torch.cuda.empty_cache()


def scaled_weights(mixture: Mixture, kind: torch.dtype, block: int | None) -> ScaledExpertWeights:
    """Random 8-bit numbers; a scale for every output and token, or for blocks and groups of inputs."""

    def stack(n: int, k: int) -> ScaledStack:
        values = torch.randint(0, 100, (mixture.num_experts, n, k), dtype=torch.int8, device="cuda")
        rows, cols = (n, 1) if block is None else (-(-n // block), -(-k // block))
        scales = torch.full((mixture.num_experts, rows, cols), 1e-3, device="cuda")
        return ScaledStack(values.view(kind), scales, block or 1, block or k)

    gate_up, down = stack(2 * mixture.inner, mixture.hidden), stack(mixture.hidden, mixture.inner)
    return ScaledExpertWeights(gate_up, down, input_group=block)


def bench_scaled_experts(report: Report) -> None:
    """Experts of 8 bits, the quantization of inputs and inner values included; bytes of the chosen experts' weights."""
    kinds = {
        "fp8-channel": (torch.float8_e4m3fn, None),
        "fp8-block": (torch.float8_e4m3fn, 128),
        "int8": (torch.int8, None),
    }
    for name, (kind, block) in kinds.items():
        layers = [scaled_weights(QWEN3_30B, kind, block) for _ in range(2)]
        for num_tokens in (1, 4, 16, 64, 256, 1024, 8192):
            case = MixtureCase.make(QWEN3_30B, num_tokens, [])
            launches = [
                partial(mix_scaled_experts, case.x, *routing, held, "silu", pdl=True)
                for routing, held in zip(case.routings, cycle(layers), strict=False)
            ]
            work = {"flop": case.flop()} if num_tokens >= MANY_TOKENS else {"num_bytes": case.num_bytes() / 2}
            report.add("scaled_experts", f"{QWEN3_30B.name} {name} {num_tokens} tokens", time_graph(launches), **work)
        del layers
        torch.cuda.empty_cache()


def candidates(num_tokens: int, mixture: Mixture) -> Iterator[ExpertTuning]:
    """Launch shapes near the default, which comes first: one product is varied at a time."""
    default = default_expert_tuning(num_tokens, mixture.num_chosen, mixture.num_experts, BF16)
    yield default
    if num_tokens <= 8:
        for n, turns, warps, stages in product((1, 2, 4), (6, 12, 24), (4, 8), (3, 4, 6)):
            yield replace(default, tile_rows=0, pair_gate_up=PairGateUpTuning(n, turns, warps, stages))
        for n, warps, ahead in product((4, 8, 16), (4, 8, 16), (1, 2, 3)):
            yield replace(default, tile_rows=0, pair_down=PairDownTuning(n, 256, warps, ahead))
    if num_tokens == 1:
        return
    rows = max(16, default.tile_rows)
    base = TILES[rows]
    for other in {16, max(16, rows // 2), min(128, 2 * rows)} - {default.tile_rows}:
        yield TILES[other]
    for n, k, warps, stages in product((64, 128), (64, 128), (4, 8), (3, 4)):
        shape = TileTuning(n, k, warps, stages)
        yield replace(base, gate_up=shape)
        yield replace(base, down=shape)


def short_name(tuning: ExpertTuning) -> str:
    """What is varied, without the rest."""
    if tuning.tile_rows == 0:
        return f"pairs gate_up {tuning.pair_gate_up} down {tuning.pair_down}"
    return f"rows {tuning.tile_rows} gate_up {tuning.gate_up} down {tuning.down}"
