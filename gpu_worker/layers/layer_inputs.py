"""Per-layer embeddings (Gemma 3n, 2025): what each layer is given of a token beside the residual, and mixes into it.

For a token t with the embedding e, and `size` numbers for each of the layers, side by side:

    given = (table[t] * sqrt(size) + rms_norm(project(e) / sqrt(hidden))) / sqrt(2)      normed layer by layer
    residual += rms_norm(out(act(gate(residual)) * given[layer]))                        at the end of a layer

All ranks compute all of it: the linears are small, and a sum over ranks in every layer would take longer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_worker.layers.embedding import Embedding
from gpu_worker.layers.linear import BuildContext, Linear, column_parallel
from gpu_worker.layers.mlp import check_activation
from gpu_worker.layers.norm import RMSNorm, hidden_norm
from gpu_worker.layers.ops import ACTIVATIONS
from gpu_worker.layers.sublayer_input import SublayerInput
from gpu_worker.layers.weighted import Weighted
from gpu_worker.model_spec import LayerInputSpec, ModelConfigError, ModelSpec
from gpu_worker.parallel.shares import ParallelContext, Share
from gpu_worker.quant.api import ExpectedTensors, RandomValues, StoredTensor


def check_layer_inputs(spec: ModelSpec, parallel: ParallelContext) -> None:
    """Raises `ModelConfigError` where a stage would need embeddings of tokens that another stage has."""
    if spec.layer_inputs is not None and len(parallel.stage_layers) > 1:
        raise ModelConfigError(
            f"{spec.architecture} gives every layer an embedding of its own, which only the stage with the tokens' "
            "embeddings can compute: set --pipeline-parallel-size 1, and --tensor-parallel-size for more ranks"
        )


def _whole_linear(num_inputs: int, num_outputs: int, path: str, build: BuildContext) -> Linear:
    return column_parallel(num_inputs, [("", Share(0, num_outputs, num_outputs))], bias=False, path=path, build=build)


class LayerInputs:
    """Makes what all layers are given of a step's tokens."""

    def __init__(self, spec: ModelSpec, inputs: LayerInputSpec, build: BuildContext) -> None:
        self._ops, self._size = build.ops, inputs.size
        width = spec.num_layers * inputs.size
        self.table = Embedding(spec.vocab_size, width, build, num_unused=inputs.num_unused)
        self.projection = _whole_linear(spec.hidden_size, width, "layer_inputs.projection", build)
        # Of x / sqrt(hidden) the norm is that of x, but for eps.
        self.norm = RMSNorm(inputs.size, spec.norm_eps * spec.hidden_size, build, weight_offset=spec.norm_weight_offset)

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "table", self.table
        yield "projection", self.projection
        yield "norm", self.norm

    def apply(self, token_ids: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """token_ids [num_tokens], embedded [num_tokens, hidden] -> [num_tokens, num_layers, size]."""
        given = self.table.lookup(token_ids)  # [num_tokens, num_layers * size]
        projected = self.projection.apply(embedded).view(-1, self._size)  # [num_tokens * num_layers, size]
        projected = self._ops.add_norm(None, projected, self.norm).reshape(given.shape)
        given.mul_((self._size / 2) ** 0.5).add_(projected, alpha=0.5**0.5)
        return given.unflatten(1, (-1, self._size))


class LayerInputMixing:
    """The last sublayer of a block."""

    def __init__(self, spec: ModelSpec, inputs: LayerInputSpec, path: str, build: BuildContext) -> None:
        check_activation(spec.activation, dict(ACTIVATIONS))
        self._ops, self._activation = build.ops, spec.activation
        self.gate = _whole_linear(spec.hidden_size, inputs.size, f"{path}.gate", build)
        self.output = _whole_linear(inputs.size, spec.hidden_size, f"{path}.output", build)
        self.norm = hidden_norm(spec, build)

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "gate", self.gate
        yield "output", self.output
        yield "norm", self.norm

    def apply(self, x: SublayerInput, given: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, hidden], given [num_tokens, size] -> what joins the residual, [num_tokens, hidden]."""
        gated = self._ops.activation(x.through(self.gate), self._activation).mul_(given)
        return self._ops.add_norm(None, self.output.apply(gated), self.norm)


class LayerScale(Weighted):
    """A stored number that multiplies what a layer gives."""

    def __init__(self, build: BuildContext) -> None:
        self.scale = torch.ones(1, dtype=build.dtype, device=build.device)

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        self.scale.copy_(source.read())

    def expected(self) -> ExpectedTensors:
        return {("", "layer_scalar"): (1,)}

    def fill_random(self, source: RandomValues) -> None:
        self.scale.fill_(1.0)

    def num_bytes(self) -> int:
        return self.scale.element_size()
