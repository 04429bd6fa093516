"""Benchmark of the gated delta rule at the sizes of Qwen3-Next-80B-A3B and Qwen3.5: section `delta` of
`load_tests.kernels.bench`.

A decode reads and writes a row's matrices, 2 MiB in a layer, and is held against those bytes. A prompt is held against
the matrix rate: of a chunk, what `gated_delta_chunks.py` multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from stepwire_kernels.causal_conv import causal_conv
from stepwire_kernels.delta_runs import DeltaRuns
from stepwire_kernels.gated_delta import gated_delta
from stepwire_kernels.gated_delta_chunks import CHUNK_TOKENS
from stepwire_kernels.gated_heads import gated_norm

from gpu_worker.layers.delta_rule import DeltaLayout
from load_tests.kernels.measure import Report, copies, time_graph

CONV_WIDTH = 4
LAYOUT = DeltaLayout.of(16, 2, 128, 128, is_grouped=True)
HEADS, KEYS, VALUES = LAYOUT.num_value_heads, LAYOUT.key_dim, LAYOUT.value_dim
COLUMNS = LAYOUT.num_channels + HEADS * VALUES
ROW_BYTES = HEADS * KEYS * VALUES * 4


def runs_of(lengths: list[int], before: int, device: str) -> DeltaRuns:
    """A row for each, that has had `before` tokens."""
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0).int()))
    rows = torch.arange(len(lengths), dtype=torch.int32, device=device)
    return DeltaRuns(starts, counts + before, rows, 1 in lengths, max(lengths) > 1)


class Layer:
    """One layer's inputs and states."""

    def __init__(self, runs: DeltaRuns, num_tokens: int, device: str) -> None:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device).bfloat16()

        self.runs = runs
        self.mixed, self.pairs, self.qkv = (randn(num_tokens, n) for n in (COLUMNS, 2 * HEADS, LAYOUT.num_channels))
        self.taps, self.norm = randn(LAYOUT.num_channels, CONV_WIDTH), randn(VALUES)
        self.conv = randn(runs.num_runs, CONV_WIDTH - 1, LAYOUT.num_channels)
        self.matrices = torch.zeros(runs.num_runs, HEADS, KEYS, VALUES, device=device)
        self.rate, self.bias = torch.randn(2, HEADS, device=device)
        self.attended = randn(num_tokens, HEADS, VALUES)

    def launches(self, *, pdl: bool) -> dict[str, Callable[[], object]]:
        return {
            "causal_conv": partial(causal_conv, self.mixed, self.taps, self.conv, LAYOUT, self.runs, pdl=pdl),
            "gated_delta": partial(
                gated_delta, self.qkv, self.pairs, self.rate, self.bias, self.matrices, LAYOUT, self.runs, pdl=pdl
            ),
            "gated_norm": partial(gated_norm, self.attended, self.mixed, self.norm, 1e-6, LAYOUT, pdl=pdl),
        }


def chunk_flop(num_tokens: int) -> float:
    """Products of chunks: keys with keys, with queries and with the matrix (twice), the inverse and the scores."""
    wide = 2 * KEYS * (CHUNK_TOKENS + 1.5 * VALUES)
    return 2.0 * num_tokens * HEADS * (wide + 2 * CHUNK_TOKENS * VALUES)


def bench_delta(report: Report) -> None:
    for lengths, name in (
        ([1], "1 decode"), ([1] * 32, "32 decodes"), ([1] * 256, "256 decodes"),
        ([1024], "1 x 1024"), ([8192], "1 x 8192"), ([256] * 16 + [1] * 64, "16 x 256 and 64 decodes"),
    ):  # fmt: skip
        num_tokens, runs = sum(lengths), runs_of(lengths, 64, "cuda")
        state_bytes = 2 * len(lengths) * ROW_BYTES
        layers = [Layer(runs, num_tokens, "cuda") for _ in range(copies(state_bytes + num_tokens * COLUMNS * 2))]
        for kernel in ("causal_conv", "gated_delta", "gated_norm"):
            ms = time_graph([layer.launches(pdl=True)[kernel] for layer in layers])
            if kernel == "gated_delta" and num_tokens > len(lengths):
                report.add(kernel, name, ms, flop=chunk_flop(num_tokens))
                continue
            moved = {
                "causal_conv": 4 * num_tokens * LAYOUT.num_channels,
                "gated_delta": state_bytes,
                "gated_norm": 6 * num_tokens * HEADS * VALUES,
            }
            report.add(kernel, name, ms, num_bytes=moved[kernel])
        del layers
