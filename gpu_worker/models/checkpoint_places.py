"""Where the tensors of a checkpoint go in a model: by a family's name rules, and within fused linears."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from gpu_worker.layers.weighted import Weighted
from gpu_worker.loading.checkpoint import StrictReader
from gpu_worker.loading.tensor_source import TensorIndex, TensorInfo
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.checkpoint_names import checkpoint_modules, path_template
from gpu_worker.models.family import ModelFamily
from gpu_worker.quant.api import OutputSpan


@dataclass(frozen=True, slots=True)
class Place:
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


def checkpoint_places(model: ModelFamily) -> dict[str, list[Place]]:
    """Checkpoint tensor name -> its places in the model, for every tensor that the model is made of.

    Raises:
        ModelConfigError: the family's name rules lack a layer.
    """
    places: dict[str, list[Place]] = {}
    for path, layer in model.weighted():
        for (part, tensor), shape in layer.expected().items():
            prefix, together = _checkpoint_prefix(model, path, part)
            fused = None
            if together:
                sizes = [layer.num_outputs(one) for one in together]
                start = sum(sizes[: together.index(part)])
                fused = _FusedPart(start, start + layer.num_outputs(part), sum(sizes), layer.output_span(part, tensor))
            places.setdefault(f"{prefix}.{tensor}", []).append(Place(path, layer, part, tensor, shape, fused))
    return places


def _checkpoint_prefix(model: ModelFamily, path: str, part: str) -> tuple[str, list[str]]:
    """The place's name in the checkpoint, and the parts that share it, in their order; none where it is one part's."""
    for parts, name in checkpoint_modules(model.name_rules, path).items():
        together = parts.split("+")
        if part in together:
            return name, together if len(together) > 1 else []
    raise ModelConfigError(f"{type(model).__name__} has no checkpoint name for {path_template(path)!r} part {part!r}")


def whole_shape(places: list[Place]) -> tuple[int, ...] | None:
    """What the checkpoint tensor behind these places must look like."""
    first, fused = places[0].shape, places[0].fused
    if first is None or fused is None or fused.span is None:
        return first
    axis = fused.span.axis
    size = sum(place.shape[axis] for place in places if place.shape is not None)
    return (*first[:axis], size, *first[axis + 1 :])


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A checkpoint tensor, or the span of it that `cut` says."""

    reader: StrictReader
    name: str
    shape: tuple[int, ...]
    cut: _Cut | None = None

    @classmethod
    def of(cls, reader: StrictReader, info: TensorInfo, place: Place) -> PlacedTensor:
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
