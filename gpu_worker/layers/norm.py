"""RMSNorm (Zhang and Sennrich, 2019): x / sqrt(mean(x^2) + eps) * weight, computed in float32 inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.weighted import Weighted
from gpu_worker.quant.api import ExpectedTensors, RandomValues, StoredTensor


class RMSNorm(Weighted):
    """Over the last dimension. `weight_offset` is 1 where checkpoints store the weight minus one."""

    def __init__(self, size: int, eps: float, build: BuildContext, *, weight_offset: float = 0.0) -> None:
        self.size = size
        self.eps = eps
        self.weight_offset = weight_offset
        self.weight = torch.empty(size, dtype=build.dtype, device=build.device)  # [size]
        self._mirrored_weight: torch.Tensor | None = None

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        self.weight.copy_(source.read().float() + self.weight_offset)

    def expected(self) -> ExpectedTensors:
        return {("", "weight"): (self.size,)}

    def fill_random(self, source: RandomValues) -> None:
        self.weight.fill_(1.0)

    def num_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def finish(self) -> None:
        if self.weight.device.type == "cpu":
            self._mirrored_weight = torch.cat((self.weight, self.weight))  # [2 * size]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape, a new tensor."""
        if self._mirrored_weight is None:
            return F.rms_norm(x, (self.size,), self.weight, self.eps)
        # torch's RMSNorm is a chain of nine calls on a CPU, its LayerNorm one kernel. The mean of (x, -x) is zero and
        # its variance is the mean square of x: the LayerNorm of the pair begins with the RMSNorm of x. Measured on
        # SmolLM2-135M in bfloat16: 6 % of a whole decode step with one row, 3 % with 16, 1 % with 64.
        mirrored = torch.cat((x, -x), dim=-1)  # [..., 2 * size]
        normed = F.layer_norm(mirrored, (2 * self.size,), self._mirrored_weight, None, self.eps)
        return normed[..., : self.size]
