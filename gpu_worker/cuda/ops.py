"""`LayerOps` in Triton: what stands between a decoder's linears, one kernel each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from stepwire_kernels.activation import Activation, gated_activation
from stepwire_kernels.gemm import allocate_linear_workspace, linear
from stepwire_kernels.norm import add_rms_norm

from gpu_worker.attention.api import AttentionBackend
from gpu_worker.attention.triton_backend import TritonAttention
from gpu_worker.layers.ops import AttentionHeads, StepPositions
from gpu_worker.layers.rope import RotaryTables

if TYPE_CHECKING:
    from gpu_worker.layers.norm import RMSNorm

_KERNEL_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class TritonOps:
    """Implements `LayerOps`. `pdl`: launch kernels before the ones ahead of them have drained (capability 9.0)."""

    def __init__(self, device: torch.device, *, pdl: bool) -> None:
        self.pdl = pdl
        self._workspace = allocate_linear_workspace(device)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, weight, bias, workspace=self._workspace, pdl=self.pdl)

    def add_norm(self, x: torch.Tensor | None, residual: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        if x is None:
            return add_rms_norm(residual, None, norm.weight, norm.eps, pdl=self.pdl)
        # A sublayer's output is read here and nowhere else: its memory takes the norm.
        return add_rms_norm(x, residual, norm.weight, norm.eps, out=x, pdl=self.pdl)

    def gated_activation(self, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
        return gated_activation(gate_up, _KERNEL_ACTIVATIONS[kind], pdl=self.pdl)

    def prepare_positions(self, tables: RotaryTables, positions: torch.Tensor, dtype: torch.dtype) -> StepPositions:
        return StepPositions(tables, positions, None)

    def attend(
        self, qkv: torch.Tensor, heads: AttentionHeads, positions: StepPositions, attention: AttentionBackend[Any]
    ) -> torch.Tensor:
        if not isinstance(attention, TritonAttention):
            raise TypeError(f"TritonOps writes KV through TritonAttention, not through {type(attention).__name__}")
        q = attention.rotate_and_write(qkv, heads, positions)
        return attention.run(q, None, None, heads.layer)
