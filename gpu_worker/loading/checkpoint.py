"""Opens any checkpoint, and holds the model builder to it: no tensor is missing, and none is left over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.safetensors_reader import SafetensorsReader
from gpu_worker.loading.tensor_source import CheckpointError, TensorIndex, TensorInfo, TensorSource
from gpu_worker.loading.weight_files import gguf_in

TIED_HEAD = "lm_head.weight"
MAX_NAMES_IN_MESSAGE = 5

# Buffers that old versions of transformers saved: computed from the config, never loaded.
_IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|attn\.masked_bias)")

# Ends of names that come with packed weights alone.
_OF_PACKED = re.compile(r"\.(qweight|qzeros|weight_packed|weight_scale(_inv)?|SCB|absmax|_weight_qdata|W_q)$")


class Checkpoint(TensorSource, Protocol):
    """A `TensorSource` that is a context manager as well."""

    def __enter__(self) -> Checkpoint: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def open_checkpoint(path: Path) -> Checkpoint:
    """The reader for a model directory (of safetensors, or with `model.gguf`) or for a file of these, all validated.

    Raises:
        CheckpointError: nothing there that can be read, or it is damaged.
    """
    if not path.exists():
        raise CheckpointError(path, "does not exist", advice="check the path")
    if path.is_file() and path.suffix == ".gguf":
        return GgufReader(path)
    packed = gguf_in(path)
    return GgufReader(packed) if packed is not None else SafetensorsReader(path)


class StrictReader:
    """Reads a checkpoint for a model that expects certain tensors, no more and no less.

    Names and shapes are compared when it is made, before any tensor is read. Used as a context manager it also
    checks at the end that everything expected was in fact read.

    Args:
        source: the checkpoint.
        expected: the names the model loads, each with its whole (unsharded) shape, or None where the format decides it.
        tied_head: the output head shares the embedding's weights, so `lm_head.weight` may be there and is not needed.
        optional: names that the model reads when they are there.
        ignored: names that somebody else reads.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape; the message names them.
    """

    def __init__(
        self,
        source: TensorSource,
        expected: Mapping[str, tuple[int, ...] | None],
        *,
        tied_head: bool = False,
        optional: Iterable[str] = (),
        ignored: Iterable[str] = (),
    ) -> None:
        self._source = source
        self._optional = frozenset(optional)
        left_out = set(ignored) | ({TIED_HEAD} if tied_head and TIED_HEAD not in expected else set())
        self._infos = {
            info.name: info
            for info in source.names()
            if info.name not in left_out and not _IGNORED.fullmatch(info.name)
        }
        self._unread = set(self._infos)
        self._check_names(expected)
        self._check_shapes(expected)

    def _check_names(self, expected: Mapping[str, tuple[int, ...] | None]) -> None:
        missing = [name for name in expected if name not in self._infos and name not in self._optional]
        left_over = [name for name in self._infos if name not in expected and name not in self._optional]
        if not missing and not left_over:
            return
        parts = []
        if missing:
            parts.append(f"lacks {_count(missing)} that the model needs: {_some(missing)}")
        if left_over:
            parts.append(f"has {_count(left_over)} that the model has no place for: {_some(left_over)}")
        advice = "config.json and the weights are not of the same model, or this variant is not supported"
        if any(_OF_PACKED.search(name) for name in left_over):
            advice = (
                "these weights are quantized in another way than the config says, or it says nothing: get the files of "
                "one release, config.json (quantization_config) or quantize_config.json among them"
            )
        raise CheckpointError(
            self._source.path,
            " and ".join(parts),
            tensor=missing[0] if missing else left_over[0],
            advice=advice,
        )

    def _check_shapes(self, expected: Mapping[str, tuple[int, ...] | None]) -> None:
        for name, shape in expected.items():
            info = self._infos.get(name)
            if info is not None and shape is not None and info.shape != tuple(shape):
                raise CheckpointError(
                    info.file,
                    f"has the shape {list(info.shape)}, the model's config asks for {list(shape)}",
                    tensor=name,
                    advice="config.json and the weights are not of the same model",
                )

    def names(self) -> Iterable[TensorInfo]:
        """The expected tensors, in file order."""
        return self._infos.values()

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def read(self, name: str, index: TensorIndex | None = None) -> torch.Tensor:
        """A tensor or a part of it; a rank may read its parts one by one."""
        if name not in self._infos:
            raise KeyError(f"the model asks for {name!r}, which it did not announce or which the checkpoint lacks")
        self._unread.discard(name)
        return self._source.read(name, index)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every expected tensor whole, in file order, one at a time."""
        for name in self._infos:
            yield name, self.read(name)

    def finish(self) -> None:
        """Raises `CheckpointError` if a tensor was expected and never read: the model's layers would hold garbage."""
        unread = [name for name in self._infos if name in self._unread]
        if unread:
            raise CheckpointError(
                self._source.path,
                f"the model announced {_count(unread)} that it never read: {_some(unread)}",
                tensor=unread[0],
                advice="this is a mistake in the model's name rules",
            )

    def __enter__(self) -> StrictReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.finish()


def _count(names: list[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def _some(names: list[str]) -> str:
    more = len(names) - MAX_NAMES_IN_MESSAGE
    return ", ".join(names[:MAX_NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
