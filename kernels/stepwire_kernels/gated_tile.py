"""A tile of a product with a gate, weight = [gate; up] of [2 * I, K]: which of its rows, and act(gate) * up at its end.

A program that multiplies BLOCK_N rows takes half of them from gate and the same ones of up, so that what it holds in
the end is all that its BLOCK_N / 2 outputs need: nothing is written, read and launched in between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepwire_kernels.activation import ACTIVATIONS, Activation, activate


@triton.jit
def halves_of(tile, num_outputs, BLOCK_N: tl.constexpr):
    """(rows of the weight, whether there are such) of a tile, both [BLOCK_N]: gate's above up's."""
    HALF: tl.constexpr = BLOCK_N // 2
    places = tl.arange(0, BLOCK_N)
    outputs = tile * HALF + places % HALF
    return outputs + (places // HALF) * num_outputs, outputs < num_outputs


@triton.jit
def gate_of_halves(sums, KIND: tl.constexpr):
    """act(gate) * up of a tile's sums [BLOCK_N, BLOCK_M]: [BLOCK_N / 2, BLOCK_M], in float32."""
    HALF: tl.constexpr = sums.shape[0] // 2
    gate, up = tl.split(tl.permute(tl.reshape(sums, (2, HALF, sums.shape[1])), (1, 2, 0)))
    return activate(gate, up, KIND)


def num_outputs_of(name: str, weight: torch.Tensor, activation: Activation | None) -> int:
    """Outputs of a product with this weight [N, K]: half of N with an activation. Raises `ValueError`."""
    if activation is None:
        return weight.shape[0]
    if activation not in ACTIVATIONS or weight.shape[0] % 2:
        raise ValueError(
            f"{name}: a gate needs gate's rows and as many of up, and one of {', '.join(ACTIVATIONS)}; got "
            f"{weight.shape[0]} rows and {activation!r}"
        )
    return weight.shape[0] // 2
