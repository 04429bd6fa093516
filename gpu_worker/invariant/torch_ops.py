"""Elementwise operations on a CPU whose results do not depend on how many tokens there are.

torch computes most elements in vectors and the last few one by one, by another formula that may round differently; and
it cuts what is large into a piece a thread. Here a call never has a rest that depends on the number of tokens, and is
never cut: rows of a multiple of VECTOR_ELEMENTS, few enough of them, and else one row a call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_worker.layers.ops import AttentionHeads, TorchOps
from gpu_worker.layers.rope import StepRotation

# A loop's stride at its widest: two vectors of 512 bits of 16-bit elements.
VECTOR_ELEMENTS = 64
# at::internal::GRAIN_SIZE: from so many elements on torch spreads a call over threads.
THREADED_ELEMENTS = 32768


def rows_per_call(row_elements: int, vector_row: int) -> int:
    """How many rows of `row_elements` one call may have; the innermost loop runs over `vector_row` elements."""
    if vector_row % VECTOR_ELEMENTS:
        return 1
    return max(1, (THREADED_ELEMENTS - 1) // row_elements)


def in_calls(function: Callable[[slice], torch.Tensor], num_rows: int, per_call: int) -> torch.Tensor:
    """`function` of consecutive slices of rows, put together."""
    if num_rows <= per_call:
        return function(slice(0, num_rows))
    return torch.cat([function(slice(start, start + per_call)) for start in range(0, num_rows, per_call)])


class PiecewiseOps(TorchOps):
    """`TorchOps` in calls of fixed kinds. Norms go row by row inside torch already; additions are exact."""

    def gated_activation(self, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
        whole, size = super().gated_activation, gate_up.shape[1] // 2
        return in_calls(lambda rows: whole(gate_up[rows], kind), gate_up.shape[0], rows_per_call(size, size))

    def activation(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        whole, size = super().activation, x.shape[1]
        return in_calls(lambda rows: whole(x[rows], kind), x.shape[0], rows_per_call(size, size))

    def rotate_heads(self, by_head: torch.Tensor, heads: AttentionHeads, rotation: StepRotation) -> torch.Tensor:
        whole = super().rotate_heads
        elements = (heads.num_heads + heads.num_kv_heads) * heads.head_dim

        def rotated(rows: slice) -> torch.Tensor:
            part = StepRotation(rotation.cos[rows], rotation.signed_sin[rows], rotation.interleaved)
            return whole(by_head[rows], heads, part)

        return in_calls(rotated, by_head.shape[0], rows_per_call(elements, rotation.cos.shape[-1]))
