"""Every connection is a file descriptor, and the usual soft limit of a process is 1024 of them."""

from __future__ import annotations

import resource


def raise_file_limit() -> None:
    """To the hard limit, which is what this machine's owner has set."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
