"""What converted weights are written as, by name: known without torch."""

from __future__ import annotations

OUTPUT_DTYPES = ("bfloat16", "float32")
PACKED = "packed"
"""In place of a dtype: the file's own blocks stay, for workers that multiply by packed weights."""
