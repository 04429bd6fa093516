"""A checkpoint held against the model that it is to fill: names, shapes and element types, before a tensor is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
import torch

from gpu_worker.loading.checkpoint import CheckpointError, StrictReader, open_checkpoint
from gpu_worker.loading.dequantized import DequantizedSource
from gpu_worker.loading.gguf_packed import PackedGgufSource
from gpu_worker.loading.gguf_reader import GgufReader
from gpu_worker.loading.kv_scales import check_kv_scales, is_kv_scale
from gpu_worker.loading.stacked_experts import StackedExpertsSource
from gpu_worker.loading.tensor_source import TensorIndex, TensorInfo, TensorSource
from gpu_worker.loading.tied_head import has_own_head
from gpu_worker.model_spec import ModelSpec
from gpu_worker.models.checkpoint_names import checkpoint_modules
from gpu_worker.models.checkpoint_places import Place, checkpoint_places, whole_shape
from gpu_worker.models.family import LoadsItself, ModelFamily
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.served_config import PREDICTS_AHEAD
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.scheme import StoredModules, module_format, read_quantization
from gpu_worker.quant.sources import row_by_row

log = structlog.get_logger(__name__)

_AHEAD = re.compile(PREDICTS_AHEAD)
_OTHER_MODEL = "config.json and the weights are not of the same model"


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
            if not (skipped.match(info.name) or _AHEAD.match(info.name))
            and not unused.match(name := family.canonical_name(info.name))
        }
        if spec.tie_word_embeddings and spec.has_output_head:
            self._find_the_shared_table(*_shared_modules(family))

    def _find_the_shared_table(self, table: str, head: str) -> None:
        """Of a tensor that is both, some tools keep the head's name alone (`safetensors.torch.save_model`)."""
        if any(name.startswith(f"{table}.") for name in self.stored_names):
            return
        self.stored_names = {
            f"{table}.{name.removeprefix(f'{head}.')}" if name.startswith(f"{head}.") else name: stored
            for name, stored in self.stored_names.items()
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


def _shared_modules(family: type[ModelFamily]) -> tuple[str, str]:
    """What the table of embeddings and the output head are called in the checkpoint."""
    table, head = (checkpoint_modules(family.name_rules, path)[""] for path in ("embedding", "head"))
    return table, head


def spec_as_stored(spec: ModelSpec, family: type[ModelFamily], path: Path) -> ModelSpec:
    """`spec`, not tied where the checkpoint at `path` has a head of its own: it is served, as transformers 5 does.

    Tied, where it has none and the config says nothing of it: classes' defaults are not the same in all versions.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    if not spec.has_output_head or issubclass(family, LoadsItself):
        return spec
    checkpoint = open_checkpoint(path)
    try:
        table, head = _shared_modules(family)
        served = _ServedTensors(checkpoint, family, spec)
        if not spec.tie_word_embeddings:
            is_stored = any(name.startswith(f"{head}.") for name in served.stored_names)
            return spec if is_stored or _says_what_is_tied(path) else replace(spec, tie_word_embeddings=True)
        if not has_own_head(served, head, table):
            return spec
    finally:
        checkpoint.close()
    log.warning(
        "config.json ties the output head to the embeddings, and the checkpoint stores another one: that is served; "
        "set tie_word_embeddings to false to say so",
        head=head,
    )
    return replace(spec, tie_word_embeddings=False)


def _says_what_is_tied(path: Path) -> bool:
    if not (path / "config.json").exists():
        return True
    fields = HfConfig.open(path).fields
    parts = (fields, fields.get("text_config"), fields.get("thinker_config"))
    return any(isinstance(part, dict) and part.get("tie_word_embeddings") is not None for part in parts)


@dataclass(frozen=True, slots=True)
class MatchedCheckpoint:
    """A checkpoint whose tensors are all known to fit: names, shapes and element types."""

    source: TensorSource
    reader: StrictReader
    places: dict[str, list[Place]]
    kv_scale_infos: tuple[TensorInfo, ...]

    def count_by_layer(self) -> dict[str, int]:
        """Tensors that each layer gets; optional ones that the checkpoint lacks are not among them."""
        return Counter(place.path for info in self.reader.names() for place in self.places[info.name])


@contextmanager
def matched_checkpoint(model: ModelFamily, path: Path) -> Iterator[MatchedCheckpoint]:
    """Open the checkpoint and hold every tensor against the model, before any is read."""
    places = checkpoint_places(model)
    checkpoint = open_checkpoint(path)
    try:
        served = _ServedTensors(checkpoint, type(model), model.spec)
        source = _as_wanted(served, checkpoint, path, places, model.dtype)
        infos = list(source.names())
        scales = tuple(info for info in infos if is_kv_scale(info.name) and info.name not in places)
        check_kv_scales(scales, model.spec.num_layers)
        hidden = {info.name for info in scales}
        expected = {name: whole_shape(shared) for name, shared in places.items()}
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
        yield MatchedCheckpoint(source, reader, places, scales)
    finally:
        checkpoint.close()


def _problem(place: Place, info: TensorInfo) -> str | None:
    """What is wrong with a stored tensor for one of its places."""
    try:
        cut = place.cut(info.shape)
    except ValueError as error:
        return str(error)
    shape = place.shape or (info.shape if cut is None else cut.shape_of(info.shape))
    return place.layer.problem(place.part, place.tensor, shape, info.dtype)


def _as_wanted(
    served: _ServedTensors, checkpoint: TensorSource, path: Path, places: Mapping[str, list[Place]], dtype: torch.dtype
) -> TensorSource:
    """The checkpoint as the model's layers ask for it: packed where they keep packed weights, plain elsewhere."""
    if isinstance(checkpoint, GgufReader):
        return PackedGgufSource(checkpoint, served, served.stored_name, places.keys())
    if not path.is_dir() or not (path / "config.json").exists():
        return served
    names = frozenset(info.name for info in served.names())
    quant = read_quantization(HfConfig.open(path), names)
    shapes = {name: whole_shape(shared) for name, shared in places.items()}
    if quant is None:
        # Releases of one architecture have a layer's experts in one tensor, or each alone (Qwen3.5).
        return StackedExpertsSource(served, shapes, lambda module: None)
    plain = row_by_row(quant, served)
    modules, stored = StoredModules(served.stored_names), names | frozenset(served.stored_names.values())

    def format_of(module: str) -> WeightFormat | None:
        return module_format(quant, module, modules.name_of(module), stored)

    return DequantizedSource(StackedExpertsSource(plain, shapes, format_of), format_of, places.keys(), dtype)
