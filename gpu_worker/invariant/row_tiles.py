"""Products of a fixed number of rows on a CPU: what a row becomes does not depend on how many there are.

A matrix product's kernel, and with it the order of its sums, is picked by the shapes. Here a product always has
TILE_ROWS rows, the last tile filled up with zeros. That rows of one product do not depend on their place in it is
checked for every weight once it is loaded; where they do, its rows are multiplied one by one. A tile begins at a
multiple of ALIGNMENT: MKL's sums also follow where in memory a row begins (seen in float32 with three and four threads
and rows of 33 and 1030 elements).
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import torch

from gpu_worker.quant.api import ExpectedTensors, LinearMethod, LinearShape, QuantScheme, RandomValues, StoredTensor

log = structlog.get_logger(__name__)

TILE_ROWS = 16
NUM_PROBES = 3
# Bytes; what torch's allocator gives a new tensor on a CPU, and what MKL asks for.
ALIGNMENT = 64

RowFunction = Callable[[torch.Tensor], torch.Tensor]


def in_row_tiles(function: RowFunction, x: torch.Tensor, tile_rows: int) -> torch.Tensor:
    """`function` of x [num_rows, ...], `tile_rows` rows at a time: [num_rows, ...]."""
    num_rows = x.shape[0]
    if num_rows == tile_rows:
        return function(_aligned(x))
    whole = num_rows // tile_rows * tile_rows
    parts = [function(_aligned(x[start : start + tile_rows])) for start in range(0, whole, tile_rows)]
    if whole < num_rows:
        last = x.new_zeros((tile_rows, *x.shape[1:]))
        last[: num_rows - whole] = x[whole:]
        parts.append(function(last)[: num_rows - whole])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _aligned(tile: torch.Tensor) -> torch.Tensor:
    """The same values, dense, from a multiple of ALIGNMENT on."""
    if tile.is_contiguous() and tile.data_ptr() % ALIGNMENT == 0:
        return tile
    return torch.empty(tile.shape, dtype=tile.dtype, device=tile.device).copy_(tile)


def rows_are_alike(function: RowFunction, num_inputs: int, dtype: torch.dtype) -> bool:
    """Whether a row gives the same bits at every place of a tile."""
    generator = torch.Generator().manual_seed(num_inputs)
    for _ in range(NUM_PROBES):
        row = torch.randn(1, num_inputs, generator=generator).to(dtype)
        out = function(row.repeat(TILE_ROWS, 1))
        if not torch.equal(out, out[:1].expand_as(out)):
            return False
    return True


def choose_tile(function: RowFunction, num_inputs: int, dtype: torch.dtype, name: str) -> int:
    """TILE_ROWS, or 1 where a row's place in a tile changes its bits."""
    if rows_are_alike(function, num_inputs, dtype):
        return TILE_ROWS
    log.debug("rows of one product differ by their place: they are multiplied one by one", product=name)
    return 1


class TiledLinear(LinearMethod):
    """Another method's weights, multiplied by tiles of rows."""

    def __init__(self, inner: LinearMethod, path: str) -> None:
        self._inner, self._path, self._tile_rows = inner, path, TILE_ROWS

    def create(self, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> None:
        self._num_inputs, self._dtype = shape.inputs.size, dtype
        self._inner.create(shape, dtype, device)

    def load_shard(self, part: str, tensor: str, source: StoredTensor) -> None:
        self._inner.load_shard(part, tensor, source)

    def expected(self) -> ExpectedTensors:
        return self._inner.expected()

    def optional(self) -> frozenset[tuple[str, str]]:
        return self._inner.optional()

    def problem(self, part: str, tensor: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        return self._inner.problem(part, tensor, shape, dtype)

    def fill_random(self, source: RandomValues) -> None:
        self._inner.fill_random(source)

    @torch.inference_mode()
    def finish(self) -> None:
        self._inner.finish()
        self._tile_rows = choose_tile(self._inner.apply, self._num_inputs, self._dtype, self._path)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return in_row_tiles(self._inner.apply, x, self._tile_rows)

    def num_bytes(self) -> int:
        return self._inner.num_bytes()


class TiledScheme:
    """A scheme whose linears are all multiplied by tiles of rows."""

    def __init__(self, inner: QuantScheme) -> None:
        self._inner = inner
        self.fused_experts_are_packed = inner.fused_experts_are_packed

    def linear_method(self, path: str) -> LinearMethod:
        return TiledLinear(self._inner.linear_method(path), path)
