"""A layer of the gated delta rule: projections, a short convolution, the rule itself, a gated norm, the output.

What it keeps of a row is in the worker's `StatePool`. Ranks hold some of the key heads each, with their value heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_worker.layers.attention import ForwardContext
from gpu_worker.layers.delta_rule import DeltaLayout
from gpu_worker.layers.linear import BuildContext, Linear, RowParallelLinear, column_parallel
from gpu_worker.layers.norm import RMSNorm
from gpu_worker.layers.ops import DeltaWeights
from gpu_worker.layers.sublayer_input import SublayerInput
from gpu_worker.layers.weighted import Weighted
from gpu_worker.model_spec import GatedDeltaSpec, ModelConfigError, ModelSpec
from gpu_worker.parallel.shares import Share
from gpu_worker.quant.api import ExpectedTensors, RandomValues, StoredTensor


def _scaled(share: Share, factor: int) -> Share:
    return Share(share.start * factor, share.size * factor, share.total * factor)


class ShortConvolution(Weighted):
    """Taps of every channel of this rank: queries, keys, values."""

    def __init__(self, parts: tuple[Share, ...], width: int, build: BuildContext) -> None:
        self._parts = parts
        num_channels = sum(part.size for part in parts)
        self.weight = torch.empty(num_channels, width, dtype=build.dtype, device=build.device)  # [channels, width]

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        start = first = 0
        for share in self._parts:
            stored = source.read((slice(first + share.start, first + share.stop),))
            self.weight[start : start + share.size] = stored.squeeze(1)
            start, first = start + share.size, first + share.total

    def expected(self) -> ExpectedTensors:
        return {("", "weight"): (sum(part.total for part in self._parts), 1, self.weight.shape[1])}

    def fill_random(self, source: RandomValues) -> None:
        source.fill(self.weight, std=self.weight.shape[1] ** -0.5)

    def num_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()


class Decay(Weighted):
    """How fast every value head of this rank forgets: its decay is exp(-exp(A_log) * softplus(a + dt_bias))."""

    def __init__(self, heads: Share, build: BuildContext) -> None:
        self._heads = heads
        self.log_rate = torch.empty(heads.size, dtype=torch.float32, device=build.device)  # [value_heads]
        self.bias = torch.empty(heads.size, dtype=torch.float32, device=build.device)  # [value_heads]

    def load(self, part: str, tensor: str, source: StoredTensor) -> None:
        target = self.log_rate if tensor == "A_log" else self.bias
        target.copy_(source.read((self._heads.as_slice(),)))

    def expected(self) -> ExpectedTensors:
        return {("", "A_log"): (self._heads.total,), ("", "dt_bias"): (self._heads.total,)}

    def fill_random(self, source: RandomValues) -> None:
        source.fill(self.log_rate, std=1.0)
        self.bias.fill_(1.0)

    def num_bytes(self) -> int:
        return 2 * self.log_rate.numel() * self.log_rate.element_size()


class GatedDelta:
    """`layer`: its number among this rank's layers that keep a state."""

    def __init__(self, spec: ModelSpec, delta: GatedDeltaSpec, layer: int, path: str, build: BuildContext) -> None:
        if spec.activation not in ("silu", "swish"):
            raise ModelConfigError(
                f"hidden_act {spec.activation!r} is not supported before a gated delta rule: silu is"
            )
        groups = build.parallel.share(delta.num_key_heads, "linear_num_key_heads")
        group_size = delta.num_value_heads // delta.num_key_heads
        keys = _scaled(groups, delta.key_dim)
        heads = _scaled(groups, group_size)
        values = _scaled(heads, delta.value_dim)
        if delta.is_grouped:
            inputs, pairs = [("", _scaled(groups, delta.num_inputs // delta.num_key_heads))], [("", _scaled(heads, 2))]
        else:
            inputs, pairs = [("q", keys), ("k", keys), ("v", values), ("z", values)], [("b", heads), ("a", heads)]
        hidden = spec.hidden_size
        self.inputs = column_parallel(hidden, inputs, bias=False, path=f"{path}.inputs", build=build)
        # Beta and decay apart: what quantizes linears often leaves these two alone.
        self.pairs = column_parallel(hidden, pairs, bias=False, path=f"{path}.pairs", build=build)
        self.conv = ShortConvolution((keys, keys, values), delta.conv_width, build)
        self.decay = Decay(heads, build)
        self.norm = RMSNorm(delta.value_dim, spec.norm_eps, build)
        self.output = RowParallelLinear(values, hidden, bias=False, path=f"{path}.output", build=build)
        layout = DeltaLayout.of(groups.size, group_size, delta.key_dim, delta.value_dim, is_grouped=delta.is_grouped)
        self._weights = DeltaWeights(layout, self.conv.weight, self.decay.log_rate, self.decay.bias, self.norm)
        self._layer, self._ops = layer, build.ops

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "inputs", self.inputs
        yield "pairs", self.pairs
        yield "conv", self.conv
        yield "decay", self.decay
        yield "norm", self.norm
        yield "output", self.output

    def apply(self, x: SublayerInput, context: ForwardContext) -> torch.Tensor:
        """x [num_tokens, hidden] -> [num_tokens, hidden]."""
        if context.states is None:
            raise RuntimeError("a layer that keeps states has no pool: allocate_states comes before the first step")
        mixed = self._product(x, self.inputs)  # [num_tokens, queries, keys, values and gates]
        pairs = self.pairs.apply(x.rows())  # [num_tokens, 2 * value_heads]
        states = context.states.layer(self._layer)
        qkv = self._ops.convolve(mixed, self._weights, states)
        attended = self._ops.gated_delta_rule(qkv, pairs, self._weights, states)
        return self.output.apply(self._ops.gated_norm(attended, mixed, self._weights))

    @staticmethod
    def _product(x: SublayerInput, linear: Linear) -> torch.Tensor:
        weight = linear.method.plain_weight()
        product = None if weight is None else x.times(weight, keeps_rows=True)
        return x.through(linear) if product is None else product
