"""What a decoder computes between its linears: the seam between torch's own operations and fused kernels.

A decoder is one text for every device. It is built with a `LayerOps`: `TorchOps` here runs anywhere and is the
reference; `gpu_worker.cuda.ops.TritonOps` does the same with one kernel each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from gpu_worker.attention.api import AttentionBackend
from gpu_worker.layers.rope import RotaryTables, StepRotation

if TYPE_CHECKING:
    from gpu_worker.layers.norm import RMSNorm


@dataclass(frozen=True, slots=True)
class AttentionHeads:
    """One layer's heads on this rank; the norms are those of a model with qk-norm."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None


@dataclass(frozen=True, slots=True)
class StepPositions:
    """Where a step's tokens stand: what rotation needs, prepared once for all layers."""

    tables: RotaryTables
    positions: torch.Tensor  # [num_tokens]
    rotation: StepRotation | None
    """cos and sin of these positions; None where the kernel reads the tables itself."""


class LayerOps(Protocol):
    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [num_tokens, in], weight [out, in] -> [num_tokens, out]."""
        ...

    def add_norm(self, x: torch.Tensor | None, residual: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """residual += x (None: nothing), in place; the norm of it as a new tensor [num_tokens, hidden]."""
        ...

    def gated_activation(self, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
        """act(gate) * up: [num_tokens, 2 * intermediate] -> [num_tokens, intermediate]; `kind` as in `hidden_act`."""
        ...

    def prepare_positions(self, tables: RotaryTables, positions: torch.Tensor, dtype: torch.dtype) -> StepPositions: ...

    def attend(
        self, qkv: torch.Tensor, heads: AttentionHeads, positions: StepPositions, attention: AttentionBackend[Any]
    ) -> torch.Tensor:
        """Norms of query and key heads, rotation, write into the KV cache, attention.

        qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], may be overwritten; returns
        [num_tokens, num_heads * head_dim].
        """
        ...


def _silu_mul(gate_up: torch.Tensor, size: int) -> torch.Tensor:
    return F.silu(gate_up[:, :size]).mul_(gate_up[:, size:])


def _gelu_mul(gate_up: torch.Tensor, size: int) -> torch.Tensor:
    return F.gelu(gate_up[:, :size]).mul_(gate_up[:, size:])


def _gelu_tanh_mul(gate_up: torch.Tensor, size: int) -> torch.Tensor:
    return F.gelu(gate_up[:, :size], approximate="tanh").mul_(gate_up[:, size:])


# Names as `hidden_act` has them.
GATED_ACTIVATIONS = {
    "silu": _silu_mul,
    "swish": _silu_mul,
    "gelu": _gelu_mul,
    "gelu_pytorch_tanh": _gelu_tanh_mul,
    "gelu_new": _gelu_tanh_mul,
}


class TorchOps:
    """Plain torch, on any device."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def add_norm(self, x: torch.Tensor | None, residual: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        if x is not None:
            residual.add_(x)
        return norm.apply(residual)

    def gated_activation(self, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
        return GATED_ACTIVATIONS[kind](gate_up, gate_up.shape[1] // 2)

    def prepare_positions(self, tables: RotaryTables, positions: torch.Tensor, dtype: torch.dtype) -> StepPositions:
        return StepPositions(tables, positions, tables.gather(positions, dtype))

    def attend(
        self, qkv: torch.Tensor, heads: AttentionHeads, positions: StepPositions, attention: AttentionBackend[Any]
    ) -> torch.Tensor:
        num_heads, num_rotated, rotation = heads.num_heads, heads.num_heads + heads.num_kv_heads, positions.rotation
        if rotation is None:
            raise ValueError("these positions were prepared by other operations: their rotation is missing")
        by_head = qkv.view(qkv.shape[0], -1, heads.head_dim)  # [num_tokens, heads + 2 * kv_heads, head_dim]
        if heads.query_norm is not None and heads.key_norm is not None:
            q = heads.query_norm.apply(by_head[:, :num_heads])
            k = heads.key_norm.apply(by_head[:, num_heads:num_rotated])
            rotated = rotation.apply(torch.cat((q, k), dim=1))
        else:
            rotated = rotation.apply(by_head[:, :num_rotated])  # [num_tokens, heads + kv_heads, head_dim]
        q, k, v = rotated[:, :num_heads], rotated[:, num_heads:], by_head[:, num_rotated:]
        return attention.run(q, k, v, heads.layer)


TORCH_OPS = TorchOps()
