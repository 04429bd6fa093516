"""Builds a model from its directory: config, layers, then weights streamed from the checkpoint into them.

Every tensor goes from the file into its place in one copy, cut to this rank's share, and a layer is brought into its
final layout as soon as its last tensor has come. Host memory peaks at the model plus about one layer's tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog
import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.weighted import Weighted
from gpu_worker.loading.checkpoint import CheckpointError, StrictReader, open_checkpoint
from gpu_worker.loading.tensor_source import TensorIndex
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
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise config.error(
            "quantization_config", f"names quant_method {method!r}; only unquantized weights are supported"
        )
    return family.read_config(config, architecture), family


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one checkpoint tensor goes."""

    path: str
    layer: Weighted
    part: str
    tensor: str
    shape: tuple[int, ...] | None


def checkpoint_places(model: ModelFamily) -> dict[str, _Place]:
    """Checkpoint tensor name -> its place in the model, for every tensor that the model is made of.

    Raises:
        ModelConfigError: the family's name rules lack a layer.
    """
    places: dict[str, _Place] = {}
    for path, layer in model.weighted():
        for (part, tensor), shape in layer.expected().items():
            prefix = _checkpoint_prefix(model, path, part)
            places[f"{prefix}.{tensor}"] = _Place(path, layer, part, tensor, shape)
    return places


def _checkpoint_prefix(model: ModelFamily, path: str, part: str) -> str:
    pieces = path.split(".")
    number = next((piece for piece in pieces if piece.isdigit()), "")
    template = ".".join("{i}" if piece.isdigit() else piece for piece in pieces)
    try:
        return model.name_rules[template][part].replace("{i}", number)
    except KeyError as error:
        raise ModelConfigError(
            f"{type(model).__name__} has no checkpoint name for {template!r} part {part!r}"
        ) from error


def load_weights(model: ModelFamily, path: Path) -> None:
    """Fill `model` from the checkpoint at `path`.

    Raises:
        CheckpointError: damaged, or its tensors are not those of the config; names file and tensor.
    """
    places = checkpoint_places(model)
    left = _count_tensors(places)
    checkpoint = open_checkpoint(path)
    try:
        expected = {name: place.shape for name, place in places.items()}
        with StrictReader(checkpoint, expected, tied_head=model.spec.tie_word_embeddings) as reader:
            infos = list(reader.names())
            with _progress(sum(info.num_bytes for info in infos)) as progress:
                for info in infos:
                    place = places[info.name]
                    place.layer.load(place.part, place.tensor, _StoredTensor(reader, info.name))
                    left[place.path] -= 1
                    if left[place.path] == 0:
                        place.layer.finish()
                    progress.advance(info.num_bytes)
    finally:
        checkpoint.close()
    model.finish()


def _count_tensors(places: dict[str, _Place]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for place in places.values():
        counts[place.path] = counts.get(place.path, 0) + 1
    return counts


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    reader: StrictReader
    name: str

    def read(self, index: TensorIndex | None = None) -> torch.Tensor:
        return self.reader.read(self.name, index)


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
