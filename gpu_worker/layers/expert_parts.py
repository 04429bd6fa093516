"""Experts that a checkpoint stores each by itself, loaded as any other linear and then handed to a stack of all."""

from __future__ import annotations

from typing import Protocol

import torch

from gpu_worker.layers.experts import expert_shapes
from gpu_worker.layers.linear import BuildContext, Linear
from gpu_worker.layers.weighted import Elsewhere, Weighted
from gpu_worker.model_spec import MoeSpec
from gpu_worker.parallel.shares import ExpertShare, ParallelContext
from gpu_worker.quant.api import ExpectedTensors, OutputSpan, RandomValues, StoredTensor
from gpu_worker.quant.on_load import QuantizingLinear
from gpu_worker.quant.stored import LinearParts, SplitLinear, StoredLinear


class ExpertStack(Protocol):
    """One linear of all experts that this rank holds."""

    def add(self, place: int, parts: LinearParts, bias: torch.Tensor | None) -> None:
        """Take the place-th expert's parts (gate and up), which lie below each other, and their bias."""
        ...

    def num_bytes(self) -> int: ...


class StackedExpert(Weighted):
    """One linear of one expert: instead of multiplying by itself, it joins its stack."""

    def __init__(self, linear: Linear, stack: ExpertStack, place: int) -> None:
        assert isinstance(linear.method, StoredLinear | SplitLinear | QuantizingLinear)
        self._linear, self._method, self._stack, self._place = linear, linear.method, stack, place

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        self._linear.load(part, tensor, source)

    def expected(self) -> ExpectedTensors:
        return self._linear.expected()

    def optional(self) -> frozenset[tuple[str, str]]:
        return self._linear.optional()

    def problem(self, part: str, tensor: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        return self._linear.problem(part, tensor, shape, dtype)

    def num_outputs(self, part: str) -> int:
        return self._linear.num_outputs(part)

    def output_span(self, part: str, tensor: str) -> OutputSpan | None:
        return self._linear.output_span(part, tensor)

    def fill_random(self, source: RandomValues) -> None:
        self._linear.fill_random(source)

    def finish(self) -> None:
        parts = self._method.take_parts()
        self._stack.add(self._place, parts, self._method.bias)

    def num_bytes(self) -> int:
        # The first place stands for the whole stack.
        return self._stack.num_bytes() if self._place == 0 else 0


def expert_parts(
    hidden_size: int,
    moe: MoeSpec,
    share: ExpertShare,
    path: str,
    stacks: tuple[ExpertStack, ExpertStack],
    build: BuildContext,
) -> dict[str, Weighted]:
    """`.<expert>.gate_up` and `.<expert>.down` of every expert, held here or elsewhere, by name."""
    shapes = expert_shapes(hidden_size, share, bias=moe.expert_bias)
    whole_share = ParallelContext().experts(moe.num_experts, moe.intermediate_size)
    whole = expert_shapes(hidden_size, whole_share, bias=moe.expert_bias)
    parts: dict[str, Weighted] = {}
    for expert in range(moe.num_experts):
        is_held = share.experts.start <= expert < share.experts.stop
        for name, shape, other, stack in zip(("gate_up", "down"), shapes, whole, stacks, strict=True):
            part = f".{expert}.{name}"
            if is_held:
                parts[part] = StackedExpert(Linear(shape, path + part, build), stack, expert - share.experts.start)
            else:
                parts[part] = Elsewhere(Linear(other, path + part, build.elsewhere()))
    return parts
