"""Experts of quantized checkpoints whose weights stay packed, for kernels that go through them in one launch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import structlog
import torch
from stepwire_kernels.expert_packed import PackedExpertWeights
from stepwire_kernels.packed_weight import PackedWeight, unpack

from gpu_worker.layers.expert_parts import expert_parts
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.mlp import check_activation
from gpu_worker.layers.ops import GATED_ACTIVATIONS, PackedStack, StackedExpertWeights
from gpu_worker.layers.routing import Routing
from gpu_worker.layers.weighted import Weighted
from gpu_worker.model_spec import MoeSpec
from gpu_worker.parallel.shares import ParallelError
from gpu_worker.quant.affine_formats import AwqFormat, GptqFormat, PackQuantizedFormat
from gpu_worker.quant.api import ExpectedTensors, LinearMethod, RandomValues, StoredTensor, dtype_problem
from gpu_worker.quant.expert_stack import pack_expert, stack_experts
from gpu_worker.quant.float4_formats import Float4Format
from gpu_worker.quant.gguf_format import GgufFormat
from gpu_worker.quant.stored import LinearParts, SplitLinear, StoredLinear
from gpu_worker.quant.weights import Float4Weight, dequantized

log = structlog.get_logger(__name__)

PACKED_FORMATS = (AwqFormat, GptqFormat, PackQuantizedFormat, Float4Format, GgufFormat)
MXFP4_GROUP = 32
SCALE_DTYPES = (torch.uint8, torch.float8_e8m0fnu)


def can_stay_packed(method: LinearMethod) -> bool:
    """Whether grouped kernels read experts that are loaded by this method; those of their layer are held together."""
    if isinstance(method, SplitLinear):
        return all(can_stay_packed(part) for part in method.methods.values())
    return (
        isinstance(method, StoredLinear)
        and isinstance(method.format, PACKED_FORMATS)
        and method.format.activations is None
    )


class _Stack:
    """gate-up or down of all experts held here: packed, or dense where one of them cannot stay so."""

    def __init__(
        self, name: str, num_experts: int, num_outputs: int, num_parts: int, *, has_bias: bool, build: BuildContext
    ) -> None:
        self._name, self._num_outputs, self._num_parts, self._build = name, num_outputs, num_parts, build
        self._waiting: dict[int, PackedWeight | torch.Tensor] = {}
        self._num_experts = num_experts
        self.packed: PackedWeight | None = None
        self.dense: torch.Tensor | None = None  # [experts, outputs, inputs]
        self.bias = torch.zeros(num_experts, num_outputs, dtype=build.dtype, device=build.device) if has_bias else None

    def add(self, place: int, parts: LinearParts, bias: torch.Tensor | None) -> None:
        weights = [weight for weight, _ in parts]
        packed = pack_expert(weights)
        if packed is None:
            self._waiting[place] = torch.cat([dequantized(weight, self._build.dtype) for weight in weights])
        else:
            self._waiting[place] = packed
        if self.bias is not None and bias is not None:
            self.bias[place] = bias
        if len(self._waiting) == self._num_experts:
            self._close()

    def _close(self) -> None:
        ordered = [self._waiting[place] for place in range(self._num_experts)]
        self._waiting.clear()
        packed = [one for one in ordered if isinstance(one, PackedWeight)]
        if len(packed) == len(ordered):
            self.packed = stack_experts(packed)
            return
        log.warning("experts have no kernel in their format, and are held in the model's type", layer=self._name)
        self.dense = torch.stack([self._as_dense(one) if isinstance(one, PackedWeight) else one for one in ordered])

    def _as_dense(self, packed: PackedWeight) -> torch.Tensor:
        """One expert without the rows that fill gate's and up's up to whole blocks."""
        halves = unpack(packed).chunk(self._num_parts)
        size = self._num_outputs // self._num_parts
        return torch.cat([half[:size] for half in halves]).to(self._build.dtype)

    def make_dense(self) -> torch.Tensor:
        """In the model's type, whatever it was: [experts, outputs, inputs]."""
        if self.packed is not None:
            fields: dict[str, Any] = {
                name: value for name, value in vars(self.packed).items() if isinstance(value, torch.Tensor)
            }
            whole = self.packed

            def one(place: int) -> PackedWeight:
                own: dict[str, Any] = {name: value[place] for name, value in fields.items()}
                return replace(whole, **own)

            ones = (one(place) for place in range(self._num_experts))
            self.dense, self.packed = torch.stack([self._as_dense(one) for one in ones]), None
        assert self.dense is not None
        return self.dense

    def num_bytes(self) -> int:
        held = sum(one.numel() * one.element_size() for one in (self.dense, self.bias) if one is not None)
        return held + (0 if self.packed is None else self.packed.num_bytes())


