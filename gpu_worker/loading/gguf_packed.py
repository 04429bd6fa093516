"""A GGUF file for layers that keep their blocks packed; all other tensors are decoded as ever."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch

from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.tensor_source import TensorIndex, TensorInfo, TensorSource, resolve_index

PACKED_SUFFIX = "_blocks"
"""`module.weight_blocks` are the packed rows, uint8 [N, row_bytes], of the matrix `module.weight`."""


class PackedGgufSource:
    """`served` with packed rows where `wanted` asks for them.

    Args:
        reader: the file.
        served: the file's tensors as the model knows them: some renamed, some left out.
        stored_name: a tensor's name in `served` -> its name in `reader`.
        wanted: names that the model asks for, by those of `served`.
    """

    def __init__(
        self, reader: GgufReader, served: TensorSource, stored_name: Callable[[str], str], wanted: Collection[str]
    ) -> None:
        self._reader, self._served, self._stored_name = reader, served, stored_name
        self._infos: list[TensorInfo] = []
        self._packed: dict[str, tuple[int, int]] = {}
        for info in served.names():
            packed_name = info.name + PACKED_SUFFIX
            if packed_name not in wanted:
                self._infos.append(info)
                continue
            kind = reader.stored_type(stored_name(info.name))
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
            return self._served.read(name, index)
        rows, columns = (slice(*bound) for bound in resolve_index(name, shape, index))
        stored_name = self._stored_name(name.removesuffix(PACKED_SUFFIX))
        return self._reader.read_packed(stored_name, rows.start, rows.stop)[:, columns]

    def close(self) -> None:
        self._reader.close()
