"""`--deterministic` on CUDA: `TritonOps` whose matrix products are the same for a row in any batch."""

from __future__ import annotations

import torch
from stepwire_kernels.invariant_linear import invariant_linear

from gpu_worker.cuda.ops import TritonOps


class InvariantTritonOps(TritonOps):
    """One kernel for every number of tokens. What stands between the linears goes token by token as it is."""

    fuses = False

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return invariant_linear(x, weight, bias, self._workspace, pdl=self.pdl)

    def linear_into(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        out.copy_(self.linear(x, weight, bias))
