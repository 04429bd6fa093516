"""Benchmark of every kernel: `python -m load_tests.kernels.bench [section ...]`.

Prints each kernel's time and its share of the read bandwidth or of the bf16 matrix rate, both measured first in the
same run, and appends JSON lines to load_tests/results/kernels.jsonl. Needs a CUDA device; PYTHONPATH must hold `.` and
`kernels`. Launches are timed inside a CUDA graph, over inputs that together exceed the level-2 cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from stepwire_kernels import sampler, step_input, work_list
from stepwire_kernels.activation import gated_activation
from stepwire_kernels.attention_decode import decode_attention, decode_policy, default_decode_tuning
from stepwire_kernels.attention_from_qkv import attention_from_qkv, from_qkv_policy
from stepwire_kernels.attention_prefill import default_prefill_tuning, prefill_attention, prefill_tile_tokens
from stepwire_kernels.gather import gather_last_hidden, look_up_part
from stepwire_kernels.linear import linear
from stepwire_kernels.norm import add_rms_norm
from stepwire_kernels.reference_steps import RowParameters
from stepwire_kernels.rope_kv import rope_and_write_kv
from stepwire_kernels.split_k import allocate_linear_workspace

from load_tests.kernels.cases import LLAMA_8B, QWEN3_06B, Heads, causal_flop, paged, unlike_lengths
from load_tests.kernels.delta import bench_delta
from load_tests.kernels.latent import bench_latent
from load_tests.kernels.linears import LLAMA_8B_LAYER
from load_tests.kernels.measure import Report, copies, measure_ceilings, time_graph
from load_tests.kernels.mixtures import bench_experts, bench_scaled_experts
from load_tests.kernels.packed_mixtures import bench_packed_experts
from load_tests.kernels.quantized import bench_packed, bench_packed_many, bench_scaled

BF16 = torch.bfloat16


def bench_pointwise(report: Report) -> None:
    """add + RMSNorm, gated activation, gather."""
    for num_tokens, hidden, inner in ((1, 4096, 14336), (256, 4096, 14336), (8192, 4096, 14336)):
        weight = torch.randn(hidden, device="cuda", dtype=BF16)
        sets = [
            tuple(torch.randn(num_tokens, hidden, device="cuda", dtype=BF16) for _ in range(3))
            for _ in range(copies(num_tokens * hidden * 8))
        ]
        launches = [lambda s=s, w=weight: add_rms_norm(s[0], s[1], w, 1e-5, out=s[2]) for s in sets]
        report.add("add_rms_norm", f"{num_tokens} x {hidden}", time_graph(launches), num_bytes=num_tokens * hidden * 8)
        packed = [
            torch.randn(num_tokens, 2 * inner, device="cuda", dtype=BF16) for _ in range(copies(num_tokens * inner * 6))
        ]
        out = torch.empty(num_tokens, inner, device="cuda", dtype=BF16)
        launches = [lambda p=p, o=out: gated_activation(p, "silu", out=o) for p in packed]
        report.add("silu_mul", f"{num_tokens} x 2 x {inner}", time_graph(launches), num_bytes=num_tokens * inner * 6)
        del packed
    hidden_states = torch.randn(8192, 4096, device="cuda", dtype=BF16)
    starts = torch.arange(0, 8193, 32, dtype=torch.int32, device="cuda")
    ms = time_graph([lambda: gather_last_hidden(hidden_states, starts)] * 8)
    report.add("gather_last", "256 of 8192 x 4096", ms, num_bytes=256 * 4096 * 4)
    table = torch.randn(64128, 4096, device="cuda", dtype=BF16)
    for num_tokens in (1, 256):
        token_ids = torch.randint(0, 2 * len(table), (num_tokens,), dtype=torch.int32, device="cuda")
        ms = time_graph([lambda ids=token_ids: look_up_part(ids, table, 0)] * 8)
        report.add("look_up_part", f"{num_tokens} of 2 x 64128 x 4096", ms, num_bytes=num_tokens * 4096 * 3)


def bench_rope(report: Report) -> None:
    for heads, has_norm in ((LLAMA_8B, False), (QWEN3_06B, True)):
        for num_tokens in (1, 256, 8192):
            width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
            moved = num_tokens * width * 4
            cos = torch.randn(16384, heads.head_dim // 2, device="cuda")
            sin = torch.randn(16384, heads.head_dim // 2, device="cuda")
            norm = {"q_norm": torch.randn(heads.head_dim, device="cuda", dtype=BF16)} if has_norm else {}
            norm |= {"k_norm": norm["q_norm"]} if has_norm else {}
            shape = (1024, heads.num_kv_heads, 64, heads.head_dim)
            sets = [
                (
                    torch.randn(num_tokens, width, device="cuda", dtype=BF16),
                    torch.empty(shape, device="cuda", dtype=BF16),
                    torch.empty(shape, device="cuda", dtype=BF16),
                )
                for _ in range(min(8, copies(moved)))
            ]
            positions = torch.arange(num_tokens, dtype=torch.int32, device="cuda")
            slots = torch.randperm(65536, device="cuda")[:num_tokens].int() if num_tokens < 8192 else positions + 64
            launches: list[Callable[[], object]] = [
                lambda s=s, c=cos, i=sin, p=positions, t=slots, h=heads, n=norm: rope_and_write_kv(
                    s[0], s[1], s[2], p, t, c, i, h.num_heads, **n
                )
                for s in sets
            ]
            case = f"{heads.name} {num_tokens} tokens"
            report.add("rope_kv", case + (" qk-norm" if has_norm else ""), time_graph(launches), num_bytes=moved)


def bench_decode(report: Report) -> None:
    for heads in (LLAMA_8B, QWEN3_06B):
        for batch, context in ((1, 1024), (32, 1024), (128, 1024), (256, 1024), (1, 8192), (32, 8192)):
            decode_row(report, heads, f"b{batch} ctx{context}", [context] * batch, BF16)
        for batch in (72, 192, 256):
            decode_row(report, heads, f"b{batch} unlike", unlike_lengths(batch), BF16)
    decode_row(report, LLAMA_8B, "b32 ctx1024", [1024] * 32, torch.float8_e4m3fn)
    decode_row(report, LLAMA_8B, "b32 ctx8192", [8192] * 32, torch.float8_e4m3fn)


def bench_from_qkv(report: Report) -> None:
    for heads in (LLAMA_8B, QWEN3_06B):
        for batch, context in (
            (1, 1024), (2, 1024), (4, 1024), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (1, 8192), (32, 8192),
        ):  # fmt: skip
            from_qkv_row(report, heads, f"b{batch} ctx{context}", [context] * batch, BF16)
        for batch in (24, 48, 72, 96, 128):
            from_qkv_row(report, heads, f"b{batch} unlike", unlike_lengths(batch), BF16)
    from_qkv_row(report, LLAMA_8B, "b32 ctx1024", [1024] * 32, torch.float8_e4m3fn)


def from_qkv_row(report: Report, heads: Heads, what: str, lens: list[int], cache_dtype: torch.dtype) -> None:
    """Rotation, KV write and attention of decodes, together and apart."""
    batch = len(lens)
    case = paged(heads, [1] * batch, lens, cache_dtype=cache_dtype)
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    qkv = torch.randn(batch, width, device="cuda", dtype=BF16)
    cos, sin = torch.randn(2, max(lens), heads.head_dim // 2, device="cuda")
    positions = case.kv_lens - 1
    blocks = case.block_tables.gather(1, (positions // 64).long()[:, None])[:, 0]
    places = (case.block_tables, positions, blocks * 64 + positions % 64, cos, sin)
    policy = from_qkv_policy(batch, heads.num_heads, heads.num_kv_heads, heads.head_dim)
    fine, fine_scratch = case.decode_work(heads, policy)
    work, scratch = case.decode_work(
        heads, decode_policy(heads.num_kv_heads, default_decode_tuning(heads.head_dim, cache_dtype))
    )

    def together(k: torch.Tensor, v: torch.Tensor) -> None:
        attention_from_qkv(qkv, k, v, *places, fine, fine_scratch, case.scale, heads.num_heads, pdl=True)

    def apart(k: torch.Tensor, v: torch.Tensor) -> None:
        q = rope_and_write_kv(qkv, k, v, positions, places[2], cos, sin, heads.num_heads, pdl=True)
        decode_attention(q, k, v, case.block_tables, work, scratch, case.scale, case.out, pdl=True)

    for name, run in (("attention_from_qkv", together), ("rope_kv, decode_attention", apart)):
        launches: list[Callable[[], object]] = [lambda c=c, run=run: run(*c) for c in case.caches]
        row = f"{heads.name} {what}" + (" fp8" if cache_dtype != BF16 else "")
        report.add(name, row, time_graph(launches), num_bytes=case.kv_bytes)


def decode_row(report: Report, heads: Heads, what: str, lens: list[int], cache_dtype: torch.dtype) -> None:
    case = paged(heads, [1] * len(lens), lens, cache_dtype=cache_dtype)
    work, workspace = case.decode_work(
        heads, decode_policy(heads.num_kv_heads, default_decode_tuning(heads.head_dim, cache_dtype))
    )
    launches = [
        lambda c=c: decode_attention(
            case.q, c[0], c[1], case.block_tables, work, workspace, case.scale, case.out, pdl=True
        )
        for c in case.caches
    ]
    name = f"{heads.name} {what}" + (" fp8" if cache_dtype != BF16 else "")
    report.add("decode_attention", name, time_graph(launches), num_bytes=case.kv_bytes)


def bench_prefill(report: Report) -> None:
    for queries, lens in (
        ([1024], [1024]), ([8192], [8192]), ([16384], [16384]), ([8192] * 2, [8192] * 2),
        ([1024] * 8, [1024] * 8), ([2048], [16384]),
    ):  # fmt: skip
        case = paged(LLAMA_8B, queries, lens, num_caches=2)
        tuning = default_prefill_tuning(128, BF16, torch.device("cuda"))
        work = case.prefill_work(prefill_tile_tokens(32, 8, tuning))
        launches = [
            lambda c=c, case=case, work=work, tuning=tuning: prefill_attention(
                case.q, c[0], c[1], case.block_tables, work, case.scale, case.out, tuning=tuning
            )
            for c in case.caches
        ]
        name = f"llama-8b {len(queries)} x {queries[0]} of {lens[0]}"
        report.add("prefill_attention", name, time_graph(launches), flop=causal_flop(LLAMA_8B, queries, lens))


SAMPLING = {
    "greedy": RowParameters(temperature=0.0),
    "temperature": RowParameters(temperature=0.6),
    "top-k 20 top-p 0.95": RowParameters(temperature=0.6, top_k=20, top_p=0.95),
    "top-p 0.9": RowParameters(temperature=0.8, top_p=0.9),
    "min-p 0.05": RowParameters(min_p=0.05),
    "penalties": RowParameters(temperature=0.6, repetition=1.1, frequency=0.1),
}


def bench_sampler(report: Report) -> None:
    vocab = 128256
    for batch in (1, 256):
        rows = step_input.allocate_row_state(batch, 64, 16, vocab, "cuda")
        workspace = sampler.allocate_sampler_workspace(batch, vocab, "cuda")
        logits = [(3 * torch.randn(batch, vocab, device="cuda")).bfloat16() for _ in range(2)]
        row_ids = torch.arange(batch, dtype=torch.int32, device="cuda")
        for name, parameters in SAMPLING.items():
            words = np.stack([parameters.words()] * batch)
            words[:, step_input.PARAM_SEED_LOW] = np.arange(batch)
            rows.parameters.copy_(torch.from_numpy(words))
            out = sampler.allocate_sampled(batch, 0, "cuda")
            launches = [
                lambda v=v, o=out, w=workspace, r=rows, i=row_ids: sampler.sample(v, i, i, r, w, o) for v in logits
            ]
            report.add("sampler", f"b{batch} {name}", time_graph(launches), num_bytes=batch * vocab * 2)
        words[:, step_input.PARAM_NUM_LOGPROBS] = 20
        rows.parameters.copy_(torch.from_numpy(words))
        out = sampler.allocate_sampled(batch, 20, "cuda")
        launches = [lambda v=v, o=out, w=workspace, r=rows, i=row_ids: sampler.sample(v, i, i, r, w, o) for v in logits]
        report.add("sampler", f"b{batch} + top 20 logprobs", time_graph(launches), num_bytes=batch * vocab * 2)


def bench_step_input(report: Report) -> None:
    for batch in (1, 32, 256):
        rows = step_input.allocate_row_state(batch, 4096, 64, 32, "cuda", with_token_counts=False)
        rows.lengths.fill_(1024)
        rows.block_tables.copy_(torch.randint(1, 1000, rows.block_tables.shape))
        runs = np.array([[row, 1023, 1, 1] for row in range(batch)], dtype=np.int32)
        buffer = torch.from_numpy(step_input.pack_step([], runs)).cuda()
        step = step_input.allocate_step_input(batch, batch, "cuda")
        work = work_list.allocate_decode_list(batch, batch, "cuda")
        sampled = torch.zeros(batch, dtype=torch.int32, device="cuda")

        def launch(
            buffer: torch.Tensor = buffer,
            rows: step_input.RowState = rows,
            step: step_input.StepInput = step,
            work: work_list.WorkList = work,
            sampled: torch.Tensor = sampled,
        ) -> None:
            step_input.apply_delta(buffer, rows)
            step_input.build_step_input(buffer, rows, step, 64, one_token_runs=True)
            work_list.build_decode_list(step.query_starts, step.kv_lens, step.run_rows, work)
            step_input.write_back_tokens(sampled, step, rows)

        report.add("step_input", f"b{batch} apply+build+list+write", time_graph([launch] * 4))


def bench_linear(report: Report) -> None:
    """The linears of one Llama-8B layer, ours by table (else torch) against cuBLAS."""
    workspace = allocate_linear_workspace("cuda")
    for num_tokens in (1, 2, 4, 8, 16, 32, 64):
        totals = {"torch": 0.0, "table": 0.0}
        moved = 0
        for n, k in LLAMA_8B_LAYER.values():
            weights = [torch.randn(n, k, device="cuda", dtype=BF16) for _ in range(copies(n * k * 2) + 2)]
            x = torch.randn(num_tokens, k, device="cuda", dtype=BF16)
            moved += n * k * 2
            totals["torch"] += time_graph([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights])
            totals["table"] += time_graph(
                [lambda w=w, x=x: linear(x, w, workspace=workspace, pdl=True) for w in weights]
            )
        for name, ms in totals.items():
            report.add("linear", f"llama-8b layer M={num_tokens} {name}", ms, num_bytes=moved)


SECTIONS: dict[str, Callable[[Report], None]] = {
    "pointwise": bench_pointwise,
    "rope": bench_rope,
    "decode": bench_decode,
    "from_qkv": bench_from_qkv,
    "prefill": bench_prefill,
    "sampler": bench_sampler,
    "step_input": bench_step_input,
    "linear": bench_linear,
    "experts": bench_experts,
    "scaled_experts": bench_scaled_experts,
    "latent": bench_latent,
    "delta": bench_delta,
    "packed": bench_packed,
    "packed_many": bench_packed_many,
    "packed_experts": bench_packed_experts,
    "scaled": bench_scaled,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"any of {', '.join(SECTIONS)}; all when none is named")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    if not torch.cuda.is_available():
        parser.error("the kernel benchmarks need a CUDA device")
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(
        f"{torch.cuda.get_device_name(0)}: read {ceilings.read_gb_s:.0f} GB/s, copy {ceilings.copy_gb_s:.0f} GB/s, "
        f"bf16 {ceilings.bf16_tflop_s:.0f} TFLOP/s"
    )
    report = Report(ceilings)
    for name in arguments.sections or SECTIONS:
        SECTIONS[name](report)
        torch.cuda.empty_cache()
    report.write()


if __name__ == "__main__":
    main()
