"""Benchmark of latent attention at DeepSeek's sizes, and the launch shapes that a sweep tries.

Section `latent` of `load_tests.kernels.bench`: decode against the bytes of the cached vectors (each read once, for all
heads), prefill against the matrix rate. 16 heads are DeepSeek-V2-Lite's, and one rank's of eight of V3; 128 are V3's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from stepwire_kernels import work_list
from stepwire_kernels.attention_decode import allocate_decode_workspace
from stepwire_kernels.attention_latent import (
    LatentTuning,
    default_latent_decode_tuning,
    default_latent_prefill_tuning,
    latent_decode_attention,
    latent_policy,
    latent_prefill_attention,
    latent_tile_tokens,
)
from stepwire_kernels.decode_list import build_decode_list

from load_tests.kernels.cases import AttentionCase, Heads, paged, unlike_lengths
from load_tests.kernels.measure import Report, time_graph

KV_RANK, ROPE_DIM = 512, 64
LITE = Heads("mla-16", 16, 1, KV_RANK + ROPE_DIM)
FULL = Heads("mla-128", 128, 1, KV_RANK + ROPE_DIM)
DECODE_TUNINGS = {
    LITE: [
        LatentTuning(rows, tile, warps, stages, per_sm)
        for rows, tile, warps, stages, per_sm in (
            (16, 32, 4, 2, 2), (16, 32, 4, 3, 1), (16, 16, 4, 3, 3), (16, 64, 4, 2, 1),
            (16, 64, 8, 2, 1), (16, 32, 8, 3, 1), (16, 16, 4, 4, 2),
        )
    ],
    FULL: [
        LatentTuning(rows, tile, warps, stages, 1)
        for rows, tile, warps, stages in (
            (64, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (64, 16, 8, 3), (32, 32, 4, 2)
        )
    ],
}  # fmt: skip
PREFILL_TUNINGS = [
    LatentTuning(rows, tile, warps, stages)
    for rows, tile, warps, stages in ((64, 32, 8, 2), (64, 32, 8, 3), (64, 16, 8, 3), (64, 64, 8, 2), (32, 32, 4, 2))
]


def decode_launches(heads: Heads, case: AttentionCase, tuning: LatentTuning | None) -> list[Callable[[], object]]:
    """One launch a cache."""
    num_runs = case.kv_lens.numel()
    tuning = tuning or default_latent_decode_tuning(heads.num_heads, case.q.dtype, case.q.device)
    policy = latent_policy(heads.num_heads, tuning)
    work = work_list.allocate_decode_list(num_runs, num_runs, "cuda", policy)
    build_decode_list(case.query_starts, case.kv_lens, case.run_rows, work)
    workspace = allocate_decode_workspace(work, heads.num_heads, KV_RANK)
    out = case.out[..., :KV_RANK].contiguous()
    return [
        partial(
            latent_decode_attention, case.q, cache, case.block_tables, work, workspace, case.scale, out,
            tuning=tuning, pdl=True,
        )
        for cache, _ in case.caches
    ]  # fmt: skip


def prefill_launches(heads: Heads, case: AttentionCase, tuning: LatentTuning) -> list[Callable[[], object]]:
    """One launch a cache."""
    work = case.prefill_work(latent_tile_tokens(heads.num_heads, tuning))
    out = case.out[..., :KV_RANK].contiguous()
    return [
        partial(latent_prefill_attention, case.q, cache, case.block_tables, work, case.scale, out, tuning=tuning)
        for cache, _ in case.caches
    ]


def prefill_flop(heads: Heads, length: int) -> float:
    """Scores over kv_rank + rope_dim, values over kv_rank; what lies above the diagonal is not counted."""
    return length * (length + 1) * heads.num_heads * (2.0 * KV_RANK + ROPE_DIM)


def bench_latent(report: Report) -> None:
    for heads in (LITE, FULL):
        for name, lens in (
            ("b1 ctx1024", [1024]), ("b32 ctx1024", [1024] * 32), ("b128 ctx1024", [1024] * 128),
            ("b1 ctx8192", [8192]), ("b32 ctx8192", [8192] * 32), ("b72 unlike", unlike_lengths(72)),
        ):  # fmt: skip
            case = paged(heads, [1] * len(lens), lens)
            ms = time_graph(decode_launches(heads, case, None))
            # `paged` counts keys and values: here they are the same bytes.
            report.add("latent_decode", f"{heads.name} {name}", ms, num_bytes=case.kv_bytes / 2)
    for length in (1024, 8192):
        case = paged(LITE, [length], [length], num_caches=2)
        tuning = default_latent_prefill_tuning(torch.bfloat16, case.q.device)
        ms = time_graph(prefill_launches(LITE, case, tuning))
        report.add("latent_prefill", f"{LITE.name} 1 x {length}", ms, flop=prefill_flop(LITE, length))
