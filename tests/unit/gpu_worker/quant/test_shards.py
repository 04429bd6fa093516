"""Linears of every format split over ranks: outputs side by side or summed are those of the whole linear."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpu_worker.layers.linear import BuildContext, Linear, RowParallelLinear, column_parallel
from gpu_worker.loading.tensor_source import TensorIndex
from gpu_worker.models.loader import read_spec
from gpu_worker.parallel.shares import ParallelContext, Share
from gpu_worker.quant.scheme import make_scheme
from tests.unit.gpu_worker.quant.paged_model import fixture

FORMATS = [
    "awq-g64",
    "gptq-g64-desc",
    "gptq-g32-asym-v2",
    "ct-w4a16-asym",
    "ct-fp8-dynamic",
    "ct-w8a8-int8-sq",
    "fp8-block",
]
# Small ones that tools wrote, which are in the repository; their groups are cut in two, not in three.
QUANT = Path(__file__).resolve().parents[3] / "fixtures" / "quant"
SMALL = [
    *("torchao/int4", "torchao/int8", "torchao/int8-groups", "torchao/int8-int4", "torchao/by-name", "torchao/float8"),
    *("mlx/mxfp4", "mlx/mxfp8", "mlx/nvfp4", "modelopt/fp8-blocks", "compressed_rotated"),
]
SPLITS = [(name, size) for name in FORMATS for size in (2, 3)] + [(name, 2) for name in SMALL]
# Input is quantized by rank: with a scale for each token, a rank's share has its own, finer one.
QUANTIZES_INPUT = {"ct-fp8-dynamic", "ct-w8a8-int8-sq", "fp8-block"}


def checkpoint(name: str) -> Path:
    return QUANT / name if name in SMALL else fixture(name)


@dataclass(frozen=True)
class Stored:
    """A checkpoint tensor that notes how much of it is read."""

    tensor: torch.Tensor
    read_elements: list[int]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, index: TensorIndex | None = None) -> torch.Tensor:
        part = self.tensor if index is None else self.tensor[tuple(index)]
        self.read_elements.append(part.numel())
        return part


def fill(linear: Linear, places: dict[str, str], directory: Path) -> int:
    """Load a linear from its modules; how many elements were read."""
    tensors = load_file(directory / "model.safetensors")
    read: list[int] = []
    for part, tensor in linear.expected():
        name = f"{places[part]}.{tensor}"
        if name in tensors:
            linear.load(part, tensor, Stored(tensors[name], read))
        else:
            assert (part, tensor) in linear.optional()
    linear.finish()
    return sum(read)


def build(directory: Path, parallel: ParallelContext) -> BuildContext:
    _, family = read_spec(directory)
    return BuildContext(parallel, make_scheme(directory, family.name_rules), torch.float32, torch.device("cpu"))


def column(directory: Path, parallel: ParallelContext) -> Linear:
    spec, _ = read_spec(directory)
    share = parallel.share(spec.intermediate_size, "width")
    parts = [("gate", share), ("up", share)]
    path = "layers.0.mlp.gate_up"
    return column_parallel(spec.hidden_size, parts, bias=False, path=path, build=build(directory, parallel))


def row(directory: Path, parallel: ParallelContext) -> Linear:
    spec, _ = read_spec(directory)
    share = parallel.share(spec.intermediate_size, "width")
    context = build(directory, parallel)
    return RowParallelLinear(share, spec.hidden_size, bias=False, path="layers.0.mlp.down", build=context, reduce=False)


PLACES = {name: f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")} | {"": "model.layers.0.mlp.down_proj"}


@pytest.mark.parametrize(("name", "size"), SPLITS)
def test_column_shards_side_by_side_are_the_whole(name: str, size: int) -> None:
    directory = checkpoint(name)
    whole = column(directory, ParallelContext())
    num_read = fill(whole, PLACES, directory)
    x = torch.randn(5, whole.shape.inputs.size, generator=torch.Generator().manual_seed(1))
    expected = whole.apply(x)
    gates, ups = [], []
    for rank in range(size):
        shard = column(directory, ParallelContext(rank, size))
        # Of blocks and words that a boundary cuts both sides read the whole, but never everything.
        assert fill(shard, PLACES, directory) < num_read / size * 1.2
        gate, up = shard.apply(x).chunk(2, dim=1)
        gates.append(gate)
        ups.append(up)
    torch.testing.assert_close(torch.cat(gates + ups, dim=1), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "size"), SPLITS)
def test_row_shards_add_up_to_the_whole(name: str, size: int) -> None:
    directory = checkpoint(name)
    whole = row(directory, ParallelContext())
    fill(whole, PLACES, directory)
    x = torch.randn(5, whole.shape.inputs.size, generator=torch.Generator().manual_seed(2))
    expected = whole.apply(x)
    total = torch.zeros_like(expected)
    for rank in range(size):
        shard = row(directory, ParallelContext(rank, size))
        fill(shard, PLACES, directory)
        width = shard.shape.inputs
        assert width == Share(rank * width.size, width.size, whole.shape.inputs.size)
        total += shard.apply(x[:, width.as_slice()])
    if name in QUANTIZES_INPUT:
        error = (total - expected).norm() / expected.norm()
        assert error < 0.05, "more than the rounding of quantized inputs"
    else:
        torch.testing.assert_close(total, expected, atol=2e-4, rtol=1e-4)
