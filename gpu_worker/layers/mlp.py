"""MLPs: down(act(gate(x)) * up(x)) with gate and up in one linear, and down(act(up(x)))."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from gpu_worker.layers.linear import BuildContext, RowParallelLinear, column_parallel
from gpu_worker.layers.ops import ACTIVATIONS, GATED_ACTIVATIONS
from gpu_worker.layers.sublayer_input import SublayerInput
from gpu_worker.layers.weighted import Weighted
from gpu_worker.model_spec import ModelConfigError, ModelSpec


class FeedForward(Protocol):
    """What follows attention in a block."""

    def weighted(self) -> Iterator[tuple[str, Weighted]]: ...

    def apply(self, x: SublayerInput) -> torch.Tensor:
        """x [num_tokens, hidden] -> [num_tokens, hidden]."""
        ...


def check_activation(name: str, known: dict[str, object]) -> None:
    if name not in known:
        raise ModelConfigError(f"hidden_act {name!r} is not supported; supported are {', '.join(known)}")


class GatedMLP:
    """`reduce`: add up the ranks' parts; without it the caller does."""

    def __init__(
        self,
        spec: ModelSpec,
        path: str,
        build: BuildContext,
        *,
        intermediate_size: int | None = None,
        reduce: bool = True,
    ) -> None:
        check_activation(spec.activation, dict(GATED_ACTIVATIONS))
        self._activation = spec.activation
        share = build.parallel.share(intermediate_size or spec.intermediate_size, "intermediate_size")
        self.gate_up = column_parallel(
            spec.hidden_size,
            [("gate", share), ("up", share)],
            bias=spec.mlp_bias,
            path=f"{path}.gate_up",
            build=build,
        )
        self.down = RowParallelLinear(
            share, spec.hidden_size, bias=spec.mlp_bias, path=f"{path}.down", build=build, reduce=reduce
        )

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "gate_up", self.gate_up
        yield "down", self.down

    def apply(self, x: SublayerInput) -> torch.Tensor:
        """x [num_tokens, hidden] -> [num_tokens, hidden]."""
        quant = self.down.method.row_quant()
        if quant is None:
            return self.down.apply(x.through(self.gate_up, self._activation))
        product, is_gated = x.through_gated(self.gate_up, self._activation)
        return self.down.apply(product) if is_gated else self.down.apply_gated(product, self._activation, quant)


class PlainMLP:
    def __init__(self, spec: ModelSpec, path: str, build: BuildContext) -> None:
        check_activation(spec.activation, dict(ACTIVATIONS))
        self._ops, self._activation = build.ops, spec.activation
        share = build.parallel.share(spec.intermediate_size, "intermediate_size")
        self.up = column_parallel(spec.hidden_size, [("", share)], bias=spec.mlp_bias, path=f"{path}.up", build=build)
        self.down = RowParallelLinear(share, spec.hidden_size, bias=spec.mlp_bias, path=f"{path}.down", build=build)

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "up", self.up
        yield "down", self.down

    def apply(self, x: SublayerInput) -> torch.Tensor:
        """x [num_tokens, hidden] -> [num_tokens, hidden]."""
        return self.down.apply(self._ops.activation(x.through(self.up), self._activation))
