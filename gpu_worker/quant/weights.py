"""What quantized tensors mean, whatever a checkpoint calls and packs them: the forms that kernels and tests read.

Each form is one part's share of a weight W [N, K] on this rank, says what its values are (`dequantize`), and can be
put beside others of its kind (`stack`), which is how q, k and v become one linear while each keeps its own scales.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gpu_worker.loading.gguf_blocks import GgmlType, decode_rows

ROW_STEP = 1024
"""Weights are cut between rows at multiples of this."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The 16 codes of a 4-bit float (OCP Microscaling Formats, v1.0)."""


class QuantizedWeight(ABC):
    """One [N, K] weight in some packed form."""

    @property
    @abstractmethod
    def num_outputs(self) -> int: ...

    @property
    @abstractmethod
    def num_inputs(self) -> int: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def dequantize(self) -> torch.Tensor:
        """float32 [N, K]."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Some of the outputs; `start` is a multiple of ROW_STEP."""


class CodesInGroups(QuantizedWeight):
    """Integers of a few bits."""

    codes: torch.Tensor  # uint8 [N, K]

    @property
    def num_outputs(self) -> int:
        return self.codes.shape[0]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def num_inputs(self) -> int:
        return self.codes.shape[1]


@dataclass(frozen=True, slots=True)
class AffineWeight(CodesInGroups):
    """W[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g] with g = groups[k] (None: k // group_size)."""

    codes: torch.Tensor  # uint8 [N, K]
    zeros: torch.Tensor  # uint8 [N, G], or [1, 1] where all are the same
    scales: torch.Tensor  # float32 [N, G]
    group_size: int
    bits: int
    groups: torch.Tensor | None = None  # int64 [K]

    def group_of_input(self) -> torch.Tensor:
        """int64 [K]."""
        if self.groups is not None:
            return self.groups
        return torch.arange(self.num_inputs, device=self.codes.device) // self.group_size

    def dequantize(self) -> torch.Tensor:
        groups = self.group_of_input()
        zeros = self.zeros.expand(self.scales.shape)
        levels = self.codes.float() - zeros.float()[:, groups]
        return levels.mul_(self.scales.float()[:, groups])

    def rows(self, start: int, stop: int) -> AffineWeight:
        zeros = self.zeros if self.zeros.shape[0] == 1 else self.zeros[start:stop]
        return replace(self, codes=self.codes[start:stop], zeros=zeros, scales=self.scales[start:stop])

    @classmethod
    def stack(cls, parts: Sequence[AffineWeight]) -> AffineWeight | None:
        """One weight of all parts' rows; None where their groups differ."""
        first = parts[0]
        for other in parts[1:]:
            if (other.group_size, other.bits) != (first.group_size, first.bits):
                return None
            if not torch.equal(other.group_of_input(), first.group_of_input()):
                return None
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.zeros.expand(part.scales.shape) for part in parts]),
            torch.cat([part.scales for part in parts]),
            first.group_size,
            first.bits,
            first.groups,
        )


@dataclass(frozen=True, slots=True)
class OffsetWeight(CodesInGroups):
    """W[n, k] = codes[n, k] * scales[n, k // group_size] + offsets[n, k // group_size]."""

    codes: torch.Tensor  # uint8 [N, K]
    scales: torch.Tensor  # float32 [N, K / group_size]
    offsets: torch.Tensor  # float32, shaped like scales
    group_size: int
    bits: int

    def dequantize(self) -> torch.Tensor:
        groups = self.codes.float().unflatten(1, (-1, self.group_size))
        return groups.mul_(self.scales[:, :, None]).add_(self.offsets[:, :, None]).flatten(1)

    def rows(self, start: int, stop: int) -> OffsetWeight:
        taken = slice(start, stop)
        return replace(self, codes=self.codes[taken], scales=self.scales[taken], offsets=self.offsets[taken])

    @classmethod
    def stack(cls, parts: Sequence[OffsetWeight]) -> OffsetWeight | None:
        """One weight of all parts' rows; None where their groups or widths differ."""
        first = parts[0]
        if any((part.group_size, part.bits) != (first.group_size, first.bits) for part in parts):
            return None
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat([part.offsets for part in parts]),
            first.group_size,
            first.bits,
        )


