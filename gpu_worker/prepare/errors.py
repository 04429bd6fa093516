"""The error that `prepare` raises on purpose, and what errors of the operating system mean to a person."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class PrepareError(Exception):
    """A source that cannot be prepared; the message is one line that says what to do."""


@contextmanager
def explained_os_errors(directory: Path, num_bytes_needed: int = 0) -> Iterator[None]:
    """Turns failures to write below `directory` into one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise PrepareError(_explain(error, directory, num_bytes_needed)) from error


def _explain(error: OSError, directory: Path, num_bytes_needed: int) -> str:
    where = error.filename or directory
    need = f"; {format_size(num_bytes_needed)} are needed" if num_bytes_needed else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{where}: {error.strerror}{need}: make room, or name another directory with --cache-dir"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where} cannot be written ({error.strerror}): name a writable directory with --cache-dir"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{where} cannot be made ({error.strerror}): name another directory with --cache-dir"
    return f"{where}: {error.strerror or error}"


def format_size(num_bytes: int) -> str:
    """Bytes with the unit a person would choose: 269 MB, 2.7 GB."""
    if num_bytes < 1_000_000:
        return f"{num_bytes / 1000:.0f} kB"
    if num_bytes < 1_000_000_000:
        return f"{num_bytes / 1_000_000:.0f} MB"
    return f"{num_bytes / 1_000_000_000:.1f} GB"
