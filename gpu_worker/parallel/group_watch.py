"""What rank 0 knows of the others: who is ready, and who has failed first."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

import structlog
from stepwire.v1 import group_pb2, worker_pb2

from gpu_worker.config import PROGRAM
from gpu_worker.parallel.layout import GroupError, GroupLayout

log = structlog.get_logger(__name__)

# How long whoever really failed has to be noticed after another rank has felt it.
_CAUSE_GRACE_S = 1.5
# Of the group's timeout: what processes may take to start.
_START_PATIENCE = 8


class GroupWatch:
    """Collects the ranks' events; thread-safe.

    A failure while the group forms ends this process at once, with one line: the main thread may be waiting for ranks
    that will never come; `before_end` is told why. So does a node that is told to end, unless `on_early_leaving` says
    whom to tell. `watch` puts somebody else in charge.
    """

    def __init__(self, layout: GroupLayout, before_end: Callable[[str], None] | None = None) -> None:
        self._layout = layout
        self._others = range(1, layout.world_size)
        self._changed = threading.Condition()
        self._started: set[int] = set()
        self._ready: dict[int, group_pb2.RankReady] = {}
        self._described: dict[int, worker_pb2.StepResult] = {}
        self._cause: GroupError | None = None
        self._is_over = False
        self._before_end = before_end
        self._on_failure: Callable[[Exception], None] = self._end_process
        self._on_leaving: Callable[[str], None] = self.fail

    def on_event(self, event: group_pb2.RankEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "failure":
            self._note_failure(event.rank, event.failure)
        elif kind == "leaving":
            with self._changed:
                on_leaving = self._on_leaving
            on_leaving(f"{self._layout.describe_rank(event.rank)}: its node is told to end")
        else:
            with self._changed:
                if kind == "ready":
                    self._ready[event.rank] = event.ready
                elif kind == "described":
                    self._described[event.described.step_id] = event.described
                else:
                    self._started.add(event.rank)
                self._changed.notify_all()

    def _note_failure(self, rank: int, failure: group_pb2.RankFailure) -> None:
        message = f"{self._layout.describe_rank(rank)}: {failure.message}"
        if failure.is_consequence:
            timer = threading.Timer(_CAUSE_GRACE_S, self.fail, [message, failure.trace])
            timer.daemon = True
            timer.start()
        else:
            self.fail(message, failure.trace)

    def fail(self, message: str, trace: str = "") -> None:
        """The group is lost. Only the first reason counts; `trace`: where in its code the rank failed."""
        with self._changed:
            if self._cause is not None or self._is_over:
                return
            cause = GroupError(message)
            if trace:
                cause.add_note(trace)
            self._cause = cause
            self._changed.notify_all()
            on_failure = self._on_failure
            if on_failure == self._end_process:
                # With the lock held: the main thread, woken, would say the same once more.
                on_failure(cause)
                return
        on_failure(cause)

    def on_early_leaving(self, on_leaving: Callable[[str], None]) -> None:
        """Whom to tell of a node that is told to end while the group forms."""
        with self._changed:
            self._on_leaving = on_leaving

    def watch(self, on_failure: Callable[[Exception], None], on_leaving: Callable[[str], None]) -> None:
        """Whom to tell from here on."""
        with self._changed:
            self._on_failure, self._on_leaving = on_failure, on_leaving
            cause = self._cause
        if cause is not None:
            on_failure(cause)

    def stop(self) -> None:
        """What ranks say and do from here on is no failure."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def wait_started(self, timeout_s: float) -> None:
        """Block until every other rank's process runs. On a busy machine that may take long: after `timeout_s` the log
        says who is missing, and after several times as long the group is given up. Raises `GroupError`."""
        with self._changed:
            for num_waits in range(1, _START_PATIENCE + 1):
                if self._changed.wait_for(lambda: self._cause or len(self._started) == len(self._others), timeout_s):
                    break
                missing = " and ".join(
                    self._layout.describe_rank(rank) for rank in self._others if rank not in self._started
                )
                log.warning("a rank's process does not start", missing=missing, seconds=num_waits * timeout_s)
            else:
                raise GroupError(
                    f"{missing}: no process runs after {_START_PATIENCE * timeout_s:g} s: see what it waits for on its "
                    "node (the disk that python is read from?), or give it longer with --group-timeout-s"
                )
            if self._cause is not None:
                raise self._cause

    def wait_ready(self) -> dict[int, group_pb2.RankReady]:
        """Block until every other rank is ready; rank -> what it says of itself. Raises `GroupError`."""
        with self._changed:
            self._changed.wait_for(lambda: self._cause or len(self._ready) == len(self._others))
            if self._cause is not None:
                raise self._cause
            return dict(self._ready)

    def forget_described(self) -> None:
        """A new session: steps are numbered anew."""
        with self._changed:
            self._described.clear()

    def wait_described(self, step_id: int) -> worker_pb2.StepResult:
        """Block until the last stage has told of a step's prompts. Raises `GroupError`."""
        with self._changed:
            self._changed.wait_for(lambda: self._cause or self._is_over or step_id in self._described)
            if step_id in self._described:
                return self._described.pop(step_id)
            raise self._cause or GroupError("the group has ended")

    def explain(self, error: Exception) -> Exception:
        """The failure of another rank that `error` comes from; `error` itself if there is none."""
        with self._changed:
            self._changed.wait_for(lambda: self._cause is not None or self._is_over, _CAUSE_GRACE_S)
            return error if self._cause is None else self._cause

    def _end_process(self, error: Exception) -> None:
        """The siblings end with this process: their pipes close."""
        if getattr(error, "__notes__", None):
            log.error("a rank failed while the group formed", exc_info=error)
        print(f"{PROGRAM}: {error}", file=sys.stderr, flush=True)
        if self._before_end is not None:
            self._before_end(str(error))
        os._exit(1)
