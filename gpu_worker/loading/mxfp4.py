"""MXFP4 (Open Compute Project, Microscaling Formats 1.0): 4-bit floats, 32 of them under one power of two."""

from __future__ import annotations

import torch

# The 4-bit codes' values: e2m1, bit 3 is the sign.
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def decode_mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [..., num_blocks, 16], low nibble first, to float32 [..., num_blocks * 32] without their scales."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-3)  # [..., num_blocks * 32]
    return _E2M1[codes.int()]
