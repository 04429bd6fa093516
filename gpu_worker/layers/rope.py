"""Rotary position embedding (Su et al., 2021): frequencies, tables, and the rotation.

Pairs are (i, i + rotary_dim / 2), the "neox" order of Hugging Face checkpoints, or neighbours where a model says so.
Tables are computed in float32 and rounded to the model's dtype only when a step gathers its positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gpu_worker.model_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, max_position: int = 0) -> torch.Tensor:
    """Radians a position for each pair: float32 [rotary_dim / 2].

    `max_position` is what longrope picks its factors by: once a server, since cached keys are rotated already.
    """
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
    if rope.kind == "proportional":
        stands = torch.arange(len(base)) >= int(rope.rotated_share * rope.rotary_dim // 2)
        return base.masked_fill(stands, 0.0) / rope.factor
    if rope.kind == "longrope":
        is_long = max_position > rope.original_max_position_embeddings
        return base / torch.tensor(rope.long_factors if is_long else rope.short_factors, dtype=torch.float32)
    raise ValueError(f"rope kind {rope.kind!r} is not one of default, linear, llama3, yarn, longrope, proportional")


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
        return yarn_factor(rope.factor)
    if rope.kind == "longrope" and rope.factor > 1:
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
    return 1.0


def yarn_factor(factor: float, weight: float = 1.0) -> float:
    """YaRN's correction of attention scores for a context stretched by `factor`."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True, slots=True)
class RotaryTables:
    """cos and sin of every position: float32 [max_position, rotary_dim / 2] each."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False

    @classmethod
    def build(cls, rope: RopeSpec | None, max_position: int, device: torch.device) -> RotaryTables:
        """Without a `rope` nothing turns: one pair of angle 0, so that kernels need not know."""
        if rope is None:
            cos = torch.ones(max_position, 1, device=device)
            return cls(cos=cos, sin=torch.zeros_like(cos))
        positions = torch.arange(max_position, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(rope, max_position))  # [max_position, rotary_dim / 2]
        scale = attention_factor(rope)
        return cls((angles.cos() * scale).to(device), (angles.sin() * scale).to(device), rope.interleaved)

    def gather(self, positions: torch.Tensor, dtype: torch.dtype) -> StepRotation:
        """The rotation of a step's tokens, once for all its layers and heads."""
        cos = self.cos[positions]  # [num_tokens, rotary_dim / 2]
        sin = self.sin[positions]
        if self.interleaved:
            cos, signed_sin = cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
        else:
            cos, signed_sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return StepRotation(cos.to(dtype).unsqueeze(1), signed_sin.to(dtype).unsqueeze(1), self.interleaved)


@dataclass(frozen=True, slots=True)
class StepRotation:
    """cos and signed_sin: [num_tokens, 1, rotary_dim], every pair's cosine twice, its sine as -sin and sin."""

    cos: torch.Tensor
    signed_sin: torch.Tensor
    interleaved: bool = False

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate the leading rotary_dim of every head; x [num_tokens, num_heads, head_dim] may be overwritten."""
        rotary_dim = self.cos.shape[-1]
        if rotary_dim < x.shape[-1]:
            x[..., :rotary_dim] = self._rotate(x[..., :rotary_dim])
            return x
        return self._rotate(x)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        if self.interleaved:
            swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # [num_tokens, num_heads, rotary_dim]
        else:
            half = x.shape[-1] // 2
            swapped = torch.cat((x[..., half:], x[..., :half]), -1)  # [num_tokens, num_heads, rotary_dim]
        return swapped.mul_(self.signed_sin).addcmul_(x, self.cos)
