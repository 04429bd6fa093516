"""Builds a model from its directory: config, layers, then weights streamed from the checkpoint into them.

Every tensor goes from the file into its place in one copy, cut to this rank's share, and a layer is brought into its
final layout as soon as its last tensor has come. Host memory peaks at the model plus about one layer's tensors.
"""

from __future__ import annotations

import sys
from collections import Counter
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
from gpu_worker.loading.dequantized import DequantizedSource
from gpu_worker.loading.gguf_packed import PackedGgufSource
from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.kv_scales import is_kv_scale, read_kv_scales
from gpu_worker.loading.tensor_source import TensorIndex, TensorInfo, TensorSource
from gpu_worker.model_spec import ModelConfigError, ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.registry import find_family, known_architectures
from gpu_worker.quant.scheme import module_format, read_quantization

log = structlog.get_logger(__name__)

RANDOM_BLOCK_SIZE = 1 << 20


def read_spec(directory: Path) -> tuple[ModelSpec, type[ModelFamily]]:
    """What the model in `directory` is, from its config.json alone.

    Raises:
        ModelConfigError: not there, not supported, or contradicting itself.
    """
    config = HfConfig.open(directory)
    _refuse_remote_code(config)
    architecture, family = find_family(config.architectures())
    read_quantization(config)
    return family.read_config(config, architecture), family


def _refuse_remote_code(config: HfConfig) -> None:
    """Many repositories of architectures known here carry code for older transformers as well: that is not needed."""
    if config.fields.get("auto_map") and not set(config.architectures()) & set(known_architectures()):
        raise config.error(
            "auto_map",
            f"asks to run the repository's own code for {', '.join(config.architectures()) or 'its architecture'}, "
            f"which is never done; architectures that need none: {', '.join(known_architectures())}",
        )


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


@dataclass(frozen=True, slots=True)
class _MatchedCheckpoint:
    """A checkpoint whose tensors are all known to fit: names, shapes and element types."""

    source: TensorSource
    reader: StrictReader
    places: dict[str, _Place]
    kv_scale_infos: tuple[TensorInfo, ...]

    def count_by_layer(self) -> dict[str, int]:
        """Tensors that each layer gets; optional ones that the checkpoint lacks are not among them."""
        return Counter(self.places[info.name].path for info in self.reader.names())


@contextmanager
def _matched(model: ModelFamily, path: Path) -> Iterator[_MatchedCheckpoint]:
    """Open the checkpoint and hold every tensor against the model, before any is read."""
    places = checkpoint_places(model)
    checkpoint = open_checkpoint(path)
    try:
        source = _as_wanted(checkpoint, path, places)
        infos = list(source.names())
        scales = tuple(info for info in infos if is_kv_scale(info.name) and info.name not in places)
        hidden = {info.name for info in scales}
        expected = {name: place.shape for name, place in places.items()}
        optional = {name for name, place in places.items() if (place.part, place.tensor) in place.layer.optional()}
        reader = StrictReader(
            source, expected, tied_head=model.spec.tie_word_embeddings, optional=optional, ignored=hidden
        )
        for info in reader.names():
            place = places[info.name]
            problem = place.layer.problem(place.part, place.tensor, info.shape, info.dtype)
            if problem is not None:
                raise CheckpointError(
                    info.file, problem, tensor=info.name, advice="config.json and the weights are not of the same model"
                )
        yield _MatchedCheckpoint(source, reader, places, scales)
    finally:
        checkpoint.close()


def _as_wanted(checkpoint: TensorSource, path: Path, places: dict[str, _Place]) -> TensorSource:
    """The checkpoint as the model's layers ask for it: packed where they keep packed weights, plain elsewhere."""
    if isinstance(checkpoint, GgufReader):
        return PackedGgufSource(checkpoint, places.keys())
    if not path.is_dir() or not (path / "config.json").exists():
        return checkpoint
    names = frozenset(info.name for info in checkpoint.names())
    quant = read_quantization(HfConfig.open(path), names)
    if quant is None:
        return checkpoint
    return DequantizedSource(checkpoint, lambda module: module_format(quant, module, names), places.keys())


def check_weights(model: ModelFamily, path: Path) -> None:
    """Whether the checkpoint at `path` fills `model`, which may be built on the meta device: nothing is read.

    Raises:
        CheckpointError: damaged, or its tensors are not those of the config; names file and tensor.
    """
    with _matched(model, path):
        return


def load_weights(model: ModelFamily, path: Path) -> None:
    """Fill `model` from the checkpoint at `path`.

    Raises:
        CheckpointError: damaged, or its tensors are not those of the config; names file and tensor.
    """
    with _matched(model, path) as matched:
        left = matched.count_by_layer()
        with matched.reader as reader:
            infos = list(reader.names())
            with _progress(sum(info.num_bytes for info in infos)) as progress:
                for info in infos:
                    place = matched.places[info.name]
                    place.layer.load(place.part, place.tensor, _StoredTensor(reader, info.name, info.shape))
                    left[place.path] -= 1
                    if left[place.path] == 0:
                        place.layer.finish()
                    progress.advance(info.num_bytes)
        model.kv_scales = read_kv_scales(matched.source, matched.kv_scale_infos, model.spec.num_layers)
    model.finish()


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    reader: StrictReader
    name: str
    shape: tuple[int, ...]

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


__all__ = [
    "CheckpointError",
    "build_model",
    "check_weights",
    "checkpoint_places",
    "fill_random",
    "load_weights",
    "read_spec",
]
