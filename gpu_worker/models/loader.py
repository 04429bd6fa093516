"""Builds a model from its directory: config, layers, then weights streamed from the checkpoint into them.

Every tensor goes from the file into its place in one copy, cut to this rank's share, and a layer is brought into its
final layout as soon as its last tensor has come. Host memory peaks at the model plus about one layer's tensors.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import structlog
import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.weighted import Weighted
from gpu_worker.loading.checkpoint import CheckpointError, StrictReader, open_checkpoint
from gpu_worker.loading.tensor_source import TensorIndex, TensorInfo, TensorSource
from gpu_worker.model_spec import ModelConfigError, ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.registry import find_family

log = structlog.get_logger(__name__)

RANDOM_BLOCK_SIZE = 1 << 20


def read_spec(directory: Path) -> tuple[ModelSpec, type[ModelFamily]]:
    """What the model in `directory` is, from its config.json alone.

    Raises:
        ModelConfigError: not there, not supported, or contradicting itself.
    """
    config = HfConfig.open(directory)
    architecture, family = find_family(config.architectures())
    quantization = config.fields.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if quantization and method not in family.quantized_storage:
        raise config.error(
            "quantization_config", f"names quant_method {method!r}; only unquantized weights are supported"
        )
    return family.read_config(config, architecture), family


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a checkpoint tensor, or a span of its rows, goes."""

    path: str
    layer: Weighted
    part: str
    tensor: str
    shape: tuple[int, ...] | None
    first_row: int | None = None
    """None: the whole tensor is this place's."""


def checkpoint_places(model: ModelFamily) -> dict[str, list[_Place]]:
    """Checkpoint tensor name -> its places in the model, for every tensor that the model is made of.

    Raises:
        ModelConfigError: the family's name rules lack a layer.
    """
    places: dict[str, list[_Place]] = {}
    for path, layer in model.weighted():
        for (part, tensor), shape in layer.expected().items():
            prefix, is_fused = _checkpoint_prefix(model, path, part)
            shared = places.setdefault(f"{prefix}.{tensor}", [])
            first_row = None
            if is_fused:
                first_row = sum(place.shape[0] for place in shared if place.shape is not None)
            shared.append(_Place(path, layer, part, tensor, shape, first_row))
    return places


def _checkpoint_prefix(model: ModelFamily, path: str, part: str) -> tuple[str, bool]:
    """The place's name in the checkpoint, and whether parts share it."""
    numbers = iter(("{i}", "{e}"))
    pieces = path.split(".")
    template = ".".join(next(numbers) if piece.isdigit() else piece for piece in pieces)
    found = [piece for piece in pieces if piece.isdigit()]
    for parts, name in model.name_rules.get(template, {}).items():
        if part in parts.split("+"):
            for placeholder, number in zip(("{i}", "{e}"), found, strict=False):
                name = name.replace(placeholder, number)
            return name, "+" in parts
    raise ModelConfigError(f"{type(model).__name__} has no checkpoint name for {template!r} part {part!r}")


def _whole_shape(places: list[_Place]) -> tuple[int, ...] | None:
    """What the checkpoint tensor behind these places must look like."""
    first = places[0].shape
    if first is None or places[0].first_row is None:
        return first
    return (sum(place.shape[0] for place in places if place.shape is not None), *first[1:])


class _ServedTensors:
    """A checkpoint by the names of the rules, without the tensors that serving text does not need."""

    def __init__(self, source: TensorSource, family: type[ModelFamily]) -> None:
        self._source = source
        skipped = re.compile(family.skipped_tensors) if family.skipped_tensors else None
        self._stored_names = {
            family.canonical_name(info.name): info.name
            for info in source.names()
            if skipped is None or not skipped.match(info.name)
        }

    @property
    def path(self) -> Path:
        return self._source.path

    def names(self) -> Iterable[TensorInfo]:
        canonical = {stored: name for name, stored in self._stored_names.items()}
        return [replace(info, name=canonical[info.name]) for info in self._source.names() if info.name in canonical]

    def read(self, name: str, index: TensorIndex | None = None) -> torch.Tensor:
        return self._source.read(self._stored_names[name], index)

    def close(self) -> None:
        self._source.close()