@dataclass(frozen=True, slots=True)
class ScaledWeight(QuantizedWeight):
    """W[n, k] = values[n, k] * scales[n // block_n, k // block_k]; values are float8 or int8."""

    values: torch.Tensor  # float8_e4m3fn or int8 [N, K]
    scales: torch.Tensor  # float32 [ceil(N / block_n), ceil(K / block_k)]
    block_n: int
    block_k: int

    @property
    def num_outputs(self) -> int:
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def num_inputs(self) -> int:
        return self.values.shape[1]

    @property
    def is_per_output(self) -> bool:
        """Whether a row has one scale, which may multiply the product instead of the weight."""
        return self.scales.shape[1] == 1 and self.block_k >= self.num_inputs

    def scales_by_output(self) -> torch.Tensor:
        """float32 [N, ceil(K / block_k)]: every row's own scales."""
        return self.scales.repeat_interleave(self.block_n, 0)[: self.num_outputs]

    def dequantize(self) -> torch.Tensor:
        scales = self.scales_by_output().repeat_interleave(self.block_k, 1)[:, : self.num_inputs]
        return self.values.float() * scales

    def rows(self, start: int, stop: int) -> ScaledWeight:
        if start % self.block_n:
            # A block of another size than a power of 2 is cut.
            return replace(self, values=self.values[start:stop], scales=self.scales_by_output()[start:stop], block_n=1)
        scales = self.scales[start // self.block_n : -(-stop // self.block_n)]
        return replace(self, values=self.values[start:stop], scales=scales)

    @classmethod
    def stack(cls, parts: Sequence[ScaledWeight]) -> ScaledWeight:
        """One weight of all parts' rows, each with its own scales.

        Blocks that a part ends in the middle of cannot be counted on from there: then every row gets its scales.
        """
        first = parts[0]
        values = torch.cat([part.values for part in parts])
        if all(part.num_outputs % part.block_n == 0 and part.block_n == first.block_n for part in parts):
            return cls(values, torch.cat([part.scales for part in parts]), first.block_n, first.block_k)
        return cls(values, torch.cat([part.scales_by_output() for part in parts]), 1, first.block_k)


@dataclass(frozen=True, slots=True)
class Float4Weight(QuantizedWeight):
    """W[n, k] = e2m1(codes[n, k]) * scales[n, k // group_size] / row_divisors[n]."""

    packed: torch.Tensor  # uint8 [N, K / 2], low nibble first
    scales: torch.Tensor  # float8_e4m3fn (groups of 16) or uint8 exponents e8m0 (groups of 32), [N, K / group_size]
    row_divisors: torch.Tensor  # float32 [N]
    group_size: int

    @property
    def num_outputs(self) -> int:
        return self.packed.shape[0]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def num_inputs(self) -> int:
        return self.packed.shape[1] * 2

    def group_scales(self) -> torch.Tensor:
        """float32 [N, K / group_size]."""
        if self.scales.dtype == torch.uint8:
            scales = torch.ldexp(torch.ones(self.scales.shape, device=self.device), self.scales.int() - 127)
        else:
            scales = self.scales.float()
        return scales / self.row_divisors[:, None]

    def dequantize(self) -> torch.Tensor:
        codes = torch.stack((self.packed & 15, self.packed >> 4), dim=-1).flatten(1)  # [N, K]
        values = torch.tensor(E2M1_VALUES, device=codes.device)[codes.int()]
        return (values.unflatten(1, (-1, self.group_size)) * self.group_scales()[:, :, None]).flatten(1)

    def rows(self, start: int, stop: int) -> Float4Weight:
        return replace(
            self,
            packed=self.packed[start:stop],
            scales=self.scales[start:stop],
            row_divisors=self.row_divisors[start:stop],
        )

    @classmethod
    def stack(cls, parts: Sequence[Float4Weight]) -> Float4Weight:
        return cls(
            torch.cat([part.packed for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat([part.row_divisors for part in parts]),
            parts[0].group_size,
        )


@dataclass(frozen=True, slots=True)
class GgufWeight(QuantizedWeight):
    """Rows of GGUF blocks."""

    blocks: torch.Tensor  # uint8 [N, row_bytes]
    ggml_type: GgmlType

    @property
    def num_outputs(self) -> int:
        return self.blocks.shape[0]

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    @property
    def num_inputs(self) -> int:
        return self.blocks.shape[1] // self.ggml_type.block_bytes * self.ggml_type.block_elements

    def dequantize(self) -> torch.Tensor:
        return decode_rows(self.blocks, self.ggml_type)

    def rows(self, start: int, stop: int) -> GgufWeight:
        return replace(self, blocks=self.blocks[start:stop])

    @classmethod
    def stack(cls, parts: Sequence[GgufWeight]) -> GgufWeight | None:
        """None where the parts are of different types."""
        if any(part.ggml_type is not parts[0].ggml_type for part in parts):
            return None
        return cls(torch.cat([part.blocks for part in parts]), parts[0].ggml_type)


def stack(parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """One weight of all parts' rows; None where they cannot share one."""
    if len(parts) == 1:
        return parts[0]
    kind = type(parts[0])
    if any(type(part) is not kind for part in parts):
        return None
    stacked: QuantizedWeight | None = kind.stack(parts)  # type: ignore[attr-defined]
    return stacked


def dequantized(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """W [N, K] in `dtype`, some rows at a time: float32 of the whole would be the peak of loading."""
    dense = torch.empty(weight.num_outputs, weight.num_inputs, dtype=dtype, device=weight.device)
    for start in range(0, weight.num_outputs, ROW_STEP):
        stop = min(start + ROW_STEP, weight.num_outputs)
        dense[start:stop] = weight.rows(start, stop).dequantize()
    return dense
