"""Attention of few decoding runs in one launch against rotation, attention and combination apart.

A section of `load_tests.kernels.bench`. Each launch waits for the one before, as the layers of a step do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from stepwire_kernels import work_list
from stepwire_kernels.attention_decode import decode_attention
from stepwire_kernels.attention_fused import (
    FusedAttentionTuning,
    allocate_fused_attention_workspace,
    default_fused_attention_tuning,
    fused_decode_attention,
    splits_for,
)
from stepwire_kernels.rope_kv import rope_and_write_kv

from load_tests.kernels.cases import LLAMA_8B, QWEN3_06B, AttentionCase, Heads, paged
from load_tests.kernels.measure import Report, time_graph

BF16 = torch.bfloat16
LLAMA_1B = Heads("llama-1b", 32, 8, 64)
QWEN3_30B = Heads("qwen3-30b-a3b", 32, 4, 128)
TUNINGS = [
    FusedAttentionTuning(16, warps, stages, splits)
    for warps, stages in ((4, 3), (2, 3), (4, 2), (1, 3))
    for splits in (8, 16, 32)
]


class Layers:
    """The inputs of one case: caches of several layers, one packed projection."""

    def __init__(self, heads: Heads, batch: int, context: int) -> None:
        self.heads, self.batch = heads, batch
        self.case: AttentionCase = paged(heads, [1] * batch, [context] * batch)
        width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
        self.qkv = torch.randn(batch, width, device="cuda", dtype=BF16)
        self.cos, self.sin = (torch.randn(context + 1, heads.head_dim // 2, device="cuda") for _ in range(2))
        self.workspace = allocate_fused_attention_workspace(
            batch, heads.num_heads, heads.num_kv_heads, heads.head_dim, "cuda"
        )
        last = self.case.block_tables[:, (context - 1) // 64]
        self.slots = last * 64 + (context - 1) % 64
        self.positions = torch.full((batch,), context - 1, dtype=torch.int32, device="cuda")

    def together(self, tuning: FusedAttentionTuning | None = None) -> list[Callable[[], object]]:
        case = self.case
        return [
            lambda c=c: fused_decode_attention(
                self.qkv, c[0], c[1], case.kv_lens, case.run_rows, case.block_tables, self.cos, self.sin,
                self.workspace, case.scale, out=case.out, tuning=tuning, pdl=True,
            )
            for c in case.caches
        ]  # fmt: skip

    def apart(self) -> list[Callable[[], object]]:
        case, num_heads = self.case, self.heads.num_heads
        work, workspace = case.decode_work(self.heads, work_list.chunk_policy_for(self.batch, self.heads.num_kv_heads))
        q_out = torch.empty_like(case.q)

        def launch(keys: torch.Tensor, values: torch.Tensor) -> None:
            rope_and_write_kv(
                self.qkv, keys, values, self.positions, self.slots, self.cos, self.sin, num_heads, q_out=q_out, pdl=True
            )
            decode_attention(
                q_out, keys, values, case.block_tables, work, workspace, case.scale, case.out, pdl=True
            )  # fmt: skip

        return [lambda c=c: launch(*c) for c in case.caches]


def bench_fused_attention(report: Report) -> None:
    for heads in (QWEN3_06B, LLAMA_8B, LLAMA_1B, QWEN3_30B):
        for batch, context in ((1, 1024), (2, 1024), (4, 1024), (8, 1024), (1, 8192), (4, 8192)):
            layers = Layers(heads, batch, context)
            name = f"{heads.name} b{batch} ctx{context}"
            moved = layers.case.kv_bytes
            report.add("rope + decode + sum", name, time_graph(layers.apart(), target_ms=4), num_bytes=moved)
            splits = splits_for(batch, heads.num_kv_heads)
            ms = time_graph(layers.together(), target_ms=4)
            report.add("fused_attention", name, ms, num_bytes=moved, splits=splits)


def sweep_fused_attention(report: Report) -> None:
    """Launch shapes, on one model's heads."""
    for heads, batch, context in (
        (QWEN3_06B, 1, 1024), (QWEN3_06B, 4, 1024), (QWEN3_06B, 1, 8192), (LLAMA_8B, 1, 1024), (QWEN3_30B, 1, 1024),
    ):  # fmt: skip
        layers = Layers(heads, batch, context)
        timed = [(time_graph(layers.together(tuning), target_ms=3, repeats=3), tuning) for tuning in TUNINGS]
        default = default_fused_attention_tuning(heads.head_dim, BF16)
        print(f"-- {heads.name} b{batch} ctx{context}, default {default}")
        for ms, tuning in sorted(timed, key=lambda item: item[0])[:5]:
            report.add(
                "fused_attention", f"{heads.name} b{batch} ctx{context}", ms, num_bytes=layers.case.kv_bytes,
                warps=tuning.num_warps, stages=tuning.num_stages, splits=tuning.splits,
            )  # fmt: skip
