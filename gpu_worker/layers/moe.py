"""Mixture of experts: router, experts and the shared expert of one layer.

Every rank holds a part of each expert (its share of the intermediate size), or, expert parallel, some experts whole; in
both cases a rank's output is a summand, and one all-reduce adds them up. On a CPU, and in formats that the grouped
kernels cannot read, experts are linears of their own; the GPU holds all of a layer in two stacks, plain, packed or
8-bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F

from gpu_worker.layers.experts import ExpertLinears, FusedExperts, JoinedExperts, StackedExperts
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.mlp import GatedMLP
from gpu_worker.layers.packed_experts import PackedExperts, PackedFusedExperts, can_stay_packed
from gpu_worker.layers.routing import Routing
from gpu_worker.layers.scaled_experts import ScaledExperts, activations_of, can_stay_scaled
from gpu_worker.layers.sublayer_input import SublayerInput
from gpu_worker.layers.weighted import PlainMatrix, Weighted
from gpu_worker.model_spec import ModelSpec, MoeSpec
from gpu_worker.quant.api import ExpectedTensors, QuantScheme, RandomValues, StoredTensor
from gpu_worker.quant.none import UnquantizedLinear

CORRECTION = "e_score_correction_bias"


ExpertForm = Literal["plain", "packed", "scaled"]


def expert_form(scheme: QuantScheme, path: str, num_experts: int) -> ExpertForm | None:
    """How grouped kernels read the experts under `path`; None: they do not, or not all of them in one way."""
    methods = [
        scheme.linear_method(f"{path}.{expert}.{name}") for name in ("gate_up", "down") for expert in range(num_experts)
    ]
    if all(isinstance(method, UnquantizedLinear) for method in methods):
        return "plain"
    if all(can_stay_packed(method) for method in methods):
        return "packed"
    formats = {getattr(method, "format", None) for method in methods}
    if all(can_stay_scaled(method) for method in methods) and len(formats) == 1:
        return "scaled"
    return None


class Router(Weighted):
    """Scores every expert; the same on all ranks. Sigmoid scores, and those that a bias is added to, are computed in
    float32, as in training."""

    def __init__(self, hidden_size: int, moe: MoeSpec, build: BuildContext) -> None:
        self._moe, self._ops = moe, build.ops
        dtype = torch.float32 if moe.scoring == "sigmoid" or moe.has_correction_bias else build.dtype
        self.weight = torch.empty(moe.num_experts, hidden_size, dtype=dtype, device=build.device)  # [experts, hidden]
        self.bias = self._vector(moe.router_bias, dtype, build.device)  # [experts]
        self.correction = self._vector(moe.has_correction_bias, torch.float32, build.device)  # [experts]

    def _vector(self, is_there: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        return torch.zeros(self._moe.num_experts, dtype=dtype, device=device) if is_there else None

    def _tensors(self) -> dict[str, torch.Tensor]:
        named = {"weight": self.weight, "bias": self.bias, CORRECTION: self.correction}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        target = self._tensors()[tensor]
        target.copy_(source.read().reshape(target.shape))

    def expected(self) -> ExpectedTensors:
        # Of the correction there may be one row (ERNIE).
        return {
            ("", name): None if name == CORRECTION else tuple(tensor.shape) for name, tensor in self._tensors().items()
        }

    def problem(self, part: str, tensor: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        if tensor == CORRECTION and shape not in ((self._moe.num_experts,), (1, self._moe.num_experts)):
            return f"has the shape {list(shape)}, the model's config asks for {[self._moe.num_experts]}"
        return super().problem(part, tensor, shape, dtype)

    def fill_random(self, source: RandomValues) -> None:
        source.fill(self.weight, std=self.weight.shape[1] ** -0.5)

    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def apply(self, x: SublayerInput) -> Routing:
        """x [num_tokens, hidden]."""
        logits = None
        if self.bias is None and x.residual.dtype == self.weight.dtype:
            logits = x.times(self.weight, keeps_rows=True)
        if logits is None:
            logits = self._ops.linear(x.rows().to(self.weight.dtype), self.weight, self.bias)
        # [num_tokens, num_experts]
        return self._ops.choose_experts(logits, self._moe, self.correction)


class SharedGate(PlainMatrix):
    """How much of the shared expert a token gets: sigmoid(x . w)."""

    def __init__(self, hidden_size: int, build: BuildContext) -> None:
        super().__init__(1, hidden_size, build.dtype, build.device)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, hidden] -> [num_tokens, 1]."""
        return F.linear(x, self.weight).sigmoid()


Experts = ExpertLinears | StackedExperts | PackedExperts | PackedFusedExperts | ScaledExperts


def make_experts(hidden_size: int, moe: MoeSpec, path: str, build: BuildContext) -> Experts:
    """As the checkpoint stores them and the operations multiply by them."""
    stacks = build.ops.stacks_experts
    if moe.storage != "each":
        if stacks and build.quant.fused_experts_are_packed:
            return PackedFusedExperts(hidden_size, moe, path, build)
        return (FusedExperts if moe.storage == "fused" else JoinedExperts)(hidden_size, moe, build)
    match expert_form(build.quant, path, moe.num_experts) if stacks else None:
        case "plain":
            return StackedExperts(hidden_size, moe, build)
        case "packed":
            return PackedExperts(hidden_size, moe, path, build)
        case "scaled":
            quant = activations_of(build.quant.linear_method(f"{path}.0.gate_up"))
            return ScaledExperts(hidden_size, moe, path, quant, build)
        case _:
            return ExpertLinears(hidden_size, moe, path, build)


class MixtureOfExperts:
    def __init__(self, spec: ModelSpec, moe: MoeSpec, path: str, build: BuildContext) -> None:
        self._parallel = build.parallel
        self._scales_inputs = moe.scales_inputs
        self._leaves_sums = build.leaves_sums
        self.router = Router(spec.hidden_size, moe, build)
        self.experts = make_experts(spec.hidden_size, moe, f"{path}.experts", build)
        self.shared: GatedMLP | None = None
        if moe.shared_intermediate_size:
            shared = replace(spec, activation=moe.activation, intermediate_size=moe.shared_intermediate_size)
            self.shared = GatedMLP(shared, f"{path}.shared", build, reduce=False)
        self.shared_gate = SharedGate(spec.hidden_size, build) if moe.has_shared_gate else None

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "router", self.router
        for name, part in self.experts.weighted():
            yield f"experts{name}", part
        if self.shared is not None:
            for name, part in self.shared.weighted():
                yield f"shared.{name}", part
        if self.shared_gate is not None:
            yield "shared_gate", self.shared_gate

    def apply(self, x: SublayerInput) -> torch.Tensor:
        """x [num_tokens, hidden] -> [num_tokens, hidden]."""
        routing = self.router.apply(x)
        rows = x.rows()
        if self._scales_inputs:
            scaled = rows * routing.weights.to(rows.dtype)
            mixed = self.experts.apply(scaled, Routing(torch.ones_like(routing.weights), routing.experts))
        else:
            mixed = self.experts.apply(rows, routing)
        if self.shared is not None:
            shared = self.shared.apply(x)
            if self.shared_gate is not None:
                shared = shared * self.shared_gate.apply(rows)
            mixed = mixed.add_(shared)
        return mixed if self._leaves_sums else self._parallel.all_reduce(mixed)
