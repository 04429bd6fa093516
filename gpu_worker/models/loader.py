"""Builds a model from its directory: config, layers, then weights streamed from the checkpoint into them.

Every tensor goes from the file into its place in one copy, cut to this rank's share, and a layer is brought into its
final layout as soon as its last tensor has come. Host memory peaks at the model plus about one layer's tensors.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import structlog
import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from gpu_worker.device import return_freed_memory
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.weighted import Weighted
from gpu_worker.loading.bitsandbytes_source import BitsAndBytesSource
from gpu_worker.loading.checkpoint import TIED_HEAD, CheckpointError, StrictReader, open_checkpoint
from gpu_worker.loading.dequantized import DequantizedSource
from gpu_worker.loading.gguf_packed import PackedGgufSource
from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.kv_scales import check_kv_scales, is_kv_scale, read_kv_scales
from gpu_worker.loading.stacked_experts import StackedExpertsSource
from gpu_worker.loading.tensor_source import TensorIndex, TensorInfo, TensorSource
from gpu_worker.loading.tied_head import check_tied_head
from gpu_worker.model_spec import ModelConfigError, ModelSpec
from gpu_worker.models.checkpoint_names import checkpoint_modules, path_template
from gpu_worker.models.family import LoadsItself, ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.registry import find_family, known_architectures
from gpu_worker.quant.api import OutputSpan
from gpu_worker.quant.bitsandbytes import METHOD as BITSANDBYTES
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.scheme import StoredModules, module_format, read_quantization

log = structlog.get_logger(__name__)

RANDOM_BLOCK_SIZE = 1 << 20
# Read between two times that freed memory goes back to the system.
_TRIM_AFTER_BYTES = 128 << 20
_OTHER_MODEL = "config.json and the weights are not of the same model"


def read_spec(directory: Path) -> tuple[ModelSpec, type[ModelFamily]]:
    """What the model in `directory` is, from its config.json alone.

    Raises:
        ModelConfigError: not there, not supported, or contradicting itself.
    """
    config = HfConfig.open(directory)
    architecture, family = _find_family(config)
    family = family.for_config(config)
    read_quantization(config)
    return family.read_config(config, architecture), family


def _find_family(config: HfConfig) -> tuple[str, type[ModelFamily]]:
    """Many repositories of architectures known here carry code for older transformers as well: that is not needed."""
    try:
        return find_family(config.architectures())
    except ModelConfigError:
        if not config.fields.get("auto_map"):
            raise
        raise config.error(
            "auto_map",
            f"asks to run the repository's own code for {', '.join(config.architectures()) or 'its architecture'}, "
            f"which is never done; architectures that need none: {', '.join(known_architectures())}",
        ) from None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a checkpoint tensor, or a span of it, goes."""

    path: str
    layer: Weighted
    part: str
    tensor: str
    shape: tuple[int, ...] | None
    fused: _FusedPart | None = None
    """None: the whole tensor is this place's."""

    def cut(self, whole: tuple[int, ...]) -> _Cut | None:
        """This place's span of a tensor of that shape; None: all of it.

        Raises:
            ValueError: the span begins or ends inside of a word or a block.
        """
        if self.fused is None or self.fused.span is None:
            return None
        axis, per_output = self.fused.span
        if len(whole) <= axis or whole[axis] == 1:
            return None  # one for all
        start, stop = (outputs * per_output for outputs in (self.fused.start, self.fused.stop))
        if self.fused.stop == self.fused.total:
            stop = Fraction(whole[axis])
        if start.denominator != 1 or stop.denominator != 1:
            raise ValueError(f"part {self.part!r} begins or ends inside of a stored word or block")
        return _Cut(axis, int(start), int(stop))


@dataclass(frozen=True, slots=True)
class _FusedPart:
    """Outputs `start` to `stop` of `total` that a checkpoint stores as one linear."""

    start: int
    stop: int
    total: int
    span: OutputSpan | None


