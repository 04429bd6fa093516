"""Compiles the kernels for this machine's CPU, once: numba keeps the machine code on disk.

numba looks only at the file of a compiled function to see whether its code is still true, so the directory is named
after all files that kernels are made of. Where nothing can be written, kernels are compiled at every start.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from gpu_worker.cpu.kernels import EntryPoints

log = structlog.get_logger(__name__)

# Beyond this a start has compiled, and says so.
_NOTABLE_S = 3.0

# Stands beside the machine code once all of it has been written.
_COMPLETE = "complete"

_loaded: CompiledKernels | None = None


@dataclass(frozen=True, slots=True)
class CompiledKernels:
    entry_points: EntryPoints
    items: list[Any]
    """C functions, in the order of `layout.KIND`; they live as long as this list."""


def is_numba_installed() -> bool:
    """Without importing it."""
    return find_spec("numba") is not None and find_spec("llvmlite") is not None


def default_cache_dir() -> Path | None:
    """None: this user has no home."""
    try:
        return Path.home() / ".cache" / "stepwire" / "kernels"
    except RuntimeError:
        return None


def are_kept(cache_dir: Path | None = None) -> bool:
    """Whether `load_kernels` will find them compiled, as far as can be told without importing numba."""
    if not is_numba_installed():
        return False
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir
    directory = None if cache_dir is None else cache_dir / _digest(importlib.metadata.version("numba"))
    return directory is not None and (directory / _COMPLETE).exists()


def load_kernels(cache_dir: Path | None = None) -> CompiledKernels:
    """From the directory, or compiled (about 20 s) and kept there; a process has them once.

    Raises:
        ImportError: numba is not installed, or does not run on this machine.
    """
    global _loaded
    if _loaded is None:
        _loaded = _load(default_cache_dir() if cache_dir is None else cache_dir)
    return _loaded


def _load(cache_dir: Path | None) -> CompiledKernels:
    begun = time.perf_counter()
    import numba

    directory = None if cache_dir is None else cache_dir / _digest(numba.__version__)
    if directory is None or not _is_writable(directory):
        log.warning("compiled kernels cannot be kept: they are compiled at every start", directory=str(directory))
        loaded = _compile(keep=False)
    else:
        if not (directory / _COMPLETE).exists():
            log.info("compiling kernels for this CPU; the next start finds them", directory=str(directory))
        # Where numba keeps what is marked with cache=True from here on.
        numba.config.CACHE_DIR = str(directory)
        loaded = _compile(keep=True)
        _mark_complete(directory)
    seconds = time.perf_counter() - begun
    (log.info if seconds > _NOTABLE_S else log.debug)("kernels are ready", seconds=round(seconds, 1))
    return loaded


def _compile(keep: bool) -> CompiledKernels:
    from gpu_worker.cpu import items, kernels

    try:
        return CompiledKernels(kernels.compile_entry_points(keep=keep), items.compile_items(keep=keep))
    except Exception as error:
        # Files that are cut off or not numba's, a disk that is full: whatever it is, it is only a copy.
        if not keep:
            raise
        log.warning("kept kernels cannot be read or written: they are compiled anew", error=repr(error))
        return _compile(keep=False)


def _mark_complete(directory: Path) -> None:
    with contextlib.suppress(OSError):  # a disk that is full: it is only a mark
        (directory / _COMPLETE).touch()


def _digest(version: str) -> str:
    digest = hashlib.sha256(version.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True
