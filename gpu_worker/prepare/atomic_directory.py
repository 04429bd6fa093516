"""A directory that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpu_worker.prepare.errors import PrepareError
from gpu_worker.prepare.stamp import has_stamp


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Holds the right to make `target`; another process that wants it waits. Freed by the system if this one dies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fill_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Calls `fill` with a new directory beside `target` and renames it to `target` when it returns.

    Only to be called under `exclusive(target)`: what an interrupted run left behind is removed first. A `target` that
    is there already is replaced if it was prepared before, and left alone otherwise.

    Raises:
        PrepareError: `target` holds something that was not prepared.
    """
    if target.exists() and not has_stamp(target) and (not target.is_dir() or any(target.iterdir())):
        raise PrepareError(f"{target} exists and was not made by prepare: name a new or an empty directory with --out")
    prefix = f".{target.name}.partial-"
    for remains in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(remains)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    partial.chmod(0o755)
    try:
        fill(partial)
        replaced = Path(f"{partial}-replaced")
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        _sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(directory: Path) -> None:
    """The rename itself must reach the disk too."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
