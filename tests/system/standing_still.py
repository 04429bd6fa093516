"""Processes that stand still for a while: whatever waits for them goes on waiting, however quick the machine is."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def standing_still(processes: Sequence[subprocess.Popen[Any]]) -> Iterator[None]:
    """In the block. A worker that stands still for ten seconds counts as lost; what it was at goes on all the same."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
