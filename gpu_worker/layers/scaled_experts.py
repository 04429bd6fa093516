"""Experts of 8-bit weights and scales, all of a layer's in one stack, for kernels that multiply by them as they are."""

from __future__ import annotations

from collections.abc import Iterator

import structlog
import torch
from stepwire_kernels.expert_scaled import MIN_GROUP, ScaledExpertWeights, ScaledStack

from gpu_worker.layers.expert_parts import expert_parts
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.mlp import check_activation
from gpu_worker.layers.ops import GATED_ACTIVATIONS, PackedStack
from gpu_worker.layers.routing import Routing
from gpu_worker.layers.weighted import Weighted
from gpu_worker.model_spec import MoeSpec
from gpu_worker.parallel.shares import ParallelError
from gpu_worker.quant.activations import ActivationQuant, StaticScale
from gpu_worker.quant.api import LinearMethod
from gpu_worker.quant.on_load import QuantizingLinear
from gpu_worker.quant.scaled_formats import ScaledFormat
from gpu_worker.quant.stored import LinearParts, StoredLinear
from gpu_worker.quant.weights import ScaledWeight

log = structlog.get_logger(__name__)


def can_stay_scaled(method: LinearMethod) -> bool:
    """Whether the grouped kernel multiplies by experts that are loaded by this method."""
    if isinstance(method, QuantizingLinear):
        return True
    kind = method.format if isinstance(method, StoredLinear) else None
    if not isinstance(kind, ScaledFormat):
        return False
    groups = [kind.block[1]] if kind.granularity == "block" else []
    if kind.activations is not None:
        if kind.activations.kind != kind.kind or not kind.activations.symmetric:
            return False
        groups += [kind.activations.group_size] if kind.activations.granularity == "group" else []
    return all(group >= MIN_GROUP and group & (group - 1) == 0 for group in groups)


def needs_float8(method: LinearMethod) -> bool:
    """Whether a kernel reads float8 numbers of it."""
    if isinstance(method, QuantizingLinear):
        return method.kind == "fp8"
    return isinstance(method, StoredLinear) and getattr(method.format, "kind", None) in ("float8", "nvfp4")


def activations_of(method: LinearMethod) -> ActivationQuant | None:
    """How a method quantizes inputs."""
    if isinstance(method, QuantizingLinear):
        return method.activations
    return method.format.activations if isinstance(method, StoredLinear) else None


class _Stack:
    """gate-up or down of all experts held here."""

    def __init__(self, name: str, num_experts: int, num_outputs: int, *, has_bias: bool, build: BuildContext) -> None:
        self._name, self._num_experts, self._build = name, num_experts, build
        self._values: torch.Tensor | None = None  # [experts, outputs, inputs]
        self._scales: list[torch.Tensor] = []
        self._blocks = (1, 1)
        self._bias = torch.zeros(num_experts, num_outputs, dtype=build.dtype, device=build.device) if has_bias else None
        self.static: torch.Tensor | None = None  # float32 [experts]

    def add(self, place: int, parts: LinearParts, bias: torch.Tensor | None) -> None:
        weights = [weight for weight, _ in parts if isinstance(weight, ScaledWeight)]
        whole = weights[0] if len(weights) == 1 else ScaledWeight.stack(weights)
        if whole.block_k < MIN_GROUP and not whole.is_per_output:
            raise ParallelError(
                f"{self._name}: a rank's share of the inputs cuts blocks of scales into pieces of {whole.block_k}: use "
                "another --tensor-parallel-size, or --enable-expert-parallel"
            )
        if self._values is None:
            shape = (self._num_experts, *whole.values.shape)
            self._values = torch.empty(shape, dtype=whole.values.dtype, device=self._build.device)
            self._scales = [whole.scales] * self._num_experts
        self._values[place].view(torch.uint8).copy_(whole.values.view(torch.uint8))
        self._scales[place], self._blocks = whole.scales, (whole.block_n, whole.block_k)
        self._add_static(place, [static for _, static in parts if static is not None])
        if self._bias is not None and bias is not None:
            self._bias[place] = bias

    def _add_static(self, place: int, statics: list[StaticScale]) -> None:
        if not statics:
            return
        if self.static is None:
            self.static = torch.zeros(self._num_experts, device=self._build.device)
        if any(not one.equals(statics[0]) for one in statics):
            log.warning("an expert's gate and up have input scales of their own: the larger is taken", layer=self._name)
        self.static[place] = torch.stack([one.scale for one in statics]).max()

    def take(self) -> ScaledStack:
        """All experts are there."""
        assert self._values is not None
        return ScaledStack(self._values, torch.stack(self._scales).contiguous(), *self._blocks, self._bias)

    def num_bytes(self) -> int:
        held = (*self._scales, *(tensor for tensor in (self._values, self._bias, self.static) if tensor is not None))
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


class ScaledExperts:
    """`activations`: how inputs are quantized, the same for all experts of a layer."""

    def __init__(
        self, hidden_size: int, moe: MoeSpec, path: str, activations: ActivationQuant | None, build: BuildContext
    ) -> None:
        check_activation(moe.activation, dict(GATED_ACTIVATIONS))
        self._ops, self._moe, self._activations = build.ops, moe, activations
        self.share = build.parallel.experts(moe.num_experts, moe.intermediate_size)
        held, inner = self.share.experts.size, self.share.intermediate.size
        self.gate_up = _Stack(f"{path}.gate_up", held, 2 * inner, has_bias=moe.expert_bias, build=build)
        self.down = _Stack(f"{path}.down", held, hidden_size, has_bias=moe.expert_bias, build=build)
        self._parts = expert_parts(hidden_size, moe, self.share, path, (self.gate_up, self.down), build)
        self._stacked: PackedStack | None = None

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield from self._parts.items()

    def apply(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """This rank's summand: x [num_tokens, hidden] -> [num_tokens, hidden]."""
        self._stacked = self._stacked or self._together()
        return self._ops.mix_packed_experts(x, routing, self._stacked)

    def _together(self) -> PackedStack:
        quant = self._activations
        held = ScaledExpertWeights(
            self.gate_up.take(),
            self.down.take(),
            quantizes=quant is not None,
            input_group=quant.group_size if quant is not None and quant.granularity == "group" else None,
            gate_up_static=self.gate_up.static,
            down_static=self.down.static,
        )
        return PackedStack(held, self._moe.activation, self._moe.num_experts, self.share.experts.start)
