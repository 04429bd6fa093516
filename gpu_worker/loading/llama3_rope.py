"""The parameters of Llama 3's rope scaling, from the factors that a GGUF file has in their place."""

from __future__ import annotations

import math
from typing import Any

# Llama 3.1 and later; the file has only the resulting factor per frequency, so the parameters are tried and compared.
_LOW_FREQ_FACTOR = 1.0
_HIGH_FREQ_FACTOR = 4.0
_ORIGINAL_CONTEXT = 8192


def llama3_scaling(stored: list[float], theta: float) -> dict[str, Any] | None:
    """The `rope_scaling` whose divisors of the rope frequencies these are, None if there is none."""
    factor = round(max(stored), 4)
    expected = [_divisor(theta ** (-index / len(stored)), factor) for index in range(len(stored))]
    if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(stored, expected, strict=True)):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW_FREQ_FACTOR,
        "high_freq_factor": _HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _ORIGINAL_CONTEXT,
    }


def _divisor(frequency: float, factor: float) -> float:
    """By what Llama 3's scaling divides a rope frequency (Llama 3.1 model card; transformers' `rope_type: llama3`)."""
    wavelength = 2 * math.pi / frequency
    if wavelength < _ORIGINAL_CONTEXT / _HIGH_FREQ_FACTOR:
        return 1.0
    if wavelength > _ORIGINAL_CONTEXT / _LOW_FREQ_FACTOR:
        return factor
    span = _HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR
    smooth = (_ORIGINAL_CONTEXT / wavelength - _LOW_FREQ_FACTOR) / span
    return 1 / ((1 - smooth) / factor + smooth)