def load_weights(model: ModelFamily, path: Path) -> None:
    """Fill `model` from the checkpoint at `path`.

    Raises:
        CheckpointError: damaged, or its tensors are not those of the config; names file and tensor.
    """
    places = checkpoint_places(model)
    left = _count_tensors(places)
    checkpoint = open_checkpoint(path)
    try:
        expected = {name: _whole_shape(shared) for name, shared in places.items()}
        served = _ServedTensors(checkpoint, type(model))
        with StrictReader(served, expected, tied_head=model.spec.tie_word_embeddings) as reader:
            infos = list(reader.names())
            with _progress(sum(info.num_bytes for info in infos)) as progress:
                for info in infos:
                    for place in places[info.name]:
                        place.layer.load(place.part, place.tensor, _StoredTensor.of(reader, info.name, place))
                        left[place.path] -= 1
                        if left[place.path] == 0:
                            place.layer.finish()
                    progress.advance(info.num_bytes)
    finally:
        checkpoint.close()
    model.finish()


def _count_tensors(places: dict[str, list[_Place]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for shared in places.values():
        for place in shared:
            counts[place.path] = counts.get(place.path, 0) + 1
    return counts


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    """A checkpoint tensor, or the `num_rows` of it from `first_row` on."""

    reader: StrictReader
    name: str
    first_row: int = 0
    num_rows: int | None = None

    @classmethod
    def of(cls, reader: StrictReader, name: str, place: _Place) -> _StoredTensor:
        if place.first_row is None or place.shape is None:
            return cls(reader, name)
        return cls(reader, name, place.first_row, place.shape[0])

    def read(self, index: TensorIndex | None = None) -> torch.Tensor:
        if self.num_rows is None:
            return self.reader.read(self.name, index)
        rows, *others = index or (slice(None),)
        start, stop = rows.start or 0, self.num_rows if rows.stop is None else rows.stop
        return self.reader.read(self.name, (slice(self.first_row + start, self.first_row + stop), *others))


class _RandomBlock:
    """Fills tensors from one block of normal values, so that billions of weights take a second.

    A block is repeated from another offset for every tensor: good enough to compute with, useless as a model.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Drawn on the host, so that a seed means the same weights on every device; filled where the weights are.
        self._block = torch.randn(RANDOM_BLOCK_SIZE, generator=generator).to(device)
        self._offset = 0

    def fill(self, target: torch.Tensor, std: float) -> None:
        flat = target.view(-1)
        # An odd stride through the block: no two tensors of a model begin at the same value.
        self._offset = (self._offset + 7919) % RANDOM_BLOCK_SIZE
        block = (self._block.roll(-self._offset) * std).to(target.dtype)
        num_whole = flat.numel() // RANDOM_BLOCK_SIZE * RANDOM_BLOCK_SIZE
        flat[:num_whole].view(-1, RANDOM_BLOCK_SIZE).copy_(block)
        flat[num_whole:].copy_(block[: flat.numel() - num_whole])


def fill_random(model: ModelFamily, seed: int) -> None:
    """Random weights (load_format dummy), the same for the same seed."""
    random = _RandomBlock(seed, model.device)
    for _, layer in model.weighted():
        layer.fill_random(random)
        layer.finish()
    model.finish()


def build_model(
    directory: Path, spec: ModelSpec, family: type[ModelFamily], build: BuildContext, max_position: int
) -> ModelFamily:
    """The model with its weights from `directory`.

    Raises:
        CheckpointError: see `load_weights`.
    """
    model = family(spec, max_position, build)
    load_weights(model, directory)
    return model


class _Advance(Protocol):
    def advance(self, num_bytes: int) -> None: ...


class _LoggedProgress:
    """A line at every quarter, for logs."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._next = total, 0, 0.25

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._done >= self._next * self._total:
            log.info("loading weights", percent=round(100 * self._done / self._total), mib=self._done >> 20)
            self._next = self._done / self._total + 0.25


class _BarProgress:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("loading weights", total=total)

    def advance(self, num_bytes: int) -> None:
        self._progress.advance(self._task, num_bytes)


@contextmanager
def _progress(total: int) -> Iterator[_Advance]:
    """A bar on a terminal, lines otherwise."""
    if not sys.stderr.isatty():
        yield _LoggedProgress(total)
        return
    from rich.console import Console

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _BarProgress(progress, total)


__all__ = ["CheckpointError", "build_model", "checkpoint_places", "fill_random", "load_weights", "read_spec"]
