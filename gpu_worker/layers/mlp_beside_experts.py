"""A dense MLP and a mixture of experts side by side (Gemma 4): what each gives is normed, and the two are added.

dense = norm(mlp(x))                                             x: the normed residual, as everywhere
mixed = norm(sum of weight_e * expert_e(norm(residual)))         both norms are the experts' own
weights: softmax of the chosen of router(rms_norm(residual) * scale / sqrt(hidden)), renormalised, times a stored
number of each expert
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.mlp import GatedMLP
from gpu_worker.layers.moe import make_experts
from gpu_worker.layers.norm import RMSNorm, hidden_norm
from gpu_worker.layers.routing import Routing
from gpu_worker.layers.sublayer_input import SublayerInput
from gpu_worker.layers.weighted import Weighted
from gpu_worker.model_spec import ModelSpec, MoeSpec
from gpu_worker.quant.api import ExpectedTensors, RandomValues, StoredTensor


class ScaledRouter(Weighted):
    """Reads the residual itself; the same on all ranks."""

    def __init__(self, spec: ModelSpec, moe: MoeSpec, build: BuildContext) -> None:
        self._moe, self._ops = moe, build.ops
        # Its weight is the stored scale.
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps, build)
        self.weight = torch.empty(moe.num_experts, spec.hidden_size, dtype=build.dtype, device=build.device)
        self.expert_scales = torch.ones(moe.num_experts, dtype=torch.float32, device=build.device)  # [num_experts]

    def _tensors(self) -> dict[tuple[str, str], torch.Tensor]:
        return {
            ("scores", "weight"): self.weight,
            ("", "scale"): self.norm.weight,
            ("", "per_expert_scale"): self.expert_scales,
        }

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        self._tensors()[part, tensor].copy_(source.read())

    def expected(self) -> ExpectedTensors:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors().items()}

    def fill_random(self, source: RandomValues) -> None:
        source.fill(self.weight, std=1.0)
        self.norm.fill_random(source)

    def finish(self) -> None:
        self.norm.finish()

    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def apply(self, residual: torch.Tensor) -> Routing:
        """residual [num_tokens, hidden]."""
        logits = self._ops.linear(self._ops.add_norm(None, residual, self.norm), self.weight, None)
        routing = self._ops.choose_experts(logits.mul_(self.norm.size**-0.5), self._moe, None)
        scales = self.expert_scales.index_select(0, routing.experts.flatten()).view_as(routing.weights)
        return Routing(routing.weights * scales, routing.experts)


class MLPBesideExperts:
    """Implements `FeedForward`. Both parts are summed over ranks before their norms, so `build` leaves no sums."""

    def __init__(self, spec: ModelSpec, moe: MoeSpec, path: str, build: BuildContext) -> None:
        self._ops, self._parallel = build.ops, build.parallel
        self.mlp = GatedMLP(spec, path, build)
        self.router = ScaledRouter(spec, moe, build)
        self.experts = make_experts(spec.hidden_size, moe, f"{path}.experts", build)
        self.output_norm, self.experts_norm, self.experts_output_norm = (hidden_norm(spec, build) for _ in range(3))

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield from self.mlp.weighted()
        yield "router", self.router
        for name, part in self.experts.weighted():
            yield f"experts{name}", part
        yield "output_norm", self.output_norm
        yield "experts_norm", self.experts_norm
        yield "experts_output_norm", self.experts_output_norm

    def apply(self, x: SublayerInput) -> torch.Tensor:
        """x [num_tokens, hidden] -> [num_tokens, hidden]."""
        dense = self._ops.add_norm(None, self.mlp.apply(x), self.output_norm)
        residual = x.residual  # whole, since the MLP has read it
        rows = self._ops.add_norm(None, residual, self.experts_norm)
        mixed = self._parallel.all_reduce(self.experts.apply(rows, self.router.apply(residual)))
        return dense.add_(self._ops.add_norm(None, mixed, self.experts_output_norm))
