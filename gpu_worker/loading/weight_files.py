"""The names of files that hold a model's weights in GGUF."""

from __future__ import annotations

import re
from pathlib import Path

GGUF_NAME = "model.gguf"
"""A model directory may hold its weights as one GGUF file of this name, or as `model-00001-of-0000N.gguf` and so on."""
_FIRST_PART = "model-00001-of-*.gguf"
PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def gguf_in(directory: Path) -> Path | None:
    """The GGUF file that a prepared model directory holds its weights in, or the first of several."""
    if (directory / GGUF_NAME).is_file():
        return directory / GGUF_NAME
    return next(iter(sorted(directory.glob(_FIRST_PART))), None)


def parts_by_name(path: Path) -> list[Path]:
    """The files of a model by the name of one of them; where it has none of a part, that file alone."""
    match = PART_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['stem']}-{one:05d}-of-{count:05d}.gguf") for one in range(1, count + 1)]