class _StackedPair:
    """Both stacks of a layer, and what multiplies by them."""

    def __init__(self, hidden_size: int, moe: MoeSpec, path: str, build: BuildContext) -> None:
        check_activation(moe.activation, dict(GATED_ACTIVATIONS))
        self._ops, self._moe = build.ops, moe
        self.share = build.parallel.experts(moe.num_experts, moe.intermediate_size)
        held, inner = self.share.experts.size, self.share.intermediate.size
        self.gate_up = _Stack(f"{path}.gate_up", held, 2 * inner, 2, has_bias=moe.expert_bias, build=build)
        self.down = _Stack(f"{path}.down", held, hidden_size, 1, has_bias=moe.expert_bias, build=build)
        self._stacked: StackedExpertWeights | PackedStack | None = None

    def apply(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """This rank's summand: x [num_tokens, hidden] -> [num_tokens, hidden]."""
        stacked = self._stacked = self._stacked or self._together()
        if isinstance(stacked, PackedStack):
            return self._ops.mix_packed_experts(x, routing, stacked)
        return self._ops.mix_experts(x, routing, stacked)

    def _together(self) -> StackedExpertWeights | PackedStack:
        gate_up, down = self.gate_up, self.down
        activation, count, first = self._moe.activation, self._moe.num_experts, self.share.experts.start
        if gate_up.packed is not None and down.packed is not None:
            held = PackedExpertWeights(gate_up.packed, down.packed, gate_up.bias, down.bias)
            return PackedStack(held, activation, count, first)
        dense = gate_up.make_dense(), down.make_dense()
        return StackedExpertWeights(*dense, gate_up.bias, down.bias, activation, count, first)


class PackedExperts(_StackedPair):
    """Experts that the checkpoint stores each by itself."""

    def __init__(self, hidden_size: int, moe: MoeSpec, path: str, build: BuildContext) -> None:
        super().__init__(hidden_size, moe, path, build)
        self._parts = expert_parts(hidden_size, moe, self.share, path, (self.gate_up, self.down), build)

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield from self._parts.items()


class PackedFusedExperts(_StackedPair, Weighted):
    """GPT-OSS as it is published: all experts in one tensor of MXFP4 blocks, gate's and up's rows in turn."""

    def __init__(self, hidden_size: int, moe: MoeSpec, path: str, build: BuildContext) -> None:
        super().__init__(hidden_size, moe, path, build)
        self._hidden_size, self._device = hidden_size, build.device
        self._tensors: dict[str, list[torch.Tensor]] = {}
        inner = self.share.intermediate
        if inner.start % MXFP4_GROUP or inner.size % MXFP4_GROUP:
            raise ParallelError(
                f"inputs {inner.start} to {inner.stop} of {inner.total} are no whole mxfp4 groups of {MXFP4_GROUP}: "
                "use another --tensor-parallel-size, or --enable-expert-parallel"
            )

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "", self

    def expected(self) -> ExpectedTensors:
        count, hidden, inner = self._moe.num_experts, self._hidden_size, self._moe.intermediate_size
        return {
            ("", "gate_up_proj_blocks"): (count, 2 * inner, hidden // MXFP4_GROUP, MXFP4_GROUP // 2),
            ("", "gate_up_proj_scales"): (count, 2 * inner, hidden // MXFP4_GROUP),
            ("", "down_proj_blocks"): (count, hidden, inner // MXFP4_GROUP, MXFP4_GROUP // 2),
            ("", "down_proj_scales"): (count, hidden, inner // MXFP4_GROUP),
            ("", "gate_up_proj_bias"): (count, 2 * inner),
            ("", "down_proj_bias"): (count, hidden),
        }

    def problem(self, part: str, tensor: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        if tensor.endswith("_blocks"):
            return dtype_problem(dtype, (torch.uint8,))
        return dtype_problem(dtype, SCALE_DTYPES) if tensor.endswith("_scales") else dtype_problem(dtype)

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        held, inner = self.share.experts, self.share.intermediate
        groups = slice(inner.start // MXFP4_GROUP, inner.stop // MXFP4_GROUP)
        rows: list[torch.Tensor] = []
        for expert in range(held.start, held.stop):  # one at a time: a layer's experts are gigabytes
            index: tuple[slice, ...] = (slice(expert, expert + 1),)
            if tensor in ("down_proj_blocks", "down_proj_scales"):
                index += (slice(None), groups)
            stored = source.read(index)[0]
            if tensor.startswith("gate_up"):
                stored = torch.cat((stored[0::2][inner.as_slice()], stored[1::2][inner.as_slice()]))
            elif tensor == "down_proj_bias" and not self.share.adds_bias:
                stored = torch.zeros_like(stored)
            rows.append(stored.to(self._device, copy=True))
        self._tensors[tensor] = rows

    def fill_random(self, source: RandomValues) -> None:
        inner, held = self.share.intermediate.size, self.share.experts.size
        kind = Float4Format("mxfp4")
        for _ in range(held):
            for name, (outputs, inputs, fan_in) in {
                "gate_up_proj": (2 * inner, self._hidden_size, self._hidden_size),
                "down_proj": (self._hidden_size, inner, self._moe.intermediate_size),
            }.items():
                weight = kind.random(outputs, inputs, fan_in**-0.5, source, self._device)
                assert isinstance(weight, Float4Weight)
                # Scales are powers of two: the nearest below the wished standard deviation (that of codes is near 2.9).
                exponent = math.ceil(math.log2(2.9 * fan_in**0.5))
                self._tensors.setdefault(f"{name}_blocks", []).append(weight.packed)
                self._tensors.setdefault(f"{name}_scales", []).append(weight.scales - exponent)

    def finish(self) -> None:
        for name, stack in (("gate_up_proj", self.gate_up), ("down_proj", self.down)):
            blocks, scales = self._tensors.pop(f"{name}_blocks"), self._tensors.pop(f"{name}_scales")
            biases = self._tensors.pop(f"{name}_bias", None)
            for place in range(self.share.experts.size):
                exponents = scales[place]
                whole = Float4Weight(
                    blocks[place].flatten(1),
                    exponents if exponents.dtype == torch.uint8 else exponents.view(torch.uint8),
                    torch.ones(exponents.shape[0], device=self._device),
                    MXFP4_GROUP,
                )
                parts = _halves(whole) if stack is self.gate_up else [whole]
                stack.add(place, [(part, None) for part in parts], None if biases is None else biases[place])

    def num_bytes(self) -> int:
        return self.gate_up.num_bytes() + self.down.num_bytes()


def _halves(weight: Float4Weight) -> list[Float4Weight]:
    half = weight.num_outputs // 2
    return [
        Float4Weight(weight.packed[rows], weight.scales[rows], weight.row_divisors[rows], weight.group_size)
        for rows in (slice(0, half), slice(half, None))
    ]
