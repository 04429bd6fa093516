"""Remembers from what a directory was prepared, so that a second run need not do it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_worker.loading.weight_files import parts_by_name

STAMP_NAME = "stepwire_prepare.json"

# Raised when the same source would be turned into something else than before.
FORMAT_VERSION = 1

_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SourceFile:
    """What tells one state of a source file from another."""

    path: str
    num_bytes: int
    mtime_ns: int

    @staticmethod
    def of(path: Path) -> SourceFile:
        status = path.stat()
        return SourceFile(str(path.resolve()), status.st_size, status.st_mtime_ns)


def write_stamp(
    directory: Path, sources: list[Path], options: Mapping[str, str], outputs: list[str], hashes: Mapping[str, str]
) -> None:
    """`hashes`: sha256 of each source by its name, so that a copy with another time is known again."""
    content = {
        "format_version": FORMAT_VERSION,
        "options": dict(options),
        "sources": [asdict(SourceFile.of(path)) | {"sha256": hashes[path.name]} for path in sources],
        "outputs": {name: (directory / name).stat().st_size for name in outputs},
    }
    (directory / STAMP_NAME).write_text(json.dumps(content, indent=1) + "\n")


def has_stamp(directory: Path) -> bool:
    return (directory / STAMP_NAME).is_file()


def is_prepared(source: Path, target: Path, dtype: str) -> bool:
    """Whether `target` is what the GGUF file `source` becomes in `dtype`."""
    return is_current(target, parts_by_name(source), {"dtype": dtype})


def is_current(directory: Path, sources: list[Path], options: Mapping[str, str]) -> bool:
    """Whether `directory` was prepared from `sources` as they are now, with `options`, and is complete.

    A source whose time alone has changed (an installed package, a copy) is compared by its hash, and the stamp brought
    up to date so that this is done once.
    """
    try:
        content = json.loads((directory / STAMP_NAME).read_bytes())
        if content["format_version"] != FORMAT_VERSION or content["options"] != dict(options):
            return False
        if any((directory / name).stat().st_size != size for name, size in content["outputs"].items()):
            return False
        known = content["sources"]
        if len(known) != len(sources):
            return False
        changed = False
        for entry, path in zip(known, sources, strict=True):
            now = SourceFile.of(path)
            if entry["num_bytes"] != now.num_bytes:
                return False
            if entry["mtime_ns"] != now.mtime_ns or entry["path"] != now.path:
                if entry["sha256"] != sha256_of(path):
                    return False
                entry.update(asdict(now))
                changed = True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no stamp, or one that something else wrote: prepare anew
    if changed:
        _refresh(directory, content)
    return True


def _refresh(directory: Path, content: object) -> None:
    try:
        (directory / STAMP_NAME).write_text(json.dumps(content, indent=1) + "\n")
    except OSError:
        return  # a read-only directory is as good; the hash is computed again next time


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
