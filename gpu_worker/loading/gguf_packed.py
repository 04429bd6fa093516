"""A GGUF file for layers that keep their blocks packed; all other tensors are decoded as ever."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.tensor_source import TensorIndex, TensorInfo, resolve_index

PACKED_SUFFIX = "_blocks"
"""`module.weight_blocks` are the packed rows, uint8 [N, row_bytes], of the matrix `module.weight`."""


class PackedGgufSource:
    """`reader` with packed rows where `wanted` asks for them."""

    def __init__(self, reader: GgufReader, wanted: Collection[str]) -> None:
        self._reader = reader
        self._infos: list[TensorInfo] = []
        self._packed: dict[str, tuple[int, int]] = {}
        for info in reader.names():
            packed_name = info.name + PACKED_SUFFIX
            if packed_name not in wanted:
                self._infos.append(info)
                continue
            kind = reader.stored_type(info.name)
            shape = (info.shape[0], info.shape[1] // kind.block_elements * kind.block_bytes)
            self._packed[packed_name] = shape
            self._infos.append(TensorInfo(packed_name, shape, torch.uint8, info.file))

    @property
    def path(self) -> Path:
        return self._reader.path

    def names(self) -> Iterable[TensorInfo]:
        return self._infos

    def read(self, name: str, index: TensorIndex | None = None) -> torch.Tensor:
        shape = self._packed.get(name)
        if shape is None:
            return self._reader.read(name, index)
        rows, columns = (slice(*bound) for bound in resolve_index(name, shape, index))
        return self._reader.read_packed(name.removesuffix(PACKED_SUFFIX), rows.start, rows.stop)[:, columns]

    def close(self) -> None:
        self._reader.close()
