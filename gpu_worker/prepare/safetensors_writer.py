"""Writes safetensors shards as a stream, a piece of a tensor at a time.

The library's `save_file` wants every tensor of a file in memory at once, which for a shard of 2 GB is 2 GB too many.
The format is simple enough to be written in order: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from gpu_worker.loading.safetensors_headers import INDEX_NAME, SINGLE_NAME
from gpu_worker.loading.safetensors_reader import DTYPES
from gpu_worker.loading.tensor_source import TensorInfo

MAX_SHARD_BYTES = 2_000_000_000
_HEADER_ALIGNMENT = 8
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Pieces = Callable[[TensorInfo], Iterable[torch.Tensor]]
"""Gives the consecutive pieces (along the first dimension) of a tensor, already in its dtype."""


def plan_shards(infos: Iterable[TensorInfo], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[list[TensorInfo]]:
    """Tensors in their order, cut so that no shard exceeds `max_shard_bytes` unless one tensor alone does."""
    shards: list[list[TensorInfo]] = []
    room = 0
    for info in infos:
        if not shards or info.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(info)
        room -= info.num_bytes
    return shards


def write_shards(
    directory: Path, shards: Sequence[Sequence[TensorInfo]], pieces: Pieces, advance: Callable[[int], None]
) -> list[str]:
    """Writes all shards, and their index if there is more than one; gives the names of the files."""
    if len(shards) == 1:
        names = [SINGLE_NAME]
    else:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, infos in zip(names, shards, strict=True):
        _write_shard(directory / name, infos, pieces, advance)
    if len(shards) == 1:
        return names
    index = {
        "metadata": {"total_size": sum(info.num_bytes for infos in shards for info in infos)},
        "weight_map": {info.name: name for name, infos in zip(names, shards, strict=True) for info in infos},
    }
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")
    return [*names, INDEX_NAME]


def _write_shard(file: Path, infos: Sequence[TensorInfo], pieces: Pieces, advance: Callable[[int], None]) -> None:
    with file.open("wb") as stream:
        stream.write(_header(infos))
        for info in infos:
            num_bytes = 0
            for piece in pieces(info):
                if piece.dtype != info.dtype:
                    raise ValueError(f"a piece of {info.name!r} is {piece.dtype} and not {info.dtype}")
                raw = piece.contiguous().flatten().view(torch.uint8).numpy()
                stream.write(memoryview(raw.data))
                num_bytes += raw.size
                advance(raw.size)
            if num_bytes != info.num_bytes:
                raise ValueError(f"the pieces of {info.name!r} are {num_bytes} bytes and not {info.num_bytes}")
        stream.flush()
        os.fsync(stream.fileno())


def _header(infos: Sequence[TensorInfo]) -> bytes:
    """The length and the JSON, padded with spaces so that the data begins aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for info in infos:
        end = position + info.num_bytes
        entries[info.name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