@dataclass(frozen=True, slots=True)
class _Cut:
    axis: int
    start: int
    stop: int

    def shape_of(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        return (*whole[: self.axis], self.stop - self.start, *whole[self.axis + 1 :])


def checkpoint_places(model: ModelFamily) -> dict[str, list[_Place]]:
    """Checkpoint tensor name -> its places in the model, for every tensor that the model is made of.

    Raises:
        ModelConfigError: the family's name rules lack a layer.
    """
    places: dict[str, list[_Place]] = {}
    for path, layer in model.weighted():
        for (part, tensor), shape in layer.expected().items():
            prefix, together = _checkpoint_prefix(model, path, part)
            fused = None
            if together:
                sizes = [layer.num_outputs(one) for one in together]
                start = sum(sizes[: together.index(part)])
                fused = _FusedPart(start, start + layer.num_outputs(part), sum(sizes), layer.output_span(part, tensor))
            places.setdefault(f"{prefix}.{tensor}", []).append(_Place(path, layer, part, tensor, shape, fused))
    return places


def _checkpoint_prefix(model: ModelFamily, path: str, part: str) -> tuple[str, list[str]]:
    """The place's name in the checkpoint, and the parts that share it, in their order; none where it is one part's."""
    for parts, name in checkpoint_modules(model.name_rules, path).items():
        together = parts.split("+")
        if part in together:
            return name, together if len(together) > 1 else []
    raise ModelConfigError(f"{type(model).__name__} has no checkpoint name for {path_template(path)!r} part {part!r}")


def _whole_shape(places: list[_Place]) -> tuple[int, ...] | None:
    """What the checkpoint tensor behind these places must look like."""
    first, fused = places[0].shape, places[0].fused
    if first is None or fused is None or fused.span is None:
        return first
    axis = fused.span.axis
    size = sum(place.shape[axis] for place in places if place.shape is not None)
    return (*first[:axis], size, *first[axis + 1 :])


class _ServedTensors:
    """A checkpoint by the names of the rules, without the tensors that serving text does not need."""

    def __init__(self, source: TensorSource, family: type[ModelFamily], spec: ModelSpec) -> None:
        self._source = source
        skipped, unused = (
            re.compile(pattern or r"(?!)") for pattern in (family.skipped_tensors, family.unused_tensors(spec))
        )
        self.stored_names = {
            name: info.name
            for info in source.names()
            if not skipped.match(info.name) and not unused.match(name := family.canonical_name(info.name))
        }

    @property
    def path(self) -> Path:
        return self._source.path

    def names(self) -> Iterable[TensorInfo]:
        canonical = {stored: name for name, stored in self.stored_names.items()}
        return [replace(info, name=canonical[info.name]) for info in self._source.names() if info.name in canonical]

    def stored_name(self, name: str) -> str:
        return self.stored_names[name]

    def read(self, name: str, index: TensorIndex | None = None) -> torch.Tensor:
        return self._source.read(self.stored_names[name], index)

    def close(self) -> None:
        self._source.close()


@dataclass(frozen=True, slots=True)
class _MatchedCheckpoint:
    """A checkpoint whose tensors are all known to fit: names, shapes and element types."""

    source: TensorSource
    reader: StrictReader
    places: dict[str, list[_Place]]
    kv_scale_infos: tuple[TensorInfo, ...]

    def count_by_layer(self) -> dict[str, int]:
        """Tensors that each layer gets; optional ones that the checkpoint lacks are not among them."""
        return Counter(place.path for info in self.reader.names() for place in self.places[info.name])


@contextmanager
def _matched(model: ModelFamily, path: Path) -> Iterator[_MatchedCheckpoint]:
    """Open the checkpoint and hold every tensor against the model, before any is read."""
    places = checkpoint_places(model)
    checkpoint = open_checkpoint(path)
    try:
        source = _as_wanted(_ServedTensors(checkpoint, type(model), model.spec), checkpoint, path, places)
        infos = list(source.names())
        scales = tuple(info for info in infos if is_kv_scale(info.name) and info.name not in places)
        check_kv_scales(scales, model.spec.num_layers)
        hidden = {info.name for info in scales}
        expected = {name: _whole_shape(shared) for name, shared in places.items()}
        optional = {
            name
            for name, shared in places.items()
            if all((place.part, place.tensor) in place.layer.optional() for place in shared)
        }
        reader = StrictReader(
            source, expected, tied_head=model.spec.tie_word_embeddings, optional=optional, ignored=hidden
        )
        for info in reader.names():
            for place in places[info.name]:
                problem = _problem(place, info)
                if problem is not None:
                    raise CheckpointError(info.file, problem, tensor=info.name, advice=_OTHER_MODEL)
        yield _MatchedCheckpoint(source, reader, places, scales)
    finally:
        checkpoint.close()


def _problem(place: _Place, info: TensorInfo) -> str | None:
    """What is wrong with a stored tensor for one of its places."""
    try:
        cut = place.cut(info.shape)
    except ValueError as error:
        return str(error)
    shape = place.shape or (info.shape if cut is None else cut.shape_of(info.shape))
    return place.layer.problem(place.part, place.tensor, shape, info.dtype)


def _as_wanted(
    served: _ServedTensors, checkpoint: TensorSource, path: Path, places: Mapping[str, list[_Place]]
) -> TensorSource:
    """The checkpoint as the model's layers ask for it: packed where they keep packed weights, plain elsewhere."""
    if isinstance(checkpoint, GgufReader):
        return PackedGgufSource(checkpoint, served, served.stored_name, places.keys())
    if not path.is_dir() or not (path / "config.json").exists():
        return served
    names = frozenset(info.name for info in served.names())
    quant = read_quantization(HfConfig.open(path), names)
    if quant is None:
        return served
    plain = BitsAndBytesSource(served) if quant.method == BITSANDBYTES else served
    modules, stored = StoredModules(served.stored_names), frozenset(served.stored_names.values())

    def format_of(module: str) -> WeightFormat | None:
        return module_format(quant, module, modules.name_of(module), stored)

    shapes = {name: _whole_shape(shared) for name, shared in places.items()}
    return DequantizedSource(StackedExpertsSource(plain, shapes, format_of), format_of, places.keys())


def check_weights(model: ModelFamily, path: Path) -> None:
    """Whether the checkpoint at `path` fills `model`, which may be built on the meta device: no memory is taken.

    Raises:
        CheckpointError: damaged, or its tensors are not those of the config; names file and tensor.
    """
    if isinstance(model, LoadsItself):
        model.check_checkpoint(path)
        return
    with _matched(model, path) as matched:
        if model.spec.tie_word_embeddings:
            table = checkpoint_modules(model.name_rules, "embedding").get("", "")
            check_tied_head(matched.source, TIED_HEAD, f"{table}.weight")


def load_weights(model: ModelFamily, path: Path) -> None:
    """Fill `model` from the checkpoint at `path`.

    Raises:
        CheckpointError: damaged, or its tensors are not those of the config; names file and tensor.
    """
    if isinstance(model, LoadsItself):
        model.load_checkpoint(path)
        return
    with _matched(model, path) as matched:
        left = matched.count_by_layer()
        with matched.reader as reader:
            infos = list(reader.names())
            with _progress(sum(info.num_bytes for info in infos)) as progress:
                num_bytes_since = 0
                for info in infos:
                    if num_bytes_since > _TRIM_AFTER_BYTES:
                        num_bytes_since = 0
                        return_freed_memory()
                    num_bytes_since += info.num_bytes
                    for place in matched.places[info.name]:
                        place.layer.load(place.part, place.tensor, _StoredTensor.of(reader, info, place))
                        left[place.path] -= 1
                        if left[place.path] == 0:
                            place.layer.finish()
                    progress.advance(info.num_bytes)
        model.kv_scales = read_kv_scales(matched.source, matched.kv_scale_infos, model.spec.num_layers)
    model.finish()
    return_freed_memory()


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    """A checkpoint tensor, or the span of it that `cut` says."""

    reader: StrictReader
    name: str
    shape: tuple[int, ...]
    cut: _Cut | None = None

    @classmethod
    def of(cls, reader: StrictReader, info: TensorInfo, place: _Place) -> _StoredTensor:
        cut = place.cut(info.shape)
        return cls(reader, info.name, info.shape if cut is None else cut.shape_of(info.shape), cut)

    def read(self, index: TensorIndex | None = None) -> torch.Tensor:
        if self.cut is None:
            return self.reader.read(self.name, index)
        parts = [*(index or ()), *(slice(None) for _ in range(len(index or ()), self.cut.axis + 1))]
        asked = parts[self.cut.axis]
        stop = self.shape[self.cut.axis] if asked.stop is None else asked.stop
        parts[self.cut.axis] = slice(self.cut.start + (asked.start or 0), self.cut.start + stop)
        return self.reader.read(self.name, tuple(parts))


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


def fill_random(model: ModelFamily, directory: Path | None, seed: int) -> None:
    """Random weights (load_format dummy) for the config in `directory`, the same for the same seed."""
    if isinstance(model, LoadsItself) and directory is not None:
        model.fill_random_weights(_RandomBlock(seed, torch.device("cpu")), directory)
        return
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
