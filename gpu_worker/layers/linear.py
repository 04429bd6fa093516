"""Linears of a decoder, split over ranks. What a rank holds comes from `ParallelContext`, how it is stored from
`quant/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gpu_worker.layers.ops import TORCH_OPS, LayerOps, QuantizedRows, RowQuant
from gpu_worker.layers.weighted import Weighted
from gpu_worker.parallel.shares import HeadShare, ParallelContext, Share
from gpu_worker.quant.api import (
    ExpectedTensors,
    LinearPart,
    LinearShape,
    OutputSpan,
    QuantScheme,
    RandomValues,
    StoredTensor,
)


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What layers are built with, the same for all of a model."""

    parallel: ParallelContext
    quant: QuantScheme
    dtype: torch.dtype
    device: torch.device
    ops: LayerOps = TORCH_OPS
    leaves_sums: bool = False
    """Row-parallel layers return this rank's summand: whoever reads it adds it up with the norm that follows."""
    begins_sums: bool = False
    """And their sums may be under way by then: whoever reads it reads all rows."""

    def elsewhere(self) -> BuildContext:
        """For a layer that another rank holds: whole, and without memory."""
        return replace(self, parallel=ParallelContext(), device=torch.device("meta"))


class Linear(Weighted):
    """y = x W^T + b for this rank's rows and columns of W."""

    def __init__(self, shape: LinearShape, path: str, build: BuildContext) -> None:
        self.shape = shape
        self._ops = build.ops
        self.method = build.quant.linear_method(path)
        self.method.create(shape, build.dtype, build.device)

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        self.method.load_shard(part, tensor, source)

    def expected(self) -> ExpectedTensors:
        return self.method.expected()

    def optional(self) -> frozenset[tuple[str, str]]:
        return self.method.optional()

    def problem(self, part: str, tensor: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        return self.method.problem(part, tensor, shape, dtype)

    def num_outputs(self, part: str) -> int:
        return self.shape.part(part).outputs.total

    def output_span(self, part: str, tensor: str) -> OutputSpan | None:
        return self.method.output_span(part, tensor)

    def fill_random(self, source: RandomValues) -> None:
        self.method.fill_random(source)

    def finish(self) -> None:
        self.method.finish()

    def num_bytes(self) -> int:
        return self.method.num_bytes()

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, inputs] -> [num_tokens, outputs]."""
        return self.method.apply(x)

    def apply_quantized(self, rows: QuantizedRows) -> torch.Tensor:
        """`apply` of rows that have been quantized as the method wants them (`LinearMethod.row_quant`)."""
        return self.method.apply_quantized(rows)

    def apply_gated(self, gate_up: torch.Tensor, activation: str, quant: RowQuant) -> torch.Tensor:
        """`apply` of act(gate) * up, in one launch with what the method makes of its rows first, where there is one.

        gate_up: [num_tokens, 2 * inputs]; quant: the method's `row_quant`.
        """
        rows = self._ops.quantized_gate(gate_up, activation, quant)
        if rows is None:
            return self.apply(self._ops.gated_activation(gate_up, activation))
        return self.apply_quantized(rows)


def column_parallel(
    num_inputs: int, parts: Sequence[tuple[str, Share]], *, bias: bool, path: str, build: BuildContext
) -> Linear:
    """One linear over the parts' outputs, side by side; a rank sees the whole input and holds a share of each part."""
    placed: list[LinearPart] = []
    start = 0
    for name, outputs in parts:
        placed.append(LinearPart(name, outputs, start))
        start += outputs.size
    shape = LinearShape(tuple(placed), inputs=Share(0, num_inputs, num_inputs), has_bias=bias)
    return Linear(shape, path, build)


def qkv_parallel(
    hidden_size: int,
    heads: HeadShare,
    head_dim: int,
    *,
    bias: bool,
    path: str,
    build: BuildContext,
    parts: str = "qkv",
    query_dim: int | None = None,
) -> Linear:
    """[q heads | k heads | v heads] of this rank in one linear: parts `q`, `k`, `v`, or some of them.

    `query_dim`: outputs for each query head, where they are more than its query (None: head_dim).
    """

    def rows(part: str) -> Share:
        share, size = (heads.query, query_dim or head_dim) if part == "q" else (heads.kv, head_dim)
        return Share(share.start * size, share.size * size, share.total * size)

    return column_parallel(hidden_size, [(part, rows(part)) for part in parts], bias=bias, path=path, build=build)


class RowParallelLinear(Linear):
    """Every rank holds a share of the *inputs*; the ranks' outputs are summed. Only rank 0 adds the bias.

    Without `reduce` the sum is left to the caller, who has more to add first.
    """

    def __init__(
        self, inputs: Share, num_outputs: int, *, bias: bool, path: str, build: BuildContext, reduce: bool = True
    ) -> None:
        part = LinearPart("", Share(0, num_outputs, num_outputs), 0)
        shape = LinearShape((part,), inputs=inputs, has_bias=bias, holds_bias=build.parallel.rank == 0)
        super().__init__(shape, path, build)
        self._parallel = build.parallel
        self._reduce = reduce and not build.leaves_sums
        self._begins_sums = reduce and build.begins_sums
        self._dtype = build.dtype

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        pieces = self._pieces(len(x))
        if not pieces:
            return self._summed(self.method.apply(x))
        out = x.new_empty(len(x), self.shape.num_outputs)  # [num_tokens, outputs]
        for piece in pieces:
            self.method.apply_into(x[piece], out[piece])
            self._parallel.begin_sum(out, piece)
        return out

    def apply_quantized(self, rows: QuantizedRows) -> torch.Tensor:
        values, scales = rows.values, rows.scales
        pieces = self._pieces(len(values))
        if not pieces:
            return self._summed(self.method.apply_quantized(rows))
        out = values.new_empty(len(values), self.shape.num_outputs, dtype=self._dtype)  # [num_tokens, outputs]
        for piece in pieces:
            self.method.apply_quantized_into(QuantizedRows(values[piece], scales[piece]), out[piece])
            self._parallel.begin_sum(out, piece)
        return out

    def _pieces(self, num_rows: int) -> tuple[slice, ...]:
        """In which a sum over ranks is begun that somebody else ends."""
        if not self._begins_sums:
            return ()
        return self._parallel.pieces(num_rows, self.shape.num_outputs * self._dtype.itemsize)

    def _summed(self, partial: torch.Tensor) -> torch.Tensor:
        return self._parallel.all_reduce(partial) if self._reduce else partial
