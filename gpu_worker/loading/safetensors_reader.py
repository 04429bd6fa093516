"""Reads a model directory (or one file) of safetensors, one tensor at a time.

Every header has been checked against its file before anything is read (`safetensors_headers`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gpu_worker.loading.safetensors_headers import read_headers
from gpu_worker.loading.tensor_source import CheckpointError, TensorIndex, TensorInfo, resolve_index

# A mapped file's pages count as this process's memory once touched. Mapping anew after this much keeps that share small
# beside the model, however large a shard is.
REMAP_AFTER_BYTES = 512 << 20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsReader:
    """The tensors of a directory with `model.safetensors`, with shards and an index, or of a single file.

    Raises:
        CheckpointError: at construction, when anything about the files is not as it must be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._infos = {
            entry.name: TensorInfo(entry.name, entry.shape, DTYPES[entry.dtype], entry.file)
            for entry in read_headers(path).values()
        }
        self._open_file: Path | None = None
        self._handle: Any = None
        self._bytes_through_handle = 0

    def names(self) -> Iterable[TensorInfo]:
        return list(self._infos.values())

    def read(self, name: str, index: TensorIndex | None = None) -> torch.Tensor:
        info = self._infos[name]
        bounds = resolve_index(name, info.shape, index)
        file = info.file
        try:
            handle = self._handle_for(file)
            view = handle.get_slice(name)
            # safetensors cannot slice a scalar, nor a tensor without elements
            whole = all(bound == (0, size) for bound, size in zip(bounds, info.shape, strict=True))
            tensor: torch.Tensor = handle.get_tensor(name) if whole else view[tuple(slice(*bound) for bound in bounds)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                file, f"cannot be read any more ({error})", tensor=name, advice="did it change while it was loaded?"
            ) from error
        self._bytes_through_handle += tensor.numel() * tensor.element_size()
        return tensor

    def close(self) -> None:
        self._handle = None
        self._open_file = None
        self._bytes_through_handle = 0

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _handle_for(self, file: Path) -> Any:
        """One mapping at a time: shards are read in order, and a kept mapping would keep its pages."""
        if self._open_file != file or self._bytes_through_handle >= REMAP_AFTER_BYTES:
            self.close()
            self._handle = safe_open(file, framework="pt", device="cpu")
            self._open_file = file
        return self._handle
