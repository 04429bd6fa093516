"""How the kernel benchmarks measure: CUDA graphs over rotating inputs, and the card's own ceilings."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

RESULTS = Path(__file__).resolve().parent.parent / "results" / "kernels.jsonl"


@triton.jit
def _read_kernel(source_ptr, out_ptr, words, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for base in range(tl.program_id(0) * BLOCK, words, tl.num_programs(0) * BLOCK):
        total += tl.load(source_ptr + base.to(tl.int64) + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def time_graph(launches: Sequence[Callable[[], Any]], *, target_ms: float = 30.0, repeats: int = 5) -> float:
    """Median milliseconds of one launch, from replays of one graph that holds all of them in order."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches:
            launch()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replays(count: int) -> float:
        start.record()
        for _ in range(count):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / count

    replays(2)
    count = max(2, min(200, int(target_ms / max(replays(2), 1e-3))))
    return sorted(replays(count) for _ in range(repeats))[repeats // 2] / len(launches)


def copies(tensor_bytes: int) -> int:
    """How many buffers of this size it takes to defeat the level-2 cache, within reason."""
    return max(2, min(64, (240 << 20) // max(tensor_bytes, 1)))


@dataclass(frozen=True)
class Ceilings:
    """The card's rates, measured in this run."""

    read_gb_s: float
    copy_gb_s: float
    bf16_tflop_s: float


def measure_ceilings() -> Ceilings:
    """Read and copy bandwidth over 4 GB, and the rate of one large bf16 product on random data."""
    read_gb_s, copy_gb_s = _memory_rates(1 << 30)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    matmul_ms = triton.testing.do_bench(lambda: torch.mm(a, b), return_mode="median")
    return Ceilings(read_gb_s, copy_gb_s, 2 * 8192**3 / matmul_ms / 1e9)


def _memory_rates(words: int) -> tuple[float, float]:
    source = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    sums = torch.empty(4096, dtype=torch.int32, device="cuda")
    programs = torch.cuda.get_device_properties(0).multi_processor_count * 8
    read_ms = time_graph([lambda: _read_kernel[(programs,)](source, sums, words, BLOCK=8192, num_warps=8)])
    copy_ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return words * 4 / read_ms / 1e6, words * 8 / copy_ms / 1e6


@dataclass
class Report:
    """Rows printed as a table and kept as JSON lines."""

    ceilings: Ceilings
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kernel: str, case: str, ms: float, *, num_bytes: float = 0, flop: float = 0, **extra: Any) -> None:
        """Record one measurement; bytes are those that must move, flop those that must be done."""
        row: dict[str, Any] = {"kernel": kernel, "case": case, "us": round(ms * 1e3, 2), **extra}
        if num_bytes:
            rate = num_bytes / ms / 1e6
            row |= {"gb_s": round(rate, 1), "share_of_read": round(rate / self.ceilings.read_gb_s, 3)}
        if flop:
            rate = flop / ms / 1e9
            row |= {"tflop_s": round(rate, 1), "share_of_matmul": round(rate / self.ceilings.bf16_tflop_s, 3)}
        self.rows.append(row)
        share = row.get("share_of_read", row.get("share_of_matmul", 0))
        rate_text = f"{row['gb_s']:8.0f} GB/s" if num_bytes else (f"{row['tflop_s']:8.0f} TF/s" if flop else " " * 13)
        extra_text = " ".join(f"{key}={value}" for key, value in extra.items())
        print(f"{kernel:18s} {case:34s} {row['us']:9.2f} us {rate_text} {100 * share:5.1f} % {extra_text}", flush=True)

    def write(self, path: Path = RESULTS) -> None:
        """Append the rows, each with machine, commit and command."""
        path.parent.mkdir(parents=True, exist_ok=True)
        context = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "gpu": torch.cuda.get_device_name(0),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "commit": commit(),
            "command": " ".join(["python -m", "load_tests.kernels." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
            "read_gb_s": round(self.ceilings.read_gb_s, 1),
            "copy_gb_s": round(self.ceilings.copy_gb_s, 1),
            "bf16_tflop_s": round(self.ceilings.bf16_tflop_s, 1),
        }
        with path.open("a") as file:
            for row in self.rows:
                file.write(json.dumps({**row, **context}) + "\n")


def commit() -> str:
    """The checked-out commit, or why there is none."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({type(error).__name__})"
    return found.stdout.strip()
