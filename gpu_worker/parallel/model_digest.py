"""A short name for a model's files: whether two nodes have the same, without reading weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

# What safetensors and GGUF files have at their beginning: names, shapes, element types.
_HEADER_BYTES = 1 << 20


def model_digest(directory: Path) -> str:
    """Over config.json and the size and beginning of every weight file; 16 hex digits."""
    digest = hashlib.sha256()
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors")), *sorted(directory.glob("*.gguf"))]
    for file in files:
        if not file.is_file():
            continue
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_HEADER_BYTES))
    return digest.hexdigest()[:16]
