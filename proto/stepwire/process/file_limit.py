"""Every connection is a file descriptor, and the usual soft limit of a process is 1024 of them."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import time
from typing import NoReturn

import structlog

log = structlog.get_logger(__name__)

REMEDY = "raise the hard limit (ulimit -Hn, LimitNOFILE= of systemd, ulimits of Docker), or have fewer connections"
# What goes on for long is said so often and no more.
_REPEAT_S = 60.0
_PROBE_S = 1.0

_told_s = -_REPEAT_S


def raise_file_limit(num_needed: int = 0) -> None:
    """To the hard limit, which is what this machine's owner has set. Warns where that is less than `num_needed`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < num_needed:
        log.warning("few file descriptors, and each connection is one", limit=hard, wanted=num_needed, remedy=REMEDY)


def file_limit() -> int | None:
    """How many descriptors this process may have open; None: any number."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def is_out_of_files(error: OSError) -> bool:
    """Whether this is what a system call says that found no descriptor left."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def tell_out_of_files() -> None:
    """One line, not more than one a minute. Any thread."""
    global _told_s
    now = time.monotonic()
    if now - _told_s >= _REPEAT_S:
        _told_s = now
        log.error("no file descriptor is left: new connections are refused", limit=file_limit(), remedy=REMEDY)


async def watch_file_limit() -> NoReturn:
    """For servers that say nothing when they cannot accept a connection: look whether they could."""
    with open(os.devnull, "rb") as any_file:
        while True:
            try:
                os.close(os.dup(any_file.fileno()))
            except OSError as error:
                if not is_out_of_files(error):
                    raise
                tell_out_of_files()
            await asyncio.sleep(_PROBE_S)
