"""Sweep of launch shapes: `python -m load_tests.kernels.sweep WHAT [--top N]`.

Times every candidate on the shapes that matter and prints the best. Candidates compile in parallel worker processes
first (their only effect is Triton's disk cache). Linears: `linear_sweep`, `fused`, `gated`, `tiles`.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from stepwire_kernels.attention_decode import DecodeTuning, decode_attention, decode_policy
from stepwire_kernels.attention_prefill import PrefillTuning, prefill_attention, prefill_tile_tokens
from stepwire_kernels.expert_packed import PackedExpertTuning
from stepwire_kernels.packed_linear import KERNEL_NAMES, Tuning
from stepwire_kernels.packed_weight import weight_format
from stepwire_kernels.split_k import allocate_linear_workspace

from load_tests.kernels.cases import LLAMA_8B, QWEN3_06B, AttentionCase, Heads, causal_flop, paged, unlike_lengths
from load_tests.kernels.latent import (
    DECODE_TUNINGS,
    FULL,
    LITE,
    PREFILL_TUNINGS,
    decode_launches,
    prefill_flop,
    prefill_launches,
)
from load_tests.kernels.linears import LLAMA_8B_LAYER
from load_tests.kernels.measure import measure_ceilings, time_graph
from load_tests.kernels.mixtures import MANY_TOKENS, QWEN3_30B, MixtureCase, candidates, short_name, two_layers
from load_tests.kernels.packed_mixtures import NUM_TOKENS as MIXTURE_TOKENS
from load_tests.kernels.packed_mixtures import PACKED_MIXTURES, PackedCase, packed_expert_candidates, packed_layers
from load_tests.kernels.quantized import bf16_ms, packed_candidates, packed_launches, packed_weight
from load_tests.kernels.tuned_files import TUNED, show_choices

BF16 = torch.bfloat16

DECODE = [
    DecodeTuning(tokens, warps, stages, per_sm)
    for tokens, warps, stages, per_sm in (
        (16, 1, 3, 8), (16, 1, 4, 8), (16, 1, 3, 12), (32, 1, 3, 6), (16, 2, 3, 4), (16, 4, 3, 2)
    )
]  # fmt: skip
PREFILL = [
    PrefillTuning(rows, tile, warps, stages, descriptors)
    for rows, tile, warps, stages, descriptors in (
        (128, 64, 8, 2, True), (128, 64, 8, 3, True), (128, 64, 8, 4, True), (128, 64, 8, 3, False),
        (128, 128, 8, 2, True), (64, 64, 4, 2, True), (64, 64, 4, 3, True), (64, 128, 4, 2, True),
        (64, 64, 4, 2, False), (192, 64, 8, 2, True), (256, 64, 8, 2, True),
    )
    if rows & (rows - 1) == 0
]  # fmt: skip


def _decode_launcher(case: AttentionCase, heads: Heads, tuning: DecodeTuning) -> list[Callable[[], object]]:
    work, workspace = case.decode_work(heads, decode_policy(heads.num_kv_heads, tuning))
    return [
        lambda c=c: decode_attention(
            case.q, c[0], c[1], case.block_tables, work, workspace, case.scale, case.out, tuning=tuning, pdl=True
        )
        for c in case.caches
    ]


def _prefill_launcher(case: AttentionCase, tuning: PrefillTuning) -> list[Callable[[], object]]:
    work = case.prefill_work(prefill_tile_tokens(32, 8, tuning))
    return [
        lambda c=c: prefill_attention(case.q, c[0], c[1], case.block_tables, work, case.scale, case.out, tuning=tuning)
        for c in case.caches
    ]


def _compile(job: tuple[str | Callable[[Any], None], Any]) -> str | None:
    """Launch one candidate once, for its entry in the disk cache; returns what went wrong."""
    kind, payload = job
    try:
        if callable(kind):
            kind(payload)
        elif kind == "decode":
            for heads in (LLAMA_8B, QWEN3_06B):
                for launch in _decode_launcher(paged(heads, [1], [300], num_caches=1), heads, payload):
                    launch()
        elif kind == "prefill":
            for launch in _prefill_launcher(
                paged(LLAMA_8B, [300], [300], block_size=max(64, payload.tile_tokens), num_caches=1), payload
            ):
                launch()
        elif kind == "latent decode":
            heads, tuning = payload
            decode_launches(heads, paged(heads, [1], [300], num_caches=1), tuning)[0]()
        elif kind == "latent prefill":
            prefill_launches(LITE, paged(LITE, [300], [300], num_caches=1), payload)[0]()
        elif kind == "packed":
            name, num_tokens, tuning = payload
            for k in {k for _, k in LLAMA_8B_LAYER.values()}:
                _, launches = packed_launches(name, 4096, k, num_tokens, allocate_linear_workspace("cuda"))
                launches(tuning)[0]()
        elif kind == "packed experts":
            index, num_tokens, tuning = payload
            mixture, weight_kind = PACKED_MIXTURES[index]
            small = replace(mixture, num_experts=mixture.num_chosen)
            PackedCase.make(small, num_tokens, packed_layers(small, weight_kind)).launches(tuning)[0]()
        elif kind == "experts":
            num_tokens, tuning = payload
            MixtureCase.make(QWEN3_30B, num_tokens, [QWEN3_30B.weights()]).launches(tuning)[0]()
        torch.cuda.synchronize()
    except Exception as error:  # (a candidate that does not compile is a result, printed below)
        return f"{kind} {payload}: {type(error).__name__}: {str(error)[:120]}"
    return None


def compile_all(kind: str | Callable[[Any], None], payloads: list[Any]) -> list[Any]:
    """Compile candidates in parallel; returns those that work. `kind`: of `_compile`, or what launches a payload."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(14, os.cpu_count() or 1, len(payloads))) as pool:
        errors = pool.map(_compile, [(kind, payload) for payload in payloads], chunksize=1)
    for error in filter(None, errors):
        print("left out:", error, flush=True)
    return [payload for payload, error in zip(payloads, errors, strict=True) if error is None]


