"""What a decoder computes between its linears: the seam between torch's own operations and fused kernels.

A decoder is one text for every device. It is built with a `LayerOps`: `TorchOps` here runs anywhere and is the
reference; `gpu_worker.cuda.ops.TritonOps` does the same with one kernel each, and `gpu_worker.cpu.ops.CpuOps` in
machine code for CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from gpu_worker.attention.api import AttentionBackend
from gpu_worker.layers import delta_rule
from gpu_worker.layers.delta_rule import DeltaLayout
from gpu_worker.layers.rope import RotaryTables, StepRotation
from gpu_worker.layers.routing import Routing, choose_experts
from gpu_worker.model_spec import LatentSpec, MoeSpec

if TYPE_CHECKING:
    from stepwire_kernels.expert_packed import PackedExpertWeights
    from stepwire_kernels.expert_scaled import ScaledExpertWeights

    from gpu_worker.layers.norm import Norm, RMSNorm
    from gpu_worker.parallel.shares import ParallelContext
    from gpu_worker.state_pool import LayerStates


@dataclass(frozen=True, slots=True)
class AttentionHeads:
    """One layer's heads on this rank; the norms are those that go over single heads with one weight for all."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_norm: RMSNorm | None = None
    key_norm: RMSNorm | None = None
    sinks: torch.Tensor | None = None  # float32 [num_heads]
    value_norm: RMSNorm | None = None
    keys_are_values: bool = False
    """A projection has no columns for values: they are its keys, before norm and rotation."""
    reads_cached: bool = False
    """A projection has queries alone: this step's keys and values are in the cache already."""

    @property
    def num_projected(self) -> int:
        """Heads of a token's projection: queries, keys, values."""
        if self.reads_cached:
            return self.num_heads
        return self.num_heads + (1 if self.keys_are_values else 2) * self.num_kv_heads


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """What a layer of the gated delta rule has beside its linears, of this rank's heads."""

    layout: DeltaLayout
    conv: torch.Tensor  # [channels, conv_width]
    log_rate: torch.Tensor  # float32 [value_heads]
    decay_bias: torch.Tensor  # float32 [value_heads]
    norm: RMSNorm


@dataclass(frozen=True, slots=True)
class StackedExpertWeights:
    """This rank's experts, one behind another: the `first_expert`-th of the model is the first here."""

    gate_up: torch.Tensor  # [experts, 2 * intermediate, hidden]: gate's rows, then up's
    down: torch.Tensor  # [experts, hidden, intermediate]
    gate_up_bias: torch.Tensor | None  # [experts, 2 * intermediate]
    down_bias: torch.Tensor | None  # [experts, hidden]
    activation: str
    num_experts: int
    """Of the whole model."""
    first_expert: int = 0


@dataclass(frozen=True, slots=True)
class PackedStack:
    """This rank's experts with packed or 8-bit weights, for operations that stack experts."""

    held: PackedExpertWeights | ScaledExpertWeights
    activation: str
    num_experts: int
    """Of the whole model."""
    first_expert: int = 0


@dataclass(frozen=True, slots=True)
class ProductOfNorm:
    """What one launch made of a residual, what joins it, a norm and a weight."""

    product: torch.Tensor  # [num_tokens, out], or the gated [num_tokens, out / 2]
    residual: torch.Tensor  # [num_tokens, hidden]: the sum, in a buffer of its own if anything joined
    normed: torch.Tensor | None = None  # [num_tokens, hidden], if it was asked for


@dataclass(frozen=True, slots=True)
class RowQuant:
    """What a linear makes of its input before it multiplies: 8 bits, with one scale a row."""

    dtype: torch.dtype
    static_scale: torch.Tensor | None = None
    """The checkpoint's scale for all rows; None: each row gets its own."""


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    values: torch.Tensor  # [num_tokens, columns]
    scales: torch.Tensor  # float32 [num_tokens, 1]


@dataclass(frozen=True, slots=True)
class StepPositions:
    """Where a step's tokens stand: what rotation needs, prepared once for all layers."""

    tables: RotaryTables
    positions: torch.Tensor  # [num_tokens]
    rotation: StepRotation | None
    """cos and sin of these positions; None where the kernel reads the tables itself."""


