"""The container format of GGUF: metadata, tensor table, and reads of raw rows.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). Parsed here
and not by the `gguf` package because a damaged file must be refused with the tensor or key it is damaged at, and
because workers read GGUF files too and need not carry that package.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from gpu_worker.loading.gguf_blocks import GGML_TYPES, GgmlType
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.loading.weight_files import PART_NAME, parts_by_name

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS = "split.count", "split.no", "split.tensors.count"

_DOWNLOAD_ADVICE = "download or copy the file again"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # length, one character, type, the smallest value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # length, one character, dimensions, one size, type, offset


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor as the file has it. `shape` is outermost first, the reverse of the file's order."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GgmlType
    offset: int
    num_bytes: int
    file: Path
    """The one of a model's files that has it."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (the last dimension)."""
        return self.shape[-1] // self.ggml_type.block_elements * self.ggml_type.block_bytes

    @property
    def num_rows(self) -> int:
        """Rows of the last dimension, over all the dimensions before it."""
        return math.prod(self.shape[:-1])


class GgufFile:
    """The parsed head of one file, held open to read rows from; of a model in several files, the heads of all.

    Attributes:
        parts: the files, the first being that which was given.
        metadata: key to value; arrays as lists, floats with the shortest digits that give the same float32.
        tensors: name to tensor, in the order of their data.

    Raises:
        CheckpointError: at construction, when the file is damaged, truncated, or of a kind that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._streams: dict[Path, io.FileIO] = {}
        try:
            self.metadata, self.tensors = self._parse(path)
            self.parts = parts_of(path, self.metadata)
            for number, part in enumerate(self.parts[1:], start=1):
                metadata, tensors = self._parse(part)
                self._add_part(number, part, metadata, tensors)
            self._check_count()
        except BaseException:
            self.close()
            raise

    def _parse(self, path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        try:
            stream = self._streams[path] = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise CheckpointError(path, "does not exist", advice="check the path") from error
        except OSError as error:
            raise CheckpointError(path, f"cannot be read ({error.strerror})") from error
        if stream.seek(0, 2) == 0:
            raise CheckpointError(path, "is empty", advice=_DOWNLOAD_ADVICE)
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _HeadParser(path, view).parse()

    def _add_part(self, number: int, part: Path, metadata: dict[str, Any], tensors: dict[str, GgufTensor]) -> None:
        found = metadata.get(SPLIT_NUMBER, 0), metadata.get(SPLIT_COUNT, 1)
        if found != (number, len(self.parts)):
            raise CheckpointError(
                part,
                f"says that it is part {found[0] + 1} of {found[1]}, its name says another",
                advice=_DOWNLOAD_ADVICE,
            )
        for name in tensors:
            if name in self.tensors:
                raise CheckpointError(
                    part, f"is also in {self.tensors[name].file.name}", tensor=name, advice=_DOWNLOAD_ADVICE
                )
        self.tensors |= tensors

    def _check_count(self) -> None:
        count = self.metadata.get(SPLIT_TENSORS)
        if len(self.parts) > 1 and count is not None and count != len(self.tensors):
            raise CheckpointError(
                self.path,
                f"says that the parts have {count} tensors, and they have {len(self.tensors)}",
                advice=_DOWNLOAD_ADVICE,
            )

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor as they are stored: `[num_rows, row_bytes]` uint8."""
        tensor = self.tensors[name]
        stop = tensor.num_rows if stop is None else stop
        if not 0 <= start <= stop <= tensor.num_rows:
            raise IndexError(f"tensor {name!r} has {tensor.num_rows} rows, asked for {start} to {stop}")
        raw = torch.empty((stop - start, tensor.row_bytes), dtype=torch.uint8)  # [num_rows, row_bytes]
        target = memoryview(raw.numpy().data).cast("B") if raw.numel() else memoryview(b"")
        position = tensor.offset + start * tensor.row_bytes
        stream = self._streams[tensor.file]
        stream.seek(position)
        done = 0
        while done < len(target):
            count = stream.readinto(target[done:])
            if not count:
                raise CheckpointError(
                    tensor.file,
                    f"ends at byte {position + done:,}, in the middle of its data",
                    tensor=name,
                    advice="did the file change while it was loaded?",
                )
            done += count
        return raw

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def of_every_layer(value: Any) -> Any:
    """What a list with an entry for each layer says of all of them; `value` itself where they differ, or no list."""
    return value[0] if isinstance(value, list) and value and all(each == value[0] for each in value) else value


