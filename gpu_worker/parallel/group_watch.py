"""What rank 0 knows of the others: who is ready, and who has failed first."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

from stepwire.v1 import group_pb2

from gpu_worker.config import PROGRAM
from gpu_worker.parallel.layout import GroupError, GroupLayout

# How long whoever really failed has to be noticed after another rank has felt it.
_CAUSE_GRACE_S = 1.5


class GroupWatch:
    """Collects the ranks' events; thread-safe.

    A failure while the group forms ends this process at once, with one line: the main thread may be waiting for ranks
    that will never come. `watch` puts somebody else in charge.
    """

    def __init__(self, layout: GroupLayout) -> None:
        self._layout = layout
        self._changed = threading.Condition()
        self._started: set[int] = set()
        self._ready: dict[int, group_pb2.RankReady] = {}
        self._cause: str | None = None
        self._is_over = False
        self._on_failure: Callable[[str], None] = _end_process

    def on_event(self, event: group_pb2.RankEvent) -> None:
        kind = event.WhichOneof("event")
        if kind != "failure":
            with self._changed:
                if kind == "ready":
                    self._ready[event.rank] = event.ready
                else:
                    self._started.add(event.rank)
                self._changed.notify_all()
            return
        message = f"{self._layout.describe_rank(event.rank)}: {event.failure.message}"
        if event.failure.is_consequence:
            timer = threading.Timer(_CAUSE_GRACE_S, self.fail, [message])
            timer.daemon = True
            timer.start()
        else:
            self.fail(message)

    def fail(self, message: str) -> None:
        """The group is lost. Only the first reason counts."""
        with self._changed:
            if self._cause is not None or self._is_over:
                return
            self._cause = message
            self._changed.notify_all()
            on_failure = self._on_failure
            if on_failure is _end_process:
                # With the lock held: the main thread, woken, would say the same once more.
                on_failure(message)
                return
        on_failure(message)

    def watch(self, on_failure: Callable[[str], None]) -> None:
        """Whom to tell from here on."""
        with self._changed:
            self._on_failure = on_failure
            cause = self._cause
        if cause is not None:
            on_failure(cause)

    def stop(self) -> None:
        """What ranks say and do from here on is no failure."""
        with self._changed:
            self._is_over = True

    def wait_started(self) -> None:
        """Block until every other rank's process runs: how long that takes says nothing. Raises `GroupError`."""
        with self._changed:
            self._changed.wait_for(lambda: self._cause or len(self._started) == self._layout.world_size - 1)
            if self._cause is not None:
                raise GroupError(self._cause)

    def wait_ready(self) -> dict[int, group_pb2.RankReady]:
        """Block until every other rank is ready; rank -> what it says of itself. Raises `GroupError`."""
        with self._changed:
            self._changed.wait_for(lambda: self._cause or len(self._ready) == self._layout.world_size - 1)
            if self._cause is not None:
                raise GroupError(self._cause)
            return dict(self._ready)

    def explain(self, error: Exception) -> Exception:
        """The failure of another rank that `error` comes from; `error` itself if there is none."""
        with self._changed:
            self._changed.wait_for(lambda: self._cause is not None, _CAUSE_GRACE_S)
            return error if self._cause is None else GroupError(self._cause)


def _end_process(message: str) -> None:
    """The siblings end with this process: their pipes close."""
    print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)
    os._exit(1)
