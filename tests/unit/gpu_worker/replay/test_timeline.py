"""Where a step's time went, from timelines written by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from stepwire_kernels import __path__ as kernel_paths

from gpu_worker.replay.kernel_table import ATTENTION, INPUT, LINEARS, OTHER, RANKS, SAMPLER, part_of
from gpu_worker.replay.timeline import read_steps


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def test_kernels_belong_to_the_step_that_launched_them() -> None:
    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "stepwire step 0", 0, 100),
        event("cuda_runtime", "cudaGraphLaunch", 10, 5, 7),
        event("user_annotation", "stepwire step 1", 110, 50),
        event("cuda_driver", "cuLaunchKernelEx", 120, 5, 8),
        # All run later than the ranges that launched them; a graph's kernels share its id.
        event("kernel", "_build_input_kernel", 200, 10, 7),
        event("kernel", "_invariant_kernel", 215, 40, 7),
        event("kernel", "_decode_kernel", 250, 20, 7),
        event("kernel", "_finish_kernel", 275, 5, 7),
        event("kernel", "_add_rms_norm_kernel", 300, 7, 8),
        event("kernel", "of somebody else", 400, 7, 99),
    ]
    first, second = read_steps(events)
    assert (first.number, first.begun_us, first.ended_us) == (0, 200, 280)
    # The attention kernel runs beside the product for 5 us: they count once.
    assert first.parts == {INPUT: 10, LINEARS: 40, ATTENTION: 15, SAMPLER: 5, RANKS: 0, OTHER: 0}
    assert first.gaps_us == 10
    assert sum(first.parts.values()) + first.gaps_us == first.ended_us - first.begun_us
    assert second.parts[OTHER] == 7 and second.idle_before_us == 20


def test_ranges_of_a_cpu_count_without_what_is_inside() -> None:
    events = [
        event("user_annotation", "stepwire step 0", 0, 100),
        event("user_annotation", "stepwire input rows", 5, 10),
        event("user_annotation", "stepwire layer layers.mlp.down", 20, 40),
        event("user_annotation", "stepwire attention.run", 30, 15),
        event("cpu_op", "aten::mm", 31, 9),
        event("user_annotation", "stepwire sampler", 80, 5),
    ]
    (step,) = read_steps(events)
    assert step.parts == {INPUT: 10, LINEARS: 25, ATTENTION: 15, SAMPLER: 5, RANKS: 0, OTHER: 45}
    assert step.names["between layers"] == 45


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_tst_128x64_64x9_2x1_v_bz_TNT", LINEARS),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", LINEARS),
        ("Memcpy HtoD (Pinned -> Device)", INPUT),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", OTHER),
        ("_in_flight_kernel", LINEARS),
        ("_ring_kernel", LINEARS),
        ("layer layers.attention.qkv", LINEARS),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", RANKS),
        ("layer layers.attention_norm", OTHER),
        ("layer layers.attention.query_norm", OTHER),
        ("layer head", LINEARS),
    ],
)
def test_names(name: str, part: str) -> None:
    assert part_of(name) == part


def test_every_kernel_of_ours_is_somewhere() -> None:
    """A new kernel that falls under `other` must be meant to."""
    names = {
        name
        for file in Path(next(iter(kernel_paths))).glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert len(names) > 20
    others = {name for name in names if part_of(name) == OTHER}
    meant = {"_add_rms_norm_kernel", "_gated_activation_kernel", "_gated_quantized_kernel", "_gather_last_kernel"}
    assert others <= meant | {"_choose_kernel", "_tiles_kernel", "_count_kernel", "_place_kernel", "_look_up_kernel"}