class LayerOps(Protocol):
    @property
    def stacks_experts(self) -> bool:
        """Whether `mix_experts` is one launch over all experts: their weights are then held together."""
        ...

    def multiplies_plain(self, weight: torch.Tensor) -> bool:
        """Whether `linear` wants this weight as it is: a copy in another layout would not be faster."""
        ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [num_tokens, in], weight [out, in] -> [num_tokens, out]."""
        ...

    def linear_into(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """`linear` into rows of a larger tensor, out [num_tokens, out]."""
        ...

    def look_up_part(self, token_ids: torch.Tensor, table: torch.Tensor, first: int) -> torch.Tensor:
        """token_ids [num_tokens] -> [num_tokens, hidden]: their rows of a table [num_held, hidden] that begins with row
        `first` of the vocabulary's; zeros for those that it lacks."""
        ...

    def add_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, norm: Norm, sums: ParallelContext | None = None
    ) -> torch.Tensor:
        """residual += x (None: nothing), in place; the norm of it as a new tensor [num_tokens, hidden].

        `sums`: x is one summand, and these ranks have the others. x may be overwritten.
        """
        ...

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
        """In one launch: norm(residual + x) times weight [out, in] (and act(gate) * up of that), and the sum.

        None: there is no such launch for these shapes, or separate ones are faster. Neither x nor residual is written.
        """
        ...

    def gated_linear(self, x: torch.Tensor, weight: torch.Tensor, kind: str) -> torch.Tensor | None:
        """act(gate) * up of x times weight [2 * out, in] in one launch; None: there is none, or two are faster."""
        ...

    def quantized_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, norm: Norm, quant: RowQuant
    ) -> QuantizedRows | None:
        """`add_norm` and what a quantized linear makes of it, in one launch; None: there is none, nothing is done."""
        ...

    def quantized_gate(self, gate_up: torch.Tensor, kind: str, quant: RowQuant) -> QuantizedRows | None:
        """`gated_activation` and what a quantized linear makes of it in one launch; None: there is none."""
        ...

    def gated_activation(self, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
        """act(gate) * up: [num_tokens, 2 * intermediate] -> [num_tokens, intermediate]; `kind` as in `hidden_act`."""
        ...

    def activation(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        """act(x), elementwise, as a new tensor."""
        ...

    def choose_experts(self, logits: torch.Tensor, spec: MoeSpec, correction: torch.Tensor | None) -> Routing:
        """Router logits [num_tokens, num_experts] -> each token's experts and their weights."""
        ...

    def mix_experts(self, x: torch.Tensor, routing: Routing, experts: StackedExpertWeights) -> torch.Tensor:
        """The weighted sum of each token's experts: x [num_tokens, hidden] -> [num_tokens, hidden]."""
        ...

    def mix_packed_experts(self, x: torch.Tensor, routing: Routing, experts: PackedStack) -> torch.Tensor:
        """`mix_experts` of packed weights; only where `stacks_experts`."""
        ...

    def prepare_positions(self, tables: RotaryTables, positions: torch.Tensor, dtype: torch.dtype) -> StepPositions: ...

    def attend_latent(
        self,
        query: torch.Tensor,
        cached: torch.Tensor,
        latent: LatentSpec,
        layer: int,
        positions: StepPositions,
        attention: AttentionBackend[Any],
    ) -> torch.Tensor:
        """Rotation of the last rope_dim columns, write into the KV cache, attention over its compressed vectors.

        query [num_tokens, heads, kv_rank + rope_dim] and cached [num_tokens, kv_rank + rope_dim] may be overwritten;
        returns [num_tokens, heads, kv_rank].
        """
        ...

    def attend(
        self, qkv: torch.Tensor, heads: AttentionHeads, positions: StepPositions, attention: AttentionBackend[Any]
    ) -> torch.Tensor:
        """Norms of heads, rotation, write into the KV cache, attention.

        qkv [num_tokens, heads.num_projected * head_dim], may be overwritten; returns
        [num_tokens, num_heads * head_dim].
        """
        ...

    def without_gates(self, columns: torch.Tensor, num_heads: int, head_dim: int) -> torch.Tensor:
        """columns [num_tokens, 2 * num_heads * head_dim + rest], each query head's query before its gate ->
        [num_tokens, num_heads * head_dim + rest] without the gates, as a new tensor."""
        ...

    def gate_heads(self, attended: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """attended [num_tokens, num_heads * head_dim] times sigmoid of gates [num_tokens, num_heads, head_dim], which
        may be strided; attended may be overwritten."""
        ...

    def convolve(self, mixed: torch.Tensor, weights: DeltaWeights, states: LayerStates) -> torch.Tensor:
        """SiLU of the short convolution of queries, keys and values; rows' last inputs are kept.

        mixed [num_tokens, columns] as the layout says -> float32, or mixed's dtype, [num_tokens, channels]: queries,
        keys, values.
        """
        ...

    def gated_delta_rule(
        self, qkv: torch.Tensor, pairs: torch.Tensor, weights: DeltaWeights, states: LayerStates
    ) -> torch.Tensor:
        """As `delta_rule.py` says; rows' matrices move on.

        qkv [num_tokens, channels], pairs [num_tokens, 2 * value_heads] as the layout says: what beta is the sigmoid of,
        and what the decay is made of. Returns float32 or qkv's dtype [num_tokens, value_heads, value_dim].
        """
        ...

    def gated_norm(self, attended: torch.Tensor, mixed: torch.Tensor, weights: DeltaWeights) -> torch.Tensor:
        """RMSNorm of every head times SiLU of its gate, which is in mixed.

        attended [num_tokens, value_heads, value_dim] -> [num_tokens, value_heads * value_dim] in mixed's dtype.
        """
        ...


def _silu_mul(gate_up: torch.Tensor, size: int) -> torch.Tensor:
    return F.silu(gate_up[:, :size]).mul_(gate_up[:, size:])


def _gelu_mul(gate_up: torch.Tensor, size: int) -> torch.Tensor:
    return F.gelu(gate_up[:, :size]).mul_(gate_up[:, size:])


def _gelu_tanh_mul(gate_up: torch.Tensor, size: int) -> torch.Tensor:
    return F.gelu(gate_up[:, :size], approximate="tanh").mul_(gate_up[:, size:])


SWIGLU_OAI_ALPHA = 1.702
SWIGLU_OAI_LIMIT = 7.0


def _swiglu_oai(gate_up: torch.Tensor, size: int) -> torch.Tensor:
    """GPT-OSS: (up + 1) * gate * sigmoid(1.702 * gate), both clamped."""
    gate = gate_up[:, :size].clamp(max=SWIGLU_OAI_LIMIT)
    up = gate_up[:, size:].clamp(-SWIGLU_OAI_LIMIT, SWIGLU_OAI_LIMIT)
    return torch.sigmoid(gate * SWIGLU_OAI_ALPHA).mul_(gate).mul_(up + 1)


# Names as `hidden_act` has them, and one that has no name there.
GATED_ACTIVATIONS = {
    "silu": _silu_mul,
    "swish": _silu_mul,
    "gelu": _gelu_mul,
    "gelu_pytorch_tanh": _gelu_tanh_mul,
    "gelu_new": _gelu_tanh_mul,
    "swiglu_oai": _swiglu_oai,
}


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "relu": F.relu,
}


def rotation_of(positions: StepPositions) -> StepRotation:
    if positions.rotation is None:
        raise ValueError("these positions were prepared by other operations: their rotation is missing")
    return positions.rotation


class TorchOps:
    """Plain torch, on any device."""

    stacks_experts = False

    def multiplies_plain(self, weight: torch.Tensor) -> bool:
        return False

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def linear_into(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        out.copy_(self.linear(x, weight, bias))

    def look_up_part(self, token_ids: torch.Tensor, table: torch.Tensor, first: int) -> torch.Tensor:
        local = token_ids - first
        outside = (local < 0) | (local >= len(table))
        rows = F.embedding(local.masked_fill(outside, 0), table)  # [num_tokens, hidden]
        return rows.masked_fill_(outside.unsqueeze(-1), 0)

    def add_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, norm: Norm, sums: ParallelContext | None = None
    ) -> torch.Tensor:
        if x is not None:
            residual.add_(x if sums is None else sums.all_reduce(x))
        return norm.apply(residual)

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
        return None

    def gated_linear(self, x: torch.Tensor, weight: torch.Tensor, kind: str) -> torch.Tensor | None:
        return None

    def quantized_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, norm: Norm, quant: RowQuant
    ) -> QuantizedRows | None:
        return None

    def quantized_gate(self, gate_up: torch.Tensor, kind: str, quant: RowQuant) -> QuantizedRows | None:
        return None

    def gated_activation(self, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
        return GATED_ACTIVATIONS[kind](gate_up, gate_up.shape[1] // 2)

    def activation(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        return ACTIVATIONS[kind](x)

    def choose_experts(self, logits: torch.Tensor, spec: MoeSpec, correction: torch.Tensor | None) -> Routing:
        return choose_experts(logits, spec, correction)

    def mix_experts(self, x: torch.Tensor, routing: Routing, experts: StackedExpertWeights) -> torch.Tensor:
        def apply(expert: int, rows: torch.Tensor) -> torch.Tensor:
            bias = None if experts.gate_up_bias is None else experts.gate_up_bias[expert]
            activated = self.gated_activation(F.linear(rows, experts.gate_up[expert], bias), experts.activation)
            return F.linear(
                activated, experts.down[expert], None if experts.down_bias is None else experts.down_bias[expert]
            )

        return routing.mix(x, range(experts.first_expert, experts.first_expert + len(experts.down)), apply)

    def mix_packed_experts(self, x: torch.Tensor, routing: Routing, experts: PackedStack) -> torch.Tensor:
        raise TypeError("plain torch holds experts as linears of their own, not packed in a stack")

    def prepare_positions(self, tables: RotaryTables, positions: torch.Tensor, dtype: torch.dtype) -> StepPositions:
        return StepPositions(tables, positions, tables.gather(positions, dtype))

    def attend_latent(
        self,
        query: torch.Tensor,
        cached: torch.Tensor,
        latent: LatentSpec,
        layer: int,
        positions: StepPositions,
        attention: AttentionBackend[Any],
    ) -> torch.Tensor:
        rotation = rotation_of(positions)
        key = cached.unsqueeze(1)  # [num_tokens, 1, kv_rank + rope_dim]
        for x in (query, key):
            x[..., latent.kv_rank :] = rotation.apply(x[..., latent.kv_rank :])
        return attention.run(query, key, None, layer).unflatten(-1, (-1, latent.kv_rank))

    def attend(
        self, qkv: torch.Tensor, heads: AttentionHeads, positions: StepPositions, attention: AttentionBackend[Any]
    ) -> torch.Tensor:
        num_heads, num_rotated = heads.num_heads, heads.num_heads + heads.num_kv_heads
        by_head = qkv.view(qkv.shape[0], -1, heads.head_dim)  # [num_tokens, num_projected, head_dim]
        if heads.reads_cached:
            q = self.rotate_heads(by_head, heads, rotation_of(positions))
            return attention.run(q, None, None, heads.layer, sinks=heads.sinks)
        v = by_head[:, num_heads:num_rotated] if heads.keys_are_values else by_head[:, num_rotated:]
        if heads.value_norm is not None:
            v = heads.value_norm.apply(v)
        elif heads.keys_are_values:
            v = v.clone()  # before keys are rotated in place
        rotated = self.rotate_heads(by_head, heads, rotation_of(positions))
        q, k = rotated[:, :num_heads], rotated[:, num_heads:]
        return attention.run(q, k, v, heads.layer, sinks=heads.sinks)

    def without_gates(self, columns: torch.Tensor, num_heads: int, head_dim: int) -> torch.Tensor:
        queries = columns[:, : 2 * num_heads * head_dim].unflatten(1, (num_heads, 2, head_dim))[:, :, 0]
        return torch.cat((queries.flatten(1), columns[:, 2 * num_heads * head_dim :]), dim=1)

    def gate_heads(self, attended: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return attended.mul_(gates.sigmoid().flatten(1))

    def convolve(self, mixed: torch.Tensor, weights: DeltaWeights, states: LayerStates) -> torch.Tensor:
        return delta_rule.convolve(weights.layout.channels(mixed), weights.conv, states)

    def gated_delta_rule(
        self, qkv: torch.Tensor, pairs: torch.Tensor, weights: DeltaWeights, states: LayerStates
    ) -> torch.Tensor:
        beta, decay = weights.layout.strengths(pairs.float())
        log_decay = F.softplus(decay + weights.decay_bias).mul_(-weights.log_rate.exp())
        return delta_rule.gated_delta_rule(qkv, beta.sigmoid(), log_decay, weights.layout, states)

    def gated_norm(self, attended: torch.Tensor, mixed: torch.Tensor, weights: DeltaWeights) -> torch.Tensor:
        norm, gates = weights.norm, weights.layout.gates(mixed)
        normed = F.rms_norm(attended.float(), (norm.size,), norm.weight.float(), norm.eps)
        return normed.mul_(F.silu(gates.float())).flatten(1).to(mixed.dtype)

    def rotate_heads(self, by_head: torch.Tensor, heads: AttentionHeads, rotation: StepRotation) -> torch.Tensor:
        """Norms and rotation of by_head [num_tokens, heads.num_projected, head_dim], which may be overwritten.

        Returns queries and keys, [num_tokens, heads + kv_heads, head_dim], or queries alone.
        """
        num_heads = heads.num_heads
        num_rotated = num_heads if heads.reads_cached else num_heads + heads.num_kv_heads
        if heads.query_norm is None:
            return rotation.apply(by_head[:, :num_rotated])
        q = heads.query_norm.apply(by_head[:, :num_heads])
        if heads.key_norm is None:
            return rotation.apply(q)
        k = heads.key_norm.apply(by_head[:, num_heads:num_rotated])
        return rotation.apply(torch.cat((q, k), dim=1))


TORCH_OPS = TorchOps()
