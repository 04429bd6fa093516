"""What every checkpoint reader offers, and the error all of them raise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gpu_worker.errors import LoadError

if TYPE_CHECKING:
    # Whoever only asks whether a checkpoint is whole need not wait for it.
    import torch

TensorIndex = Sequence[slice]
"""One slice with step 1 for each leading dimension to cut; dimensions left out are taken whole."""


class CheckpointError(LoadError):
    """A checkpoint that cannot be used. The message names the file, the tensor (where there is one) and the reason."""

    def __init__(self, file: Path, reason: str, *, tensor: str | None = None, advice: str | None = None) -> None:
        self.file = file
        self.tensor = tensor
        self.reason = reason
        self.advice = advice
        where = f"{file}: tensor {tensor!r}" if tensor is not None else f"{file}"
        super().__init__(f"{where}: {reason}" + (f"; {advice}" if advice else ""))


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, known before any of its data is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor in `dtype` (for a packed file format: after unpacking)."""
        return self.num_elements * self.dtype.itemsize


class TensorSource(Protocol):
    """A checkpoint that has been validated: every tensor it lists can be read in full."""

    @property
    def path(self) -> Path: ...

    def names(self) -> Iterable[TensorInfo]:
        """Every tensor, in the order in which reading them touches the disk sequentially."""

    def read(self, name: str, index: TensorIndex | None = None) -> torch.Tensor:
        """The tensor, or the part of it that `index` cuts out.

        The tensor may be a view of a mapped file: copy it before writing to it, and drop it soon.

        Raises:
            KeyError: no tensor of this name.
            CheckpointError: the file changed since it was validated.
            IndexError: `index` does not fit the tensor's shape.
        """

    def close(self) -> None: ...


def iterate(source: TensorSource) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields `(name, tensor)` lazily, in file order, holding one tensor at a time."""
    for info in source.names():
        yield info.name, source.read(info.name)


def resolve_index(name: str, shape: tuple[int, ...], index: TensorIndex | None) -> tuple[tuple[int, int], ...]:
    """`index` as one `(start, stop)` for each dimension of `shape`.

    A slice past the end is an error and not, as in Python, a shorter result: a rank that asks for rows that a tensor
    does not have was given wrong sizes.
    """
    parts = tuple(index or ())
    if len(parts) > len(shape):
        raise IndexError(f"tensor {name!r} has {len(shape)} dimensions, the slice has {len(parts)}")
    bounds: list[tuple[int, int]] = []
    for axis, size in enumerate(shape):
        part = parts[axis] if axis < len(parts) else slice(None)
        start = 0 if part.start is None else part.start
        stop = size if part.stop is None else part.stop
        if part.step not in (None, 1) or not 0 <= start <= stop <= size:
            raise IndexError(f"tensor {name!r} has shape {list(shape)}: {part} does not fit its dimension {axis}")
        bounds.append((start, stop))
    return tuple(bounds)