def sweep_decode(top: int) -> None:
    """Decode candidates on Llama-8B and Qwen3-0.6B shapes."""
    candidates = compile_all("decode", DECODE)
    ceilings = measure_ceilings()
    print(f"read {ceilings.read_gb_s:.0f} GB/s")
    for heads, name, lens in (
        (LLAMA_8B, "b32 ctx1024", [1024] * 32), (LLAMA_8B, "b32 ctx8192", [8192] * 32),
        (QWEN3_06B, "b32 ctx1024", [1024] * 32), (LLAMA_8B, "b256 ctx1024", [1024] * 256),
        (LLAMA_8B, "b8 ctx1024", [1024] * 8), (LLAMA_8B, "b192 unlike", unlike_lengths(192)),
    ):  # fmt: skip
        case = paged(heads, [1] * len(lens), lens)
        timed = []
        for tuning in candidates:
            ms = time_graph(_decode_launcher(case, heads, tuning), target_ms=8, repeats=3)
            timed.append((ms, tuning))
        print(f"-- {heads.name} {name}")
        for ms, tuning in sorted(timed, key=lambda item: item[0])[:top]:
            share = case.kv_bytes / ms / 1e6 / ceilings.read_gb_s
            print(f"{ms * 1e3:8.2f} us {100 * share:5.1f} %  {tuning}", flush=True)


def sweep_prefill(top: int) -> None:
    """Prefill candidates on Llama-8B shapes."""
    candidates = compile_all("prefill", PREFILL)
    for queries, lens in (([8192], [8192]), ([16384], [16384]), ([1024] * 8, [1024] * 8)):
        timed = []
        for block_size in (64, 128):
            case = paged(LLAMA_8B, queries, lens, num_caches=1, block_size=block_size)
            for tuning in candidates:
                if tuning.tile_tokens > block_size:
                    continue
                ms = time_graph(_prefill_launcher(case, tuning), target_ms=15, repeats=3)
                timed.append((ms, block_size, tuning))
        print(f"-- llama-8b {len(queries)} x {queries[0]}")
        for ms, block_size, tuning in sorted(timed, key=lambda item: item[0])[:top]:
            rate = causal_flop(LLAMA_8B, queries, lens) / ms / 1e9
            print(f"{ms * 1e3:9.1f} us {rate:6.1f} TFLOP/s  block {block_size} {tuning}", flush=True)


