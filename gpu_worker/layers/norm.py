"""RMSNorm (Zhang and Sennrich, 2019): x / sqrt(mean(x^2) + eps) * weight; LayerNorm (Ba et al., 2016):
(x - mean(x)) / sqrt(var(x) + eps) * weight + bias. Both are computed in float32 inside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.weighted import Weighted
from gpu_worker.model_spec import ModelSpec
from gpu_worker.quant.api import ExpectedTensors, RandomValues, StoredTensor


class RMSNorm(Weighted):
    """Over the last dimension. `weight_offset` is 1 where checkpoints store the weight minus one."""

    def __init__(self, size: int, eps: float, build: BuildContext, *, weight_offset: float = 0.0) -> None:
        self.size = size
        self.eps = eps
        self.weight_offset = weight_offset
        # The offset is added when it is used, in float32: 1 + weight has fewer digits in bfloat16 than weight.
        self.weight = torch.empty(size, dtype=build.dtype, device=build.device)  # [size]
        self._mirrored_weight: torch.Tensor | None = None

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        self.weight.copy_(source.read())

    def expected(self) -> ExpectedTensors:
        return {("", "weight"): (self.size,)}

    def fill_random(self, source: RandomValues) -> None:
        self.weight.fill_(1.0 - self.weight_offset)

    def num_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def finish(self) -> None:
        if self.weight.device.type == "cpu":
            weight = self.weight if self.weight_offset == 0 else self.weight.float() + self.weight_offset
            self._mirrored_weight = torch.cat((weight, weight))  # [2 * size]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape, a new tensor."""
        if self._mirrored_weight is None:
            if self.weight_offset == 0:
                return F.rms_norm(x, (self.size,), self.weight, self.eps)
            return F.rms_norm(x.float(), (self.size,), self.weight.float() + self.weight_offset, self.eps).to(x.dtype)
        # torch's RMSNorm is a chain of nine calls on a CPU, its LayerNorm one kernel. The mean of (x, -x) is zero and
        # its variance is the mean square of x: the LayerNorm of the pair begins with the RMSNorm of x. Measured on
        # SmolLM2-135M in bfloat16: 6 % of a whole decode step with one row, 3 % with 16, 1 % with 64.
        mirrored = torch.cat((x, -x), dim=-1)  # [..., 2 * size]
        normed = F.layer_norm(mirrored, (2 * self.size,), self._mirrored_weight, None, self.eps)
        return normed[..., : self.size]


def plain_norm(size: int, eps: float, build: BuildContext) -> RMSNorm:
    """An RMSNorm that no checkpoint has a weight of."""
    norm = RMSNorm(size, eps, build)
    norm.weight.fill_(1.0)
    norm.finish()
    return norm


class LayerNorm(Weighted):
    """Over the last dimension, with or without a bias."""

    def __init__(self, size: int, eps: float, build: BuildContext, *, bias: bool) -> None:
        self.size = size
        self.eps = eps
        self.weight = torch.empty(size, dtype=build.dtype, device=build.device)  # [size]
        self.bias = torch.empty(size, dtype=build.dtype, device=build.device) if bias else None  # [size]

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        target = self.bias if tensor == "bias" else self.weight
        if target is None:
            raise KeyError(tensor)
        target.copy_(source.read())

    def expected(self) -> ExpectedTensors:
        shapes: ExpectedTensors = {("", "weight"): (self.size,)}
        if self.bias is not None:
            shapes["", "bias"] = (self.size,)
        return shapes

    def fill_random(self, source: RandomValues) -> None:
        self.weight.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()

    def num_bytes(self) -> int:
        return (1 if self.bias is None else 2) * self.weight.numel() * self.weight.element_size()

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape, a new tensor."""
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)


Norm = RMSNorm | LayerNorm


def hidden_norm(spec: ModelSpec, build: BuildContext) -> Norm:
    """The norm of hidden states that this model uses."""
    if spec.norm_kind == "layer":
        return LayerNorm(spec.hidden_size, spec.norm_eps, build, bias=spec.norm_bias)
    return RMSNorm(spec.hidden_size, spec.norm_eps, build, weight_offset=spec.norm_weight_offset)


class ProjectionNorm(Weighted):
    """RMSNorm over all heads of a projection together (OLMo 2). Ranks hold some of the heads each."""

    def __init__(self, num_heads: int, total_heads: int, first_head: int, spec: ModelSpec, build: BuildContext) -> None:
        self._parallel, self._ops = build.parallel, build.ops
        self._total, self._start = total_heads * spec.head_dim, first_head * spec.head_dim
        # A KV head that several ranks hold is counted by each of them.
        self._copies = num_heads * build.parallel.size // total_heads
        self._norm = RMSNorm(num_heads * spec.head_dim, spec.norm_eps, build)

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        self._norm.weight.copy_(source.read((slice(self._start, self._start + self._norm.size),)))

    def expected(self) -> ExpectedTensors:
        return {("", "weight"): (self._total,)}

    def fill_random(self, source: RandomValues) -> None:
        self._norm.fill_random(source)

    def num_bytes(self) -> int:
        return self._norm.num_bytes()

    def finish(self) -> None:
        self._norm.finish()

    def apply_(self, x: torch.Tensor) -> None:
        """x [num_tokens, num_heads * head_dim], in place."""
        if self._parallel.size == 1:
            x.copy_(self._ops.add_norm(None, x, self._norm))
            return
        square_sum = self._parallel.all_reduce(x.float().square().sum(-1, keepdim=True))  # [num_tokens, 1]
        scale = torch.rsqrt(square_sum / (self._copies * self._total) + self._norm.eps)
        x.copy_(x.float() * scale * self._norm.weight.float())


class EachHeadNorm(Weighted):
    """LayerNorm over head_dim, every head with its own weight (Command R+)."""

    def __init__(self, num_heads: int, total_heads: int, first_head: int, spec: ModelSpec, build: BuildContext) -> None:
        self._total, self._first = total_heads, first_head
        self._eps, self._head_dim = spec.norm_eps, spec.head_dim
        self.weight = torch.empty(num_heads, spec.head_dim, dtype=build.dtype, device=build.device)  # [heads, head_dim]

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        self.weight.copy_(source.read((slice(self._first, self._first + len(self.weight)),)))

    def expected(self) -> ExpectedTensors:
        return {("", "weight"): (self._total, self._head_dim)}

    def fill_random(self, source: RandomValues) -> None:
        self.weight.fill_(1.0)

    def num_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def apply_(self, x: torch.Tensor) -> None:
        """x [num_tokens, num_heads * head_dim], in place."""
        heads = x.unflatten(-1, (-1, self._head_dim))
        normed = F.layer_norm(heads.float(), (self._head_dim,), None, None, self._eps)
        x.copy_((normed * self.weight.float()).flatten(-2))
