"""Under which name a model is served if nobody chose one."""

from __future__ import annotations

import json
from pathlib import Path

# What `prepare` leaves in a directory that it has made: from which files.
_STAMP_NAME = "stepwire_prepare.json"


def name_of_directory(directory: Path) -> str:
    """A prepared directory's is that of what it was made from: a GGUF file, or another directory."""
    directory = directory.resolve()
    try:
        source = Path(json.loads((directory / _STAMP_NAME).read_bytes())["sources"][0]["path"])
    except (OSError, ValueError, LookupError, TypeError):
        return directory.name
    return (source.stem if source.suffix == ".gguf" else source.parent.name) or directory.name
