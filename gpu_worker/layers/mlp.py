"""Gated MLP: down(act(gate(x)) * up(x)), gate and up in one linear."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_worker.layers.linear import BuildContext, RowParallelLinear, column_parallel
from gpu_worker.layers.ops import GATED_ACTIVATIONS
from gpu_worker.layers.weighted import Weighted
from gpu_worker.model_spec import ModelConfigError, ModelSpec


class GatedMLP:
    def __init__(self, spec: ModelSpec, path: str, build: BuildContext) -> None:
        if spec.activation not in GATED_ACTIVATIONS:
            raise ModelConfigError(
                f"hidden_act {spec.activation!r} is not supported; supported are {', '.join(GATED_ACTIVATIONS)}"
            )
        self._ops, self._activation = build.ops, spec.activation
        share = build.parallel.share(spec.intermediate_size, "intermediate_size")
        self.gate_up = column_parallel(
            spec.hidden_size,
            [("gate", share), ("up", share)],
            bias=spec.mlp_bias,
            path=f"{path}.gate_up",
            build=build,
        )
        self.down = RowParallelLinear(share, spec.hidden_size, bias=spec.mlp_bias, path=f"{path}.down", build=build)

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "gate_up", self.gate_up
        yield "down", self.down

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, hidden] -> [num_tokens, hidden]."""
        gate_up = self.gate_up.apply(x)  # [num_tokens, 2 * intermediate]
        return self.down.apply(self._ops.gated_activation(gate_up, self._activation))
