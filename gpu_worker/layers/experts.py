"""The experts of one layer on one rank, in the three ways that plain weights are held and stored, and as linears of any
format. Packed ones in one stack: `packed_experts.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_worker.layers.linear import BuildContext, Linear
from gpu_worker.layers.mlp import check_activation
from gpu_worker.layers.ops import GATED_ACTIVATIONS, StackedExpertWeights
from gpu_worker.layers.routing import Routing
from gpu_worker.layers.weighted import Elsewhere, Weighted
from gpu_worker.model_spec import MoeSpec
from gpu_worker.parallel.shares import ExpertShare, ParallelContext, Share
from gpu_worker.quant.api import ExpectedTensors, LinearPart, LinearShape, RandomValues, StoredTensor


def expert_shapes(hidden_size: int, share: ExpertShare, *, bias: bool) -> tuple[LinearShape, LinearShape]:
    """gate-up and down of one expert on this rank."""
    inner = share.intermediate
    gate_up = LinearShape(
        (LinearPart("gate", inner, 0), LinearPart("up", inner, inner.size)), Share(0, hidden_size, hidden_size), bias
    )
    whole = Share(0, hidden_size, hidden_size)
    return gate_up, LinearShape((LinearPart("", whole, 0),), inner, bias, holds_bias=share.adds_bias)


def _plain_tensors(shape: LinearShape) -> ExpectedTensors:
    tensors: ExpectedTensors = {}
    for part in shape.parts:
        tensors[part.name, "weight"] = (part.outputs.total, shape.inputs.total)
        if shape.has_bias:
            tensors[part.name, "bias"] = (part.outputs.total,)
    return tensors


class ExpertLinears:
    """Every expert is two linears in whatever format the checkpoint has; those with work are computed one by one."""

    def __init__(self, hidden_size: int, moe: MoeSpec, path: str, build: BuildContext) -> None:
        check_activation(moe.activation, dict(GATED_ACTIVATIONS))
        self._ops, self._activation = build.ops, moe.activation
        share = build.parallel.experts(moe.num_experts, moe.intermediate_size)
        self._held = range(share.experts.start, share.experts.stop)
        self._shapes = expert_shapes(hidden_size, share, bias=moe.expert_bias)
        self._linears = {
            expert: self._build(expert, self._shapes, path, build)
            for expert in range(moe.num_experts)
            if expert in self._held
        }
        whole = expert_shapes(
            hidden_size, ParallelContext().experts(moe.num_experts, moe.intermediate_size), bias=moe.expert_bias
        )
        self._elsewhere = {
            expert: self._build(expert, whole, path, build.elsewhere())
            for expert in range(moe.num_experts)
            if expert not in self._held
        }

    @staticmethod
    def _build(
        expert: int, shapes: tuple[LinearShape, LinearShape], path: str, build: BuildContext
    ) -> tuple[Linear, Linear]:
        gate_up, down = shapes
        return Linear(gate_up, f"{path}.{expert}.gate_up", build), Linear(down, f"{path}.{expert}.down", build)

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        for expert in range(len(self._linears) + len(self._elsewhere)):
            if expert in self._linears:
                gate_up, down = self._linears[expert]
                yield f".{expert}.gate_up", gate_up
                yield f".{expert}.down", down
            else:
                for name, linear in zip(("gate_up", "down"), self._elsewhere[expert], strict=True):
                    yield f".{expert}.{name}", Elsewhere(linear)

    def apply(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """This rank's summand: x [num_tokens, hidden] -> [num_tokens, hidden]."""
        return routing.mix(x, self._held, self._apply_one)

    def _apply_one(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        gate_up, down = self._linears[self._held.start + expert]
        return down.apply(self._ops.gated_activation(gate_up.apply(rows), self._activation))


class _StackedPart(Weighted):
    """One expert's place in a stack."""

    def __init__(self, shape: LinearShape, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._shape, self._weight, self._bias = shape, weight, bias

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        place = self._shape.part(part)
        rows = slice(place.start, place.start + place.outputs.size)
        if tensor == "weight":
            self._weight[rows] = source.read((place.outputs.as_slice(), self._shape.inputs.as_slice()))
        elif self._bias is not None:
            taken = place.outputs.as_slice() if self._shape.holds_bias else slice(0, 0)
            self._bias[rows][: taken.stop - taken.start] = source.read((taken,))

    def expected(self) -> ExpectedTensors:
        return _plain_tensors(self._shape)

    def fill_random(self, source: RandomValues) -> None:
        source.fill(self._weight, std=self._shape.inputs.total**-0.5)

    def num_bytes(self) -> int:
        return self._weight.numel() * self._weight.element_size()


class StackedExperts:
    """All experts in two tensors, for kernels that go through them in one launch."""

    def __init__(self, hidden_size: int, moe: MoeSpec, build: BuildContext) -> None:
        check_activation(moe.activation, dict(GATED_ACTIVATIONS))
        self._ops, self._num_experts = build.ops, moe.num_experts
        self.share = build.parallel.experts(moe.num_experts, moe.intermediate_size)
        self._shapes = expert_shapes(hidden_size, self.share, bias=moe.expert_bias)
        held, inner = self.share.experts.size, self.share.intermediate.size

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=build.dtype, device=build.device)

        self.weights = StackedExpertWeights(
            gate_up=torch.empty(held, 2 * inner, hidden_size, dtype=build.dtype, device=build.device),
            down=torch.empty(held, hidden_size, inner, dtype=build.dtype, device=build.device),
            gate_up_bias=zeros(held, 2 * inner) if moe.expert_bias else None,
            down_bias=zeros(held, hidden_size) if moe.expert_bias else None,
            activation=moe.activation,
            num_experts=moe.num_experts,
            first_expert=self.share.experts.start,
        )

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        weights, experts = self.weights, self.share.experts
        stacks = (
            ("gate_up", self._shapes[0], weights.gate_up, weights.gate_up_bias),
            ("down", self._shapes[1], weights.down, weights.down_bias),
        )
        for expert in range(self._num_experts):
            for name, shape, weight, bias in stacks:
                if experts.start <= expert < experts.stop:
                    at = expert - experts.start
                    yield f".{expert}.{name}", _StackedPart(shape, weight[at], None if bias is None else bias[at])
                else:
                    yield f".{expert}.{name}", Elsewhere(_StackedPart(shape, weight[0], None))

    def apply(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """This rank's summand: x [num_tokens, hidden] -> [num_tokens, hidden]."""
        return self._ops.mix_experts(x, routing, self.weights)


class FusedExperts(StackedExperts, Weighted):
    """Experts that the checkpoint stores stacked and transposed too, gate and up interleaved (GPT-OSS).

    Its MXFP4 release reads as the bfloat16 one (`loading/dequantized.py`).
    """

    def __init__(self, hidden_size: int, moe: MoeSpec, build: BuildContext) -> None:
        super().__init__(hidden_size, moe, build)
        self._moe, self._hidden_size = moe, hidden_size

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "", self

    def expected(self) -> ExpectedTensors:
        count, hidden, inner = self._moe.num_experts, self._hidden_size, self._moe.intermediate_size
        return {
            ("", "gate_up_proj"): (count, hidden, 2 * inner),
            ("", "down_proj"): (count, inner, hidden),
            ("", "gate_up_proj_bias"): (count, 2 * inner),
            ("", "down_proj_bias"): (count, hidden),
        }

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        # One expert at a time: a layer's experts are gigabytes.
        for at in range(self.share.experts.size):
            expert = self.share.experts.start + at
            stored = source.read((slice(expert, expert + 1),))[0]
            self._load_expert(at, tensor, stored)

    def _load_expert(self, at: int, tensor: str, stored: torch.Tensor) -> None:
        weights, inner = self.weights, self.share.intermediate.as_slice()
        if tensor == "gate_up_proj_bias" and weights.gate_up_bias is not None:
            weights.gate_up_bias[at] = self._gate_then_up(stored)
        elif tensor == "down_proj_bias" and weights.down_bias is not None:
            if self.share.adds_bias:
                weights.down_bias[at] = stored
        elif tensor == "gate_up_proj":
            weights.gate_up[at] = self._gate_then_up(stored.T)
        elif tensor == "down_proj":
            weights.down[at] = stored.T[:, inner]

    def _gate_then_up(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows gate 0, up 0, gate 1, ... of one expert -> this rank's gates, then its ups."""
        inner = self.share.intermediate.as_slice()
        return torch.cat((rows[0::2][inner], rows[1::2][inner]))

    def fill_random(self, source: RandomValues) -> None:
        source.fill(self.weights.gate_up, std=self._hidden_size**-0.5)
        source.fill(self.weights.down, std=self._moe.intermediate_size**-0.5)

    def num_bytes(self) -> int:
        tensors = (self.weights.gate_up, self.weights.down, self.weights.gate_up_bias, self.weights.down_bias)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


class JoinedExperts(FusedExperts):
    """Experts that the checkpoint stores stacked, without biases, gate before up: as linears have them, or transposed.

    Releases of one model differ in that, and the shapes tell; where they do not, it is as linears have them.
    """

    def _outputs_first(self, tensor: str) -> tuple[int, ...]:
        count, hidden, inner = self._moe.num_experts, self._hidden_size, self._moe.intermediate_size
        return (count, 2 * inner, hidden) if tensor == "gate_up_proj" else (count, hidden, inner)

    def _is_outputs_first(self, tensor: str, shape: tuple[int, ...]) -> bool:
        return self._moe.storage != "transposed" and shape == self._outputs_first(tensor)

    def expected(self) -> ExpectedTensors:
        return {("", "gate_up_proj"): None, ("", "down_proj"): None}

    def problem(self, part: str, tensor: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        count, outputs, inputs = self._outputs_first(tensor)
        if not self._is_outputs_first(tensor, shape) and shape != (count, inputs, outputs):
            return f"has the shape {list(shape)}, the model's config asks for {[count, inputs, outputs]}"
        return super().problem(part, tensor, shape, dtype)

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        inner = self.share.intermediate.as_slice()
        for at in range(self.share.experts.size):
            expert = self.share.experts.start + at
            stored = source.read((slice(expert, expert + 1),))[0]
            rows = stored if self._is_outputs_first(tensor, source.shape) else stored.T
            if tensor == "gate_up_proj":
                self.weights.gate_up[at] = torch.cat([half[inner] for half in rows.chunk(2)])
            else:
                self.weights.down[at] = rows[:, inner]
