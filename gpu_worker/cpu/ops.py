"""`LayerOps` in compiled kernels: bfloat16 on a CPU that has no instructions for it.

torch's own bfloat16 product is bound by widening there, and a one-row step spends almost as much between its linears:
some 600 small calls, and a barrier of all threads in many of them. What the kernels do not cover goes to torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gpu_worker.attention.api import AttentionBackend
from gpu_worker.cpu.attention import CpuAttention
from gpu_worker.cpu.layout import LINEAR_BUFFER_BYTES, PANEL_ROWS
from gpu_worker.cpu.team import Team
from gpu_worker.layers.ops import AttentionHeads, StepPositions, TorchOps
from gpu_worker.layers.rope import RotaryTables

if TYPE_CHECKING:
    from gpu_worker.layers.norm import Norm
    from gpu_worker.parallel.shares import ParallelContext

# The kernels' numbers for what `hidden_act` names; others are torch's.
_GATES = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "swiglu_oai": 2}


class CpuOps(TorchOps):
    """`attends`: attention goes through `CpuAttention.attend`; else as in `TorchOps`."""

    def __init__(self, team: Team, *, attends: bool) -> None:
        self.team = team
        self._entry = team.kernels.entry_points
        self._attends = attends
        team.reserve(LINEAR_BUFFER_BYTES)
        self._widened = torch.empty(0, dtype=torch.float32)

    def multiplies_plain(self, weight: torch.Tensor) -> bool:
        return weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.device.type == "cpu"

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not _is_rows(x) or not self.multiplies_plain(weight):
            return super().linear(x, weight, bias)
        num_rows, num_inputs = x.shape
        num_outputs = weight.shape[0]
        self._reserve(num_rows, num_inputs)
        self.team.wake()
        y = torch.empty(num_rows, num_outputs, dtype=torch.bfloat16)
        self._entry.linear(
            self.team.address,
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            num_rows,
            num_inputs,
            num_outputs,
            self._widened.data_ptr(),
        )
        return y

    def _reserve(self, num_rows: int, num_inputs: int) -> None:
        num_numbers = (num_rows + PANEL_ROWS - 1) * num_inputs
        if num_numbers > self._widened.numel():
            self._widened = torch.empty(num_numbers, dtype=torch.float32)

    def add_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, norm: Norm, sums: ParallelContext | None = None
    ) -> torch.Tensor:
        weight = norm.weight
        if x is not None and sums is not None:
            x = sums.all_reduce(x)
        covered = _is_rows(residual) and weight.dtype == torch.bfloat16
        if not covered or (x is not None and not (_is_rows(x) and x.is_contiguous())):
            return super().add_norm(x, residual, norm)
        num_rows, size = residual.shape
        bias = getattr(norm, "bias", None)
        offset = getattr(norm, "weight_offset", None)  # None: a LayerNorm
        out = torch.empty(num_rows, size, dtype=torch.bfloat16)
        self._entry.add_norm(
            self.team.address,
            0 if x is None else x.data_ptr(),
            residual.data_ptr(),
            residual.stride(0),
            out.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            norm.eps,
            offset or 0.0,
            offset is None,
            num_rows,
            size,
        )
        return out

    def gated_activation(self, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
        number = _GATES.get(kind)
        if number is None or not _is_rows(gate_up) or not gate_up.is_contiguous():
            return super().gated_activation(gate_up, kind)
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(num_rows, size, dtype=torch.bfloat16)
        self._entry.gated_activation(self.team.address, gate_up.data_ptr(), out.data_ptr(), number, num_rows, size)
        return out

    def prepare_positions(self, tables: RotaryTables, positions: torch.Tensor, dtype: torch.dtype) -> StepPositions:
        self.team.wake()
        if self._attends:
            return StepPositions(tables, positions, None)
        return super().prepare_positions(tables, positions, dtype)

    def attend(
        self, qkv: torch.Tensor, heads: AttentionHeads, positions: StepPositions, attention: AttentionBackend[Any]
    ) -> torch.Tensor:
        if not self._attends:
            return super().attend(qkv, heads, positions, attention)
        if not isinstance(attention, CpuAttention):
            raise TypeError(f"CpuOps attends through CpuAttention, not through {type(attention).__name__}")
        return attention.attend(qkv, heads, positions.tables)


def _is_rows(x: torch.Tensor) -> bool:
    """Whether kernels can read x [num_rows, size]."""
    return x.dtype == torch.bfloat16 and x.dim() == 2 and x.stride(1) == 1 and x.shape[0] > 0
