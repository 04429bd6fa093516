"""Experts that a quantized checkpoint stores in one tensor a layer, read expert by expert.

`experts.gate_up_proj` is [experts, 2 * inner, hidden], gate before up, or the transpose of each; its scales lie beside
it, `experts.gate_up_proj_scale_inv` and so on, in the same order (Qwen3-VL-MoE, Mistral Small 4, Llama 4). Seen as
`experts.3.gate_proj.weight` with its own scale, a layer takes them like those that are stored one by one. MLX has
`switch_mlp.gate_proj`, every tensor of which has the experts in front.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpu_worker.loading.tensor_source import TensorIndex, TensorInfo, TensorSource, resolve_index
from gpu_worker.quant.formats import WeightFormat
from gpu_worker.quant.scaled_formats import ScaledFormat

EXPERTS = ".experts."
"""What stands before an expert's number, or before the name of a stack."""
_STACK = re.compile(r"(?P<experts>.+\.experts)\.(?P<projection>gate_up_proj|down_proj)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
SWITCH = ".switch_mlp."
SWITCH_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""An expert's parts in MLX, and what Mixtral calls them."""
# What a scale of a stack is called there, and beside a weight of its own.
_SCALES = {
    "_scale_inv": "weight_scale_inv",
    "_scale": "weight_scale",
    "_weight_scale": "weight_scale",
    "_activation_scale": "activation_scale",
    "_input_scale": "input_scale",
}


@dataclass(frozen=True, slots=True)
class _View:
    """One expert's part of a stack."""

    info: TensorInfo
    stack: TensorInfo
    expert: int
    start: int = 0
    """The first of its outputs; of a scale that is one number, its place among all of them."""
    is_transposed: bool = False

    def read(self, source: TensorSource, index: TensorIndex | None) -> torch.Tensor:
        if not self.info.shape:
            return source.read(self.stack.name).flatten()[self.start]
        rows, cols = (slice(*bound) for bound in resolve_index(self.info.name, self.info.shape, index))
        rows = slice(self.start + rows.start, self.start + rows.stop)
        one = slice(self.expert, self.expert + 1)
        if self.is_transposed:
            return source.read(self.stack.name, (one, cols, rows))[0].T.contiguous()
        return source.read(self.stack.name, (one, rows, cols))[0]


def is_in_plain_stack(module: str, tensor_names: Collection[str]) -> bool:
    """Whether an expert's linear is a part of a stack that has no scales."""
    experts, _, member = module.partition(EXPERTS)
    part = member.rpartition(".")[2]
    stack = next((f"{experts}{EXPERTS}{stack}" for stack, parts in _PARTS.items() if part in parts), "")
    return stack in tensor_names and not any(stack + suffix in tensor_names for suffix in _SCALES)


class StackedExpertsSource:
    """`source` with single experts in place of stacks that the model does not ask for.

    Args:
        expected: the names that the model asks for, each with its whole shape, or None where the format decides it.
        format_of: module name -> how it is stored.
    """

    def __init__(
        self,
        source: TensorSource,
        expected: Mapping[str, tuple[int, ...] | None],
        format_of: Callable[[str], WeightFormat | None],
    ) -> None:
        self._source = source
        infos = {info.name: info for info in source.names()}
        self._views: dict[str, _View] = {}
        hidden: set[str] = set()
        for info in infos.values():
            for view in _split_switch(info, expected):
                self._views[view.info.name] = view
                hidden.add(info.name)
            match = _STACK.fullmatch(info.name)
            if match is None or info.name in expected or len(info.shape) != 3:
                continue
            scales = {
                kind: infos[info.name + suffix] for suffix, kind in _SCALES.items() if info.name + suffix in infos
            }
            module = f"{match['experts']}.{{}}.{_PARTS[match['projection']][0]}"
            stored = format_of(module.format(0))
            shape = expected.get(f"{module.format(0)}.weight")
            is_known = isinstance(stored, ScaledFormat) or (stored is None and not scales)
            if not is_known or shape is None:
                continue
            scaled = stored if isinstance(stored, ScaledFormat) else None
            parts = _PARTS[match["projection"]]
            lies_across = any(_lies_across(infos, expected, match["experts"], projection) for projection in _PARTS)
            views = list(_split(match["experts"], parts, info, scales, scaled, shape, lies_across))
            if views:
                self._views |= {view.info.name: view for view in views}
                hidden |= {info.name, *(scale.name for scale in scales.values())}
        self._whole = [info for info in infos.values() if info.name not in hidden]

    @property
    def path(self) -> Path:
        return self._source.path

    def names(self) -> Iterable[TensorInfo]:
        return [*self._whole, *(view.info for view in self._views.values())]

    def read(self, name: str, index: TensorIndex | None = None) -> torch.Tensor:
        view = self._views.get(name)
        return self._source.read(name, index) if view is None else view.read(self._source, index)

    def close(self) -> None:
        self._source.close()


def _split_switch(stack: TensorInfo, expected: Mapping[str, tuple[int, ...] | None]) -> Iterator[_View]:
    """The experts' parts of a tensor of MLX; nothing for any other tensor."""
    before, marker, member = stack.name.partition(SWITCH)
    part, _, kind = member.partition(".")
    if not marker or part not in SWITCH_PARTS or len(stack.shape) != 3:
        return
    for expert in range(stack.shape[0]):
        for name in (part, SWITCH_PARTS[part]):
            info = replace(stack, name=f"{before}{EXPERTS}{expert}.{name}.{kind}", shape=stack.shape[1:])
            if info.name in expected:
                yield _View(info, stack, expert)


def _lies_across(
    infos: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...] | None], experts: str, projection: str
) -> bool:
    """Whether the shape of a stack says that it is transposed."""
    parts = _PARTS[projection]
    stack, shape = infos.get(f"{experts}.{projection}"), expected.get(f"{experts}.0.{parts[0]}.weight")
    return stack is not None and shape is not None and stack.shape[1:] != (len(parts) * shape[0], shape[1])


