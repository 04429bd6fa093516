"""A quantized checkpoint seen as plain weights, for layers that keep no packed ones (experts, tables).

`module.weight` is listed where the checkpoint has that module's packed tensors instead, and decoded to the model's type
when it is read, the asked part only. GPT-OSS's fused experts are seen as their bfloat16 release stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_worker.loading.tensor_source import TensorIndex, TensorInfo, TensorSource, resolve_index
from gpu_worker.parallel.shares import Share
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.weights import Float4Weight, dequantized

# Of rules only the names matter here.
ANY_SIZE = (1024, 1024)
BLOCKS, SCALES = "_blocks", "_scales"


@dataclass(frozen=True, slots=True)
class _Module:
    """One packed linear."""

    name: str
    stored: WeightFormat
    tensors: dict[str, TensorInfo]
    size: tuple[int, int]


class DequantizedSource:
    """`source` with plain weights in place of packed ones, for the names in `wanted`.

    Args:
        format_of: module name -> how the module is stored; None: plainly.
        wanted: the names that the model asks for.
        dtype: what the model computes in: no value is rounded to a narrower type on its way.
    """

    def __init__(
        self,
        source: TensorSource,
        format_of: Callable[[str], WeightFormat | None],
        wanted: Collection[str],
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._source, self._dtype = source, dtype
        self._infos = {info.name: info for info in source.names()}
        self._modules: dict[str, _Module] = {}
        self._experts: dict[str, tuple[TensorInfo, TensorInfo]] = {}
        hidden: set[str] = set()
        for name in wanted:
            hidden |= self._add_module(name, format_of, wanted) | self._add_experts(name)
        self._plain = [info for info in self._infos.values() if info.name not in hidden]

    def _add_module(
        self, name: str, format_of: Callable[[str], WeightFormat | None], wanted: Collection[str]
    ) -> set[str]:
        module, _, kind = name.rpartition(".")
        stored = format_of(module) if kind == "weight" else None
        if stored is None:
            return set()
        suffixes = stored.rules(*ANY_SIZE)
        tensors = {
            suffix: self._infos[f"{module}.{suffix}"] for suffix in suffixes if f"{module}.{suffix}" in self._infos
        }
        needed = [suffix for suffix, rule in suffixes.items() if not rule.optional]
        if any(suffix not in tensors for suffix in needed):
            return set()
        if all(f"{module}.{suffix}" in wanted for suffix in needed):
            return set()  # the layer takes the packed tensors themselves
        size = stored.size_of({suffix: info.shape for suffix, info in tensors.items()})
        self._modules[name] = _Module(module, stored, tensors, size)
        return {info.name for info in tensors.values()}

    def _add_experts(self, name: str) -> set[str]:
        blocks, scales = self._infos.get(name + BLOCKS), self._infos.get(name + SCALES)
        if blocks is None or scales is None or len(blocks.shape) != 4 or blocks.shape[:3] != scales.shape:
            return set()
        self._experts[name] = (blocks, scales)
        return {blocks.name, scales.name}

    @property
    def path(self) -> Path:
        return self._source.path

    def names(self) -> Iterable[TensorInfo]:
        listed = list(self._plain)
        for name, module in self._modules.items():
            file = next(iter(module.tensors.values())).file
            listed.append(TensorInfo(name, module.size, self._dtype, file))
        for name, (blocks, _) in self._experts.items():
            listed.append(TensorInfo(name, _expert_shape(blocks), self._dtype, blocks.file))
        return listed

    def read(self, name: str, index: TensorIndex | None = None) -> torch.Tensor:
        if name in self._modules:
            return self._read_module(self._modules[name], index)
        if name in self._experts:
            return self._read_experts(name, index)
        return self._source.read(name, index)

    def _read_module(self, module: _Module, index: TensorIndex | None) -> torch.Tensor:
        bounds = resolve_index(f"{module.name}.weight", module.size, index)
        rows, cols = (Share(start, stop - start, size) for (start, stop), size in zip(bounds, module.size, strict=True))
        tensors = {
            suffix: self._source.read(info.name, module.stored.index(suffix, info.shape, rows, cols) or None)
            for suffix, info in module.tensors.items()
        }
        return dequantized(module.stored.decode(tensors, rows, cols), self._dtype)

    def _read_experts(self, name: str, index: TensorIndex | None) -> torch.Tensor:
        """blocks [experts, outputs, inputs / 32, 16] -> [experts, inputs, outputs]."""
        blocks, scales = self._experts[name]
        experts, inputs, outputs = (slice(*bound) for bound in resolve_index(name, _expert_shape(blocks), index))
        decoded = [
            Float4Weight(
                self._source.read(blocks.name, (slice(one, one + 1), outputs))[0].flatten(1),
                self._source.read(scales.name, (slice(one, one + 1), outputs))[0].view(torch.uint8),
                torch.ones(outputs.stop - outputs.start),
                32,
            ).dequantize()
            for one in range(experts.start, experts.stop)
        ]
        return torch.stack(decoded)[:, :, inputs].transpose(1, 2).to(self._dtype)

    def close(self) -> None:
        self._source.close()


def _expert_shape(blocks: TensorInfo) -> tuple[int, ...]:
    experts, outputs, groups, num_bytes = blocks.shape
    return (experts, groups * num_bytes * 2, outputs)
