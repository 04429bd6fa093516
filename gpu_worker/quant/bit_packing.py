"""Unsigned integers of a few bits out of the 32-bit words that checkpoints pack them into.

Words are little end first: value i of a word holds bits `i * bits` and up. Where a width does not divide 32, values run
on over word boundaries, 32 of them in `bits` words; old releases of compressed-tensors left the rest of a word empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_worker.parallel.shares import Share


@dataclass(frozen=True, slots=True)
class Packing:
    """How values lie in words along one dimension."""

    bits: int
    runs_on: bool = True
    """Whether values cross word boundaries where `bits` does not divide 32."""

    @property
    def _unit(self) -> tuple[int, int]:
        """Values and words of the smallest run that begins at a word."""
        if 32 % self.bits == 0 or not self.runs_on:
            return 32 // self.bits, 1
        return 32, self.bits

    def num_words(self, num_values: int) -> int:
        values, words = self._unit
        if words == 1:
            return -(-num_values // values)
        return -(-num_values * self.bits // 32)

    def words(self, share: Share) -> slice:
        """The words that a share of the values touches."""
        values, words = self._unit
        stop = min(-(-share.stop // values) * words, self.num_words(share.total))
        return slice(share.start // values * words, stop)

    def unpack(self, words: torch.Tensor, share: Share) -> torch.Tensor:
        """words int32 [..., n], as `words(share)` cuts them -> uint8 [..., share.size]."""
        values, num_words = self._unit
        unpacked = _unpack(words, self.bits) if num_words == 1 else _unpack_across_words(words, self.bits)
        first = share.start % values
        return unpacked[..., first : first + share.size]


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    if 8 % bits == 0:  # byte by byte: as words, every value would take four bytes on the way
        stored = words.contiguous().view(torch.uint8)  # [..., 4 n], low byte first
        fields = [(stored >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return torch.stack(fields, dim=-1).flatten(-2)
    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32, device=words.device)
    values = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)  # [..., n, values a word]
    return values.to(torch.uint8).flatten(-2)


def _unpack_across_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    padding = -words.shape[-1] % bits
    runs = torch.nn.functional.pad(words, (0, padding)).unflatten(-1, (-1, bits)).long() & 0xFFFFFFFF
    begin = torch.arange(32, device=words.device) * bits
    first, shift = begin // 32, begin % 32
    following = (first + 1).clamp(max=bits - 1)
    # 64-bit windows: the word that a value begins in, and the next one above it.
    window = runs[..., first] | (runs[..., following] << 32)
    return ((window >> shift) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)