def _split(
    experts: str,
    parts: tuple[str, ...],
    stack: TensorInfo,
    scales: Mapping[str, TensorInfo],
    stored: ScaledFormat | None,
    shape: tuple[int, ...],
    is_transposed: bool,
) -> Iterator[_View]:
    """The parts of a stack, of which each has this shape; nothing where the stack does not consist of such parts.

    `is_transposed`: a square stack lies as the other one of its experts.
    """
    outputs, inputs = shape
    sizes = (len(parts) * outputs, inputs)
    straddles = stored is not None and stored.granularity == "block" and len(parts) > 1 and outputs % stored.block[0]
    are_numbers = {
        kind: stored is None or kind != stored.scale_name or stored.granularity == "tensor" for kind in scales
    }
    # One number for all, for each expert, or for each expert's gate and up.
    numbers = (1, stack.shape[0], stack.shape[0] * len(parts))
    fit = all(
        scale.num_elements in numbers if are_numbers[kind] else len(scale.shape) == 3 for kind, scale in scales.items()
    )
    if stack.shape[1:] != (sizes[::-1] if is_transposed else sizes) or straddles or not fit:
        return
    for expert in range(stack.shape[0]):
        for number, part in enumerate(parts):
            info = replace(stack, name=f"{experts}.{expert}.{part}.weight", shape=shape)
            yield _View(info, stack, expert, number * outputs, is_transposed)
            for kind, scale in scales.items():
                info = replace(scale, name=f"{experts}.{expert}.{part}.{kind}", shape=())
                if are_numbers[kind]:
                    place = (0, expert, expert * len(parts) + number)[numbers.index(scale.num_elements)]
                    yield _View(info, scale, expert, place)
                    continue
                # One an output may lie either way, whichever way the weight does (Llama 4).
                by_output = stored is not None and stored.granularity == "channel"
                lies_across = scale.shape[1] == 1 if by_output else is_transposed
                rows, cols = scale.shape[:0:-1] if lies_across else scale.shape[1:]
                rows //= len(parts)
                yield _View(replace(info, shape=(rows, cols)), scale, expert, number * rows, lies_across)