def parts_of(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """The files of a model of which `path` is the first, in their order.

    Raises:
        CheckpointError: it is not the first, is not named as one, or another is missing.
    """
    count, number = metadata.get(SPLIT_COUNT, 1), metadata.get(SPLIT_NUMBER, 0)
    if type(count) is not int or type(number) is not int or count <= 1:
        return [path]
    match = PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count or int(match["number"]) != number + 1:
        raise CheckpointError(
            path,
            f"is part {number + 1} of a model in {count} files, and its name does not say so",
            advice=f"give the files the names that they were published under: ...-00001-of-{count:05d}.gguf",
        )
    parts = parts_by_name(path)
    if number:
        raise CheckpointError(
            path, f"is part {number + 1} of a model in {count} files", advice=f"give the first of them: {parts[0].name}"
        )
    for one, part in enumerate(parts, start=1):
        if not part.exists():
            raise CheckpointError(part, f"this part ({one} of {count}) does not exist", advice=_DOWNLOAD_ADVICE)
    return parts


class _HeadParser:
    """Walks the head once, front to back; every read is checked against the end of the file."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self._path = path
        self._view = view
        self._size = len(view)
        self._position = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        num_tensors, num_keys = self._parse_preamble()
        metadata: dict[str, Any] = {}
        for number in range(num_keys):
            key = self._string(f"the name of metadata key {number}")
            if key in metadata:
                raise self._fail(f"has the metadata key {key!r} twice")
            metadata[key] = self._value(self._scalar("<I", f"the type of {key!r}"), key)
        infos = [self._tensor_info(number) for number in range(num_tensors)]
        return metadata, self._place(infos, self._alignment(metadata))

    def _parse_preamble(self) -> tuple[int, int]:
        magic = self._take(4, "the magic")
        if magic != MAGIC:
            raise CheckpointError(
                self._path, f"is no GGUF file: it begins with {magic!r} and not {MAGIC!r}", advice="check the path"
            )
        version = self._scalar("<I", "the version")
        if version not in SUPPORTED_VERSIONS:
            if version & 0xFFFF == 0:
                raise CheckpointError(self._path, "is big-endian", advice="get a little-endian version of the file")
            supported = " and ".join(str(number) for number in SUPPORTED_VERSIONS)
            raise CheckpointError(
                self._path, f"is of GGUF version {version}", advice=f"versions {supported} are read: convert it anew"
            )
        num_tensors = self._scalar("<Q", "the number of tensors")
        num_keys = self._scalar("<Q", "the number of metadata keys")
        if num_tensors * _MIN_TENSOR_BYTES + num_keys * _MIN_KEY_BYTES > self._size:
            raise self._fail(f"claims {num_tensors:,} tensors and {num_keys:,} keys, too many for {self._size:,} bytes")
        return num_tensors, num_keys

    def _fail(self, reason: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(self._path, reason, tensor=tensor, advice=_DOWNLOAD_ADVICE)

    def _take(self, num_bytes: int, what: str, tensor: str | None = None) -> bytes:
        end = self._position + num_bytes
        if end > self._size:
            raise self._fail(
                f"is truncated: {what} needs {num_bytes:,} bytes at {self._position:,}, it ends at {self._size:,}",
                tensor,
            )
        taken = self._view[self._position : end]
        self._position = end
        return taken

    def _scalar(self, layout: str, what: str, tensor: str | None = None) -> int:
        value: int = struct.unpack(layout, self._take(struct.calcsize(layout), what, tensor))[0]
        return value

    def _string(self, what: str) -> str:
        raw = self._take(self._scalar("<Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._fail(f"{what} is not UTF-8 ({error})") from error

    def _value(self, type_number: int, key: str) -> Any:
        what = f"metadata key {key!r}"
        if type_number == _STRING:
            return self._string(what)
        if type_number in _SCALARS:
            return self._numbers(type_number, 1, what)[0]
        if type_number != _ARRAY:
            raise self._fail(f"{what} has the unknown type {type_number}")
        element_type = self._scalar("<I", what)
        length = self._scalar("<Q", what)
        if element_type == _STRING:
            if length * 8 > self._size - self._position:
                raise self._fail(f"is truncated: {what} claims {length:,} strings")
            return [self._string(what) for _ in range(length)]
        if element_type in _SCALARS:
            return self._numbers(element_type, length, what)
        raise self._fail(f"{what} is an array of the unknown type {element_type}")

    def _numbers(self, type_number: int, count: int, what: str) -> list[Any]:
        dtype = _SCALARS[type_number]
        values = np.frombuffer(self._take(count * dtype.itemsize, what), dtype)
        if dtype == np.dtype("<f4") and count == 1:
            return [float(str(values[0]))]  # 1e-05 and not 9.999999747378752e-06, as the model's author wrote it
        return list(values.tolist())

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self._fail(f"has the alignment {alignment!r}, which is not a power of two")
        return alignment

    def _tensor_info(self, number: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(f"the name of tensor {number}")
        num_dimensions = self._scalar("<I", "the number of dimensions", name)
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._fail(f"has {num_dimensions} dimensions", name)
        sizes = struct.unpack(f"<{num_dimensions}Q", self._take(8 * num_dimensions, "its shape", name))
        type_number = self._scalar("<I", "its type", name)
        offset = self._scalar("<Q", "its offset", name)
        return name, tuple(reversed(sizes)), type_number, offset

    def _place(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, GgufTensor]:
        """Checks that every tensor lies within the file, by itself, and gives them in the order of their data."""
        data_start = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, type_number, offset in infos:
            if name in tensors:
                raise self._fail("is listed twice", name)
            if type_number not in GGML_TYPES:
                known = ", ".join(ggml_type.name for ggml_type in GGML_TYPES.values())
                raise CheckpointError(
                    self._path,
                    f"is of the unknown type {type_number}",
                    tensor=name,
                    advice=f"these types can be read: {known}",
                )
            ggml_type = GGML_TYPES[type_number]
            if 0 in shape or shape[-1] % ggml_type.block_elements:
                raise self._fail(
                    f"has the shape {list(shape)}, whose rows are not whole {ggml_type.name} blocks of "
                    f"{ggml_type.block_elements}",
                    name,
                )
            num_bytes = math.prod(shape) // ggml_type.block_elements * ggml_type.block_bytes
            end = data_start + offset + num_bytes
            if end > self._size:
                raise self._fail(
                    f"the file is truncated: its data ends at byte {end:,}, the file at {self._size:,}", name
                )
            if offset % alignment:
                raise self._fail(f"its offset {offset:,} is not a multiple of the alignment {alignment}", name)
            tensors[name] = GgufTensor(name, shape, ggml_type, data_start + offset, num_bytes, self._path)
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.num_bytes > after.offset:
                raise self._fail(f"its data overlaps that of {before.name!r}", after.name)
        return {tensor.name: tensor for tensor in ordered}
