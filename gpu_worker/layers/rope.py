"""Rotary position embedding (Su et al., 2021): frequencies, tables, and the rotation.

Pairs are (i, i + rotary_dim / 2), the "neox" order of Hugging Face checkpoints. Tables are computed in float32 and
rounded to the model's dtype only when a step gathers its positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gpu_worker.model_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec) -> torch.Tensor:
    """Radians a position for each pair: float32 [rotary_dim / 2]."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim  # [rotary_dim / 2]
    base = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return base
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(base, rope)
    if rope.kind == "yarn":
        return _yarn(base, rope)
    raise ValueError(f"rope kind {rope.kind!r} is not one of default, linear, llama3, yarn")


def _llama3(base: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / base
    longest_kept = rope.original_max_position_embeddings / rope.high_freq_factor
    shortest_stretched = rope.original_max_position_embeddings / rope.low_freq_factor
    kept_share = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - kept_share) * base / rope.factor + kept_share * base
    stretched = torch.where(wavelength > shortest_stretched, base / rope.factor, blended)
    return torch.where(wavelength < longest_kept, base, stretched)


def _yarn(base: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """YaRN (Peng et al., 2023): dimensions that turn often enough within the original context keep their frequency."""

    def dimension_of(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(len(base), dtype=torch.float32) - low) / (high - low)
    stretched_share = ramp.clamp(0, 1)
    return base / rope.factor * stretched_share + base * (1 - stretched_share)


def attention_factor(rope: RopeSpec) -> float:
    """What cos and sin are multiplied with."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "yarn" and rope.factor > 1:
        return 0.1 * math.log(rope.factor) + 1.0
    return 1.0


@dataclass(frozen=True, slots=True)
class RotaryTables:
    """cos and sin of every position: float32 [max_position, rotary_dim / 2] each."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def build(cls, rope: RopeSpec, max_position: int, device: torch.device) -> RotaryTables:
        positions = torch.arange(max_position, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(rope))  # [max_position, rotary_dim / 2]
        scale = attention_factor(rope)
        return cls(cos=(angles.cos() * scale).to(device), sin=(angles.sin() * scale).to(device))

    def gather(self, positions: torch.Tensor, dtype: torch.dtype) -> StepRotation:
        """The rotation of a step's tokens, once for all its layers and heads."""
        cos = self.cos[positions]  # [num_tokens, rotary_dim / 2]
        sin = self.sin[positions]
        return StepRotation(
            cos=torch.cat((cos, cos), -1).to(dtype).unsqueeze(1),
            signed_sin=torch.cat((-sin, sin), -1).to(dtype).unsqueeze(1),
        )


@dataclass(frozen=True, slots=True)
class StepRotation:
    """cos: [num_tokens, 1, rotary_dim], [cos | cos]; signed_sin: the same shape, [-sin | sin]."""

    cos: torch.Tensor
    signed_sin: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate the leading rotary_dim of every head; x [num_tokens, num_heads, head_dim] may be overwritten."""
        rotary_dim = self.cos.shape[-1]
        if rotary_dim < x.shape[-1]:
            x[..., :rotary_dim] = self._rotate(x[..., :rotary_dim])
            return x
        return self._rotate(x)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        swapped = torch.cat((x[..., half:], x[..., :half]), -1)  # [num_tokens, num_heads, rotary_dim]
        return swapped.mul_(self.signed_sin).addcmul_(x, self.cos)