def sweep_experts(top: int, token_counts: tuple[int, ...] = (1, 4, 32, 256, 8192)) -> None:
    """Launch shapes of Qwen3-30B-A3B's experts."""
    jobs = [(count, tuning) for count in token_counts for tuning in candidates(count, QWEN3_30B)]
    works = compile_all("experts", jobs)
    ceilings = measure_ceilings()
    layers = two_layers(QWEN3_30B)
    for num_tokens in token_counts:
        case = MixtureCase.make(QWEN3_30B, num_tokens, layers)
        tunings = [tuning for count, tuning in works if count == num_tokens]
        timed = [(time_graph(case.launches(tuning), target_ms=4, repeats=3), tuning) for tuning in tunings]
        print(f"-- {QWEN3_30B.name} {num_tokens} tokens, default {timed[0][0] * 1e3:.2f} us")
        for ms, tuning in sorted(timed, key=lambda item: item[0])[:top]:
            rate = f"{100 * case.num_bytes() / ms / 1e6 / ceilings.read_gb_s:5.1f} % of read"
            if num_tokens >= MANY_TOKENS:
                rate = f"{case.flop() / ms / 1e9:6.1f} TFLOP/s"
            print(f"{ms * 1e3:9.2f} us {rate}  {short_name(tuning)}", flush=True)


def sweep_latent(top: int) -> None:
    """Launch shapes of latent attention, decode and prefill."""
    jobs = [(heads, tuning) for heads, tunings in DECODE_TUNINGS.items() for tuning in tunings]
    works = compile_all("latent decode", jobs)
    prefills = compile_all("latent prefill", PREFILL_TUNINGS)
    ceilings = measure_ceilings()
    for heads, batch, context in ((LITE, 1, 1024), (LITE, 32, 1024), (LITE, 32, 8192), (FULL, 32, 1024)):
        case = paged(heads, [1] * batch, [context] * batch)
        tunings = [tuning for of, tuning in works if of == heads]
        timed = [
            (time_graph(decode_launches(heads, case, tuning), target_ms=8, repeats=3), tuning) for tuning in tunings
        ]
        print(f"-- {heads.name} b{batch} ctx{context}")
        for ms, tuning in sorted(timed, key=lambda item: item[0])[:top]:
            share = case.kv_bytes / 2 / ms / 1e6 / ceilings.read_gb_s
            print(f"{ms * 1e3:8.2f} us {100 * share:5.1f} %  {tuning}", flush=True)
    case = paged(LITE, [8192], [8192], num_caches=1)
    timed = [(time_graph(prefill_launches(LITE, case, tuning), target_ms=15, repeats=3), tuning) for tuning in prefills]
    print(f"-- {LITE.name} prefill 1 x 8192")
    for ms, tuning in sorted(timed, key=lambda item: item[0])[:top]:
        print(f"{ms * 1e3:8.2f} us {prefill_flop(LITE, 8192) / ms / 1e9:6.1f} TFLOP/s  {tuning}", flush=True)


def sweep_packed(top: int, out: Path, only: str | None, tokens: list[int] | None) -> None:
    """Launch shapes of linears with packed weights at Llama-8B's sizes, `only` one kind; writes tuned/packed/."""
    counts = {
        "int4-g128": (1, 8, 16, 32, 64, 128, 256), "Q4_0": (1, 16), "Q4_K": (16, 256), "Q6_K": (1, 16, 256),
        "MXFP4": (1, 16, 256),
    }  # fmt: skip
    if only is not None:
        counts = {only: counts[only] if tokens is None else tuple(tokens)}
    jobs = [(kind, count, tuning) for kind, of in counts.items() for count in of for tuning in packed_candidates(count)]
    works = compile_all("packed", jobs)
    ceilings = measure_ceilings()
    print(f"read {ceilings.read_gb_s:.0f} GB/s, bf16 {ceilings.bf16_tflop_s:.0f} TFLOP/s")
    workspace = allocate_linear_workspace("cuda")
    choices = []
    for kind, of in counts.items():
        for (name, (n, k)), count in itertools.product(LLAMA_8B_LAYER.items(), of):
            num_bytes, launches = packed_launches(kind, n, k, count, workspace)
            tunings = [tuning for job_kind, job_count, tuning in works if (job_kind, job_count) == (kind, count)]
            timed = [(time_graph(launches(tuning), target_ms=2, repeats=3), tuning) for tuning in tunings]
            timed.sort(key=lambda item: item[0])
            plain = bf16_ms(n, k, torch.randn(count, k, device="cuda", dtype=BF16))
            shown = " | ".join(
                f"{ms * 1e3:.1f} us {100 * num_bytes / ms / 1e6 / ceilings.read_gb_s:.0f}% {_short(tuning)}"
                for ms, tuning in timed[:top]
            )
            print(
                f"{kind:10s} {name:8s} M={count:3d} bf16 {plain * 1e3:.1f} us, x{plain / timed[0][0]:.2f} {shown}",
                flush=True,
            )
            choices.append(
                {"format": weight_format(packed_weight(kind, 16, k)), "n": n, "k": k, "num_tokens": count,
                 "kernel": KERNEL_NAMES[type(timed[0][1])], "tuning": asdict(timed[0][1]),
                 "us": round(timed[0][0] * 1e3, 2), "bf16_us": round(plain * 1e3, 2)}
            )  # fmt: skip
    show_choices(out / "packed", choices, part=only)


