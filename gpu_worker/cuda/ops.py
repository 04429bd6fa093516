"""`LayerOps` in Triton: what stands between a decoder's linears, one kernel each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from stepwire_kernels.activation import gated_activation, gated_activation_quantized
from stepwire_kernels.causal_conv import causal_conv
from stepwire_kernels.delta_runs import DeltaRuns
from stepwire_kernels.expert_routing import RouterLogits, choose_experts
from stepwire_kernels.expert_scaled import ScaledExpertWeights, mix_scaled_experts
from stepwire_kernels.experts import ExpertWeights, mix_experts, mix_packed_experts, mix_routed_experts
from stepwire_kernels.fused_linear import FusedTuning, NormInput, choose_fused, fused_linear
from stepwire_kernels.gated_choice import choose_gated
from stepwire_kernels.gated_delta import gated_delta
from stepwire_kernels.gated_heads import gate_heads, gated_norm, without_gates
from stepwire_kernels.gather import look_up_part
from stepwire_kernels.linear import linear
from stepwire_kernels.norm import add_rms_norm, add_rms_norm_quantized
from stepwire_kernels.split_k import allocate_linear_workspace
from stepwire_kernels.tile_linear import TileLinearTuning, tile_linear

from gpu_worker.attention.api import AttentionBackend
from gpu_worker.attention.triton_backend import DeviceStep, TritonAttention
from gpu_worker.attention.triton_latent import TritonLatentAttention
from gpu_worker.cuda.kernel_activations import KERNEL_ACTIVATIONS
from gpu_worker.cuda.routing import UnchosenRouting
from gpu_worker.layers.ops import (
    TORCH_OPS,
    AttentionHeads,
    DeltaWeights,
    PackedStack,
    ProductOfNorm,
    QuantizedRows,
    RowQuant,
    StackedExpertWeights,
    StepPositions,
)
from gpu_worker.layers.rope import RotaryTables
from gpu_worker.layers.routing import SIGMOID_SUM_EPS, Routing
from gpu_worker.model_spec import LatentSpec, MoeSpec

if TYPE_CHECKING:
    from gpu_worker.layers.norm import Norm
    from gpu_worker.parallel.shares import ParallelContext
    from gpu_worker.state_pool import LayerStates


class TritonOps:
    """Implements `LayerOps`. `pdl`: launch kernels before the ones ahead of them have drained (capability 9.0)."""

    stacks_experts = True
    fuses = True
    """Whether kernels are brought together where that measured faster; benchmarks switch it off to compare."""

    def __init__(self, device: torch.device, *, pdl: bool) -> None:
        self.pdl = pdl
        self._workspace = allocate_linear_workspace(device)

    def multiplies_plain(self, weight: torch.Tensor) -> bool:
        return True

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, weight, bias, workspace=self._workspace, pdl=self.pdl)

    def linear_into(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        # For so many rows that the library's product is the fastest.
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)

    def look_up_part(self, token_ids: torch.Tensor, table: torch.Tensor, first: int) -> torch.Tensor:
        return look_up_part(token_ids, table, first)

    def add_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, norm: Norm, sums: ParallelContext | None = None
    ) -> torch.Tensor:
        offset = getattr(norm, "weight_offset", None)
        if offset is None:  # a LayerNorm
            return TORCH_OPS.add_norm(x, residual, norm, sums)
        if x is None:
            return add_rms_norm(residual, None, norm.weight, norm.eps, weight_offset=offset, pdl=self.pdl)
        if sums is not None:
            normed = sums.all_reduce_add_norm(x, residual, norm.weight, norm.eps, offset)
            if normed is not None:
                return normed
            x = sums.all_reduce(x)
        # A sublayer's output is read here and nowhere else: its memory takes the norm.
        return add_rms_norm(x, residual, norm.weight, norm.eps, weight_offset=offset, out=x, pdl=self.pdl)

    def linear_of_norm(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm: Norm,
        weight: torch.Tensor,
        activation: str | None = None,
        *,
        keeps_normed: bool = False,
    ) -> ProductOfNorm | None:
        offset = getattr(norm, "weight_offset", None)
        if not self.fuses or offset is None:  # None: a LayerNorm
            return None
        tuning = self.fused_tuning(residual, weight, gated=activation is not None)
        if tuning is None:
            return None
        normed = torch.empty_like(residual) if keeps_normed else None
        product, total = fused_linear(
            residual if x is None else x,
            weight,
            norm=NormInput(None if x is None else residual, norm.weight, norm.eps, offset),
            activation=None if activation is None else KERNEL_ACTIVATIONS[activation],
            tuning=tuning,
            normed_out=normed,
            pdl=self.pdl,
        )
        return ProductOfNorm(product, total, normed)

    def fused_tuning(self, x: torch.Tensor, weight: torch.Tensor, *, gated: bool) -> FusedTuning | None:
        """How norm and product (and gate) are one launch; None: they are separate ones."""
        return choose_fused(x, weight, gated=gated)

    def gated_linear(self, x: torch.Tensor, weight: torch.Tensor, kind: str) -> torch.Tensor | None:
        tuning = self.gated_tuning(x, weight) if self.fuses else None
        if tuning is None:
            return None
        activation = KERNEL_ACTIVATIONS[kind]
        return tile_linear(x, weight, None, self._workspace, activation=activation, tuning=tuning, pdl=self.pdl)

    def gated_tuning(self, x: torch.Tensor, weight: torch.Tensor) -> TileLinearTuning | None:
        """How product and gate are one launch; None: they are separate ones."""
        return choose_gated(x, weight)

    def quantized_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, norm: Norm, quant: RowQuant
    ) -> QuantizedRows | None:
        offset = getattr(norm, "weight_offset", None)
        if not self.fuses or offset is None:  # None: a LayerNorm
            return None
        values, scales = add_rms_norm_quantized(
            residual if x is None else x,
            None if x is None else residual,
            norm.weight,
            norm.eps,
            quant.dtype,
            weight_offset=offset,
            static_scale=quant.static_scale,
            pdl=self.pdl,
        )
        return QuantizedRows(values, scales)

    def quantized_gate(self, gate_up: torch.Tensor, kind: str, quant: RowQuant) -> QuantizedRows | None:
        if not self.fuses:
            return None
        values, scales = gated_activation_quantized(
            gate_up, KERNEL_ACTIVATIONS[kind], quant.dtype, static_scale=quant.static_scale, pdl=self.pdl
        )
        return QuantizedRows(values, scales)

    def gated_activation(self, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
        return gated_activation(gate_up, KERNEL_ACTIVATIONS[kind], pdl=self.pdl)

    def activation(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        return TORCH_OPS.activation(x, kind)

    def choose_experts(self, logits: torch.Tensor, spec: MoeSpec, correction: torch.Tensor | None) -> Routing:
        is_sigmoid = spec.scoring == "sigmoid"
        sum_eps = SIGMOID_SUM_EPS if is_sigmoid else 0.0
        if spec.num_groups == 1:
            routed = RouterLogits(
                logits, spec.num_chosen, is_sigmoid, spec.renormalize, spec.scale, sum_eps, correction
            )
            return UnchosenRouting(routed, pdl=self.pdl)
        weights, experts = choose_experts(
            logits,
            spec.num_chosen,
            sigmoid=is_sigmoid,
            renormalize=spec.renormalize,
            scale=spec.scale,
            sum_eps=sum_eps,
            correction=correction,
            num_groups=spec.num_groups,
            num_chosen_groups=spec.num_chosen_groups,
            top_two=spec.group_score == "top2",
            pdl=self.pdl,
        )
        return Routing(weights, experts)

    def mix_experts(self, x: torch.Tensor, routing: Routing, experts: StackedExpertWeights) -> torch.Tensor:
        held = ExpertWeights(experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias)
        kind, whole, first = KERNEL_ACTIVATIONS[experts.activation], experts.num_experts, experts.first_expert
        if isinstance(routing, UnchosenRouting):
            return mix_routed_experts(
                x, routing.routed, held, kind, num_experts=whole, first_expert=first, pdl=self.pdl
            )
        return mix_experts(
            x, routing.weights, routing.experts, held, kind, num_experts=whole, first_expert=first, pdl=self.pdl
        )

    def mix_packed_experts(self, x: torch.Tensor, routing: Routing, experts: PackedStack) -> torch.Tensor:
        held, kind = experts.held, KERNEL_ACTIVATIONS[experts.activation]
        whole, first = experts.num_experts, experts.first_expert
        weights, chosen = routing.weights, routing.experts
        if isinstance(held, ScaledExpertWeights):
            return mix_scaled_experts(
                x, weights, chosen, held, kind, num_experts=whole, first_expert=first, pdl=self.pdl
            )
        return mix_packed_experts(x, weights, chosen, held, kind, num_experts=whole, first_expert=first, pdl=self.pdl)

    def attend_latent(
        self,
        query: torch.Tensor,
        cached: torch.Tensor,
        latent: LatentSpec,
        layer: int,
        positions: StepPositions,
        attention: AttentionBackend[Any],
    ) -> torch.Tensor:
        if not isinstance(attention, TritonLatentAttention):
            raise TypeError(f"TritonOps attends latently through TritonLatentAttention, not {type(attention).__name__}")
        attention.rotate_and_write(query, cached, layer, positions)
        return attention.run(query, None, None, layer).unflatten(-1, (-1, latent.kv_rank))

    def without_gates(self, columns: torch.Tensor, num_heads: int, head_dim: int) -> torch.Tensor:
        return without_gates(columns, num_heads, head_dim, pdl=self.pdl)

    def gate_heads(self, attended: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return gate_heads(attended, gates, pdl=self.pdl)

    def convolve(self, mixed: torch.Tensor, weights: DeltaWeights, states: LayerStates) -> torch.Tensor:
        return causal_conv(mixed, weights.conv, states.conv, weights.layout, _runs_of(states.step), pdl=self.pdl)

    def gated_delta_rule(
        self, qkv: torch.Tensor, pairs: torch.Tensor, weights: DeltaWeights, states: LayerStates
    ) -> torch.Tensor:
        return gated_delta(
            qkv,
            pairs,
            weights.log_rate,
            weights.decay_bias,
            states.matrices,
            weights.layout,
            _runs_of(states.step),
            pdl=self.pdl,
        )

    def gated_norm(self, attended: torch.Tensor, mixed: torch.Tensor, weights: DeltaWeights) -> torch.Tensor:
        norm = weights.norm
        return gated_norm(attended, mixed, norm.weight, norm.eps, weights.layout, pdl=self.pdl)

    def prepare_positions(self, tables: RotaryTables, positions: torch.Tensor, dtype: torch.dtype) -> StepPositions:
        return StepPositions(tables, positions, None)

    def attend(
        self, qkv: torch.Tensor, heads: AttentionHeads, positions: StepPositions, attention: AttentionBackend[Any]
    ) -> torch.Tensor:
        if not isinstance(attention, TritonAttention):
            raise TypeError(f"TritonOps writes KV through TritonAttention, not through {type(attention).__name__}")
        return attention.attend(qkv, heads, positions)


def _runs_of(step: DeviceStep) -> DeltaRuns:
    inputs = step.inputs
    return DeltaRuns(inputs.query_starts, inputs.kv_lens, inputs.run_rows, step.has_decodes, step.has_prefills)
