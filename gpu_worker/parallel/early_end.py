"""The end of a group that is not complete yet, where rank 0's main thread may be in a collective that waits for others.

There a signal is not heard: Python runs its handlers on the main thread, between two of its own instructions. So its
number is read on another thread (`signal.set_wakeup_fd`), which ends the process where the main thread does not.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from types import TracebackType

import structlog

from gpu_worker.parallel.group_runner import Followers
from gpu_worker.parallel.group_watch import GroupWatch

log = structlog.get_logger(__name__)

# What the main thread may take to end by itself, and what the others may.
_OWN_LIMIT_S = 2.0
_END_LIMIT_S = 1.0
# What the thread that ends this process may take for that.
_ENDING_LIMIT_S = 15.0


class EarlyEnd:
    """In the block a SIGTERM or SIGINT, here or at another node, ends this process, with exit code 0, and everything
    that it has started.

    `followers` may still grow.
    """

    def __init__(self, followers: Sequence[Followers], watch: GroupWatch) -> None:
        self._followers, self._watch = followers, watch
        self._is_over, self._is_ending = threading.Event(), threading.Event()

    def __enter__(self) -> EarlyEnd:
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._before = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._hear, name="early end", daemon=True).start()
        self._watch.on_early_leaving(self.end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        signal.set_wakeup_fd(self._before)
        self._writing.close()
        if self._is_ending.is_set():
            # What the main thread makes of ranks that are ended is no failure of theirs, nor an exit code.
            threading.Event().wait(_ENDING_LIMIT_S)

    def end(self, reason: str) -> None:
        """Now, on any thread."""
        self._is_ending.set()
        self._watch.stop()
        log.info("the group ends before it is complete", reason=reason)
        try:
            for each in self._followers:
                each.close(_END_LIMIT_S)
            sys.stderr.flush()
        finally:
            # Not through the interpreter's end: the main thread may wait for ranks that are gone.
            os._exit(0)

    def _hear(self) -> None:
        with self._reading:
            while numbers := self._reading.recv(64):
                if {signal.SIGTERM, signal.SIGINT} & set(numbers) and not self._is_over.wait(_OWN_LIMIT_S):
                    self.end("rank 0 is told to end")