def sweep_packed_experts(top: int, out: Path) -> None:
    """Launch shapes of experts with packed weights; writes tuned/packed_experts/<device>.json."""
    cases = list(itertools.product(range(len(PACKED_MIXTURES)), MIXTURE_TOKENS))
    works = compile_all(
        "packed experts",
        [
            (at, count, tuning)
            for at, count in cases
            for tuning in packed_expert_candidates(count, PACKED_MIXTURES[at][0])
        ],
    )
    ceilings = measure_ceilings()
    print(f"read {ceilings.read_gb_s:.0f} GB/s, bf16 {ceilings.bf16_tflop_s:.0f} TFLOP/s")
    choices = []
    for at, (mixture, kind) in enumerate(PACKED_MIXTURES):
        layers = packed_layers(mixture, kind)
        for num_tokens in MIXTURE_TOKENS:
            case = PackedCase.make(mixture, num_tokens, layers)
            tunings = [tuning for index, count, tuning in works if (index, count) == (at, num_tokens)]
            timed = [(time_graph(case.launches(tuning), target_ms=4, repeats=3), tuning) for tuning in tunings]
            default_ms = timed[0][0]
            timed.sort(key=lambda item: item[0])
            shown = " | ".join(
                f"{ms * 1e3:.1f} us {100 * case.num_bytes() / ms / 1e6 / ceilings.read_gb_s:.0f}% {_short(tuning)}"
                for ms, tuning in timed[:top]
            )
            print(f"{mixture.name} {kind} {num_tokens} tokens, default {default_ms * 1e3:.1f} us: {shown}", flush=True)
            ms, best = timed[0]
            choices.append(
                {"format": weight_format(layers[0].down), "experts": mixture.num_experts, "chosen": mixture.num_chosen,
                 "hidden": mixture.hidden, "inner": mixture.inner, "num_tokens": num_tokens, "tuning": asdict(best),
                 "us": round(ms * 1e3, 2)}
            )  # fmt: skip
        del layers
        torch.cuda.empty_cache()
    show_choices(out / "packed_experts", choices)


def _short(tuning: Tuning | PackedExpertTuning) -> str:
    return ",".join(str(value) for value in asdict(tuning).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decode", "prefill", "experts", "latent", "packed", "packed_experts"])
    parser.add_argument("--out", type=Path, default=TUNED, help="where tables are written")
    parser.add_argument("--top", type=int, default=4, help="how many of the best candidates to print")
    parser.add_argument("--only", help="`packed`: this kind of weights")
    parser.add_argument("--tokens", type=int, nargs="*", help="with --only: these numbers of tokens")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.what == "packed":
        sweep_packed(arguments.top, arguments.out, arguments.only, arguments.tokens)
    elif arguments.what == "packed_experts":
        sweep_packed_experts(arguments.top, arguments.out)
    else:
        sweeps = {
            "decode": sweep_decode,
            "prefill": sweep_prefill,
            "experts": sweep_experts,
            "latent": sweep_latent,
        }
        sweeps[arguments.what](arguments.top)


if __name__ == "__main__":
    main()
