"""One worker group: its scheduler, its step stream, and the steps in flight between the two.

Everything runs on one event loop and nothing here blocks. The order within a turn is chosen for the worker: when a
result comes, the next step is planned and sent first, and only then, in the next turn, are the outputs handed on.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import structlog
from stepwire.v1 import worker_pb2

from control_plane.core.admission import AdmissionLimits
from control_plane.core.engine_config import EngineConfig
from control_plane.core.metrics import GroupMetrics
from control_plane.core.scheduler import Scheduler
from control_plane.core.step_codec import decode_result, encode_mask, encode_step
from control_plane.core.step_deadline import StepDeadline
from control_plane.core.step_feed import StepFeed
from control_plane.core.step_plan import ProtocolError, StepEvents, StepPlan
from control_plane.core.token_masks import FilledMasks, MaskFiller
from control_plane.core.worker_link import WorkerAddress, WorkerLink, WorkerRefused, WorkerUnavailable, WorkerUnusable

log = structlog.get_logger(__name__)

# Steps this short are over before the way of a result to here and of the next step back: two in flight would leave the
# worker waiting for them, so that there is a third.
SHORT_STEP_NS = 1_500_000
_CONNECT_TIMEOUT_S = 5.0
_RECONNECT_PAUSE_S = 0.1
# A worker that does not fit will not fit in the next moment either.
_REFUSED_PAUSE_S = 1.0
_WATCHDOG_PERIOD_S = 0.25
# How long a worker that has left may be away, and its successor load, before that is worth a warning.
_RETURN_S = 60.0


class GroupHost(Protocol):
    """What a group asks of the engine that owns it. Called on the event loop."""

    def adopt(self, group: WorkerGroup, worker: worker_pb2.DescribeResponse) -> None:
        """Take up a worker's facts: sees to it that `group.scheduler` and `group.limits` fit them.

        Raises `WorkerUnavailable` if the worker cannot be used."""
        ...

    def on_connected(self, group: WorkerGroup) -> None: ...

    def on_leaving(self, group: WorkerGroup) -> None:
        """The worker finishes the steps that it has and gets no more."""
        ...

    def on_gone(self, group: WorkerGroup, events: StepEvents) -> None:
        """The worker is lost or has left; `events` are the ends that its loss has brought."""
        ...

    def publish(self, events: StepEvents) -> None: ...

    def on_masks(self, filled: FilledMasks) -> None:
        """Grammars that are over, or gave up; their sequences may be another group's by now."""
        ...


@dataclass(slots=True)
class _StepInFlight:
    plan: StepPlan
    sent_s: float
    is_masked: bool = False  # its mask was sent or is being made


class WorkerGroup:
    """Keeps a session with one worker and fills its window of steps; `host` owns requests and decides where they go."""

    def __init__(
        self,
        number: int,
        address: WorkerAddress,
        config: EngineConfig,
        host: GroupHost,
        metrics: GroupMetrics,
        masks: MaskFiller,
        steps: StepFeed,
    ) -> None:
        self.number = number  # never given to another group while the process lives
        self.address = address
        self.scheduler: Scheduler | None = None
        self.limits: AdmissionLimits | None = None
        # What the worker in use, or the last one, says of itself.
        self.worker: worker_pb2.DescribeResponse | None = None
        # An operator wants it to get nothing new.
        self.is_put_aside = False
        # Why there is no worker; empty while there is one, or before the first attempt.
        self.trouble = ""
        # Set once it is known whether the worker fits: it is connected, it was refused, or it says that it is no use.
        self.settled = asyncio.Event()
        self.metrics = metrics
        self._config = config
        self._host = host
        self._masks = masks
        self._steps = steps
        self._link: WorkerLink | None = None
        self._in_flight: deque[_StepInFlight] = deque()
        self._unpublished: deque[StepEvents] = deque()
        self._buckets: list[int] = []
        self._deadline = StepDeadline(config.step_timeout_s)
        self._last_step_ns = SHORT_STEP_NS
        self._pump_scheduled = False
        self._is_connected = False
        # Until when a worker that has said that it leaves answers steps, by time.monotonic.
        self._leaves_at_s: float | None = None
        # Until when nobody is told that the worker is away: it has left, and another one is expected in its place.
        self._expected_until_s = 0.0
        self._told_trouble = ""
        self._session_is_over = asyncio.Event()
        self._log = log.bind(group=number)

    @property
    def is_connected(self) -> bool:
        return self._is_connected

    @property
    def is_draining(self) -> bool:
        """It gets nothing new: an operator wants that, or its worker leaves."""
        return self.is_put_aside or self._leaves_at_s is not None

    @property
    def takes_requests(self) -> bool:
        return self._is_connected and not self.is_draining

    @property
    def num_requests(self) -> int:
        return self.scheduler.num_requests if self.scheduler is not None else 0

    # ---- life ----

    async def run(self) -> None:
        """Connect, work, and on loss connect again, until cancelled."""
        watchdog = asyncio.create_task(self._watch())
        link: WorkerLink | None = None
        try:
            while True:
                link = WorkerLink(self.address, self._on_result, self._on_leaving, self._on_lost)
                try:
                    worker = await link.connect(_CONNECT_TIMEOUT_S)
                    self._host.adopt(self, worker)
                except WorkerUnavailable as error:
                    await link.close()
                    await self._complain(error)
                    continue
                self._begin(link, worker)
                await self._session_is_over.wait()
                await link.close()
        finally:
            watchdog.cancel()
            if link is not None:
                await link.close()

    async def _complain(self, error: WorkerUnavailable) -> None:
        is_unusable = isinstance(error, WorkerUnusable)
        self.trouble = str(error)
        if self.trouble != self._told_trouble and (is_unusable or time.monotonic() > self._expected_until_s):
            self._told_trouble = self.trouble
            what = "worker not available, trying again"
            if is_unusable:
                what = "worker refused" if isinstance(error, WorkerRefused) else "worker cannot be used"
            self._log.warning(what, worker=self.address.target, reason=self.trouble)
        if is_unusable:
            self.settled.set()
        await asyncio.sleep(_REFUSED_PAUSE_S if is_unusable else _RECONNECT_PAUSE_S)

    def _begin(self, link: WorkerLink, worker: worker_pb2.DescribeResponse) -> None:
        self._link, self.worker, self.trouble = link, worker, ""
        self._told_trouble, self._expected_until_s = "", 0.0
        self._buckets = list(worker.buckets)
        self._session_is_over.clear()
        self._is_connected = True
        self.settled.set()
        self.metrics.connections.inc()
        self._log.info(
            "worker connected", model=worker.model, devices=list(worker.devices), num_blocks=worker.num_blocks
        )
        self._host.on_connected(self)
        self.schedule_pump()

    def leave(self) -> None:
        """Give the worker up without blaming anybody: every sequence waits again, for another group to take."""
        self._publish()
        self._end_session()
        if self.scheduler is not None:
            self.scheduler.vacate()

    def _end_session(self) -> None:
        self._is_connected = False
        self._link = None
        self._leaves_at_s = None
        self._session_is_over.set()
        self._in_flight.clear()
        self._deadline.forget()

    def _on_leaving(self, leaving: worker_pb2.SessionLeaving) -> None:
        """The worker has been told to end: the steps that it has are its last ones."""
        if self._link is None or self._leaves_at_s is not None:
            return
        serves_for_s = leaving.serves_for_ns * 1e-9
        self._leaves_at_s = time.monotonic() + serves_for_s
        self._log.info(
            "worker leaves", reason=leaving.reason, num_requests=self.num_requests, serves_for_s=round(serves_for_s, 2)
        )
        self._host.on_leaving(self)
        self._leave_if_answered()

    def _leave_if_answered(self) -> None:
        if self._leaves_at_s is not None and not self._in_flight:
            self._let_worker_go()

    def _let_worker_go(self) -> None:
        """It has said so before: whatever its last steps came to, nobody has cost it its life."""
        self.metrics.departures.inc()
        self.trouble = "the worker has left"
        self._expected_until_s = time.monotonic() + _RETURN_S
        self.leave()
        self._host.on_gone(self, StepEvents())

    def _on_lost(self, reason: str) -> None:
        """Every sequence waits to be recomputed, but for those that have cost too many workers."""
        if self._link is None:
            return  # left before
        if self._leaves_at_s is not None:
            self._log.debug("the worker ended before its last steps were answered", reason=reason)
            self._let_worker_go()
            return
        self._end_session()
        self.metrics.losses.inc()
        self.trouble = reason
        self._log.error("worker lost", reason=reason, num_requests=self.num_requests)
        events = self.scheduler.worker_lost() if self.scheduler is not None else StepEvents()
        self._publish()
        self._host.on_gone(self, events)

    # ---- the step loop ----

    def schedule_pump(self) -> None:
        """Plan in the next turn of the loop, so that arrivals of one turn share a step."""
        if not self._pump_scheduled:
            self._pump_scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Fill the window of steps in flight."""
        self._pump_scheduled = False
        if self.scheduler is None or self._link is None or self._leaves_at_s is not None:
            return
        while len(self._in_flight) < self._window(self.scheduler):
            now = time.monotonic()
            plan = self.scheduler.plan(now)
            if plan is None:
                break
            self._link.send(encode_step(plan, self._buckets))
            self._in_flight.append(_StepInFlight(plan, now))
            self.metrics.note_plan(plan, now)
        self._begin_mask()

    def _window(self, scheduler: Scheduler) -> int:
        """How many steps are to be in flight."""
        window = max(self._config.steps_in_flight, scheduler.config.wanted_in_flight)
        return window + 1 if window == 2 and self._last_step_ns < SHORT_STEP_NS else window

    def _begin_mask(self) -> None:
        """Make the mask of the oldest step in flight: every token before it is known."""
        if not self._in_flight or self.worker is None or self._link is None:
            return
        step, link, loop = self._in_flight[0], self._link, asyncio.get_running_loop()
        if step.is_masked or not step.plan.mask_rows:
            return
        step.is_masked = True

        def done(filled: Future[FilledMasks]) -> None:
            if not filled.cancelled():
                loop.call_soon_threadsafe(self._on_masks, link, filled.result())

        self._masks.begin(step.plan, self.worker.vocab_size, done)

    def _on_masks(self, link: WorkerLink, filled: FilledMasks) -> None:
        if link is self._link:
            link.send(encode_mask(filled.step_id, filled.rows, filled.bitmask))
        if filled.over or filled.failed:
            self._publish()  # their last tokens come before their ends
            self._host.on_masks(filled)
            self.schedule_pump()

    def _on_result(self, result: worker_pb2.StepResult) -> None:
        if not self._in_flight or self.scheduler is None or self._link is None:
            return
        step = self._in_flight.popleft()
        try:
            events = self.scheduler.apply(decode_result(result, step.plan))
        except ProtocolError as error:
            self._in_flight.appendleft(step)
            self._link.lose(f"the worker broke the step protocol: {error}")
            return
        self._begin_mask()
        now = time.monotonic()
        self._deadline.note(step.plan.num_tokens, now - step.sent_s)
        self._last_step_ns = result.timings.forward_ns + result.timings.sample_ns
        self._pump()
        # In a turn of its own, so that the link's writer has its own before: the worker waits for the step.
        self._unpublished.append(events)
        asyncio.get_running_loop().call_soon(self._publish)
        self.metrics.note_result(result.timings, now - step.sent_s)
        self._steps.note(step.plan, result.timings, now - step.sent_s, self.scheduler, self.number)
        self._leave_if_answered()

    def _publish(self) -> None:
        """Hand on what has come, in order."""
        if self.scheduler is not None:
            self.scheduler.share_computed()
        while self._unpublished:
            self._host.publish(self._unpublished.popleft())

    async def _watch(self) -> None:
        """A hung worker is a dead worker; and an idle moment is one to check the books in."""
        checked = True
        while True:
            await asyncio.sleep(_WATCHDOG_PERIOD_S)
            is_idle = not self.num_requests and not self._in_flight
            if is_idle and not checked:
                self._check_books()
            checked = is_idle
            if self._leaves_at_s is not None and time.monotonic() > self._leaves_at_s:
                self._let_worker_go()
            if self._in_flight and self._link is not None:
                step = self._in_flight[0]
                limit_s = self._deadline.limit_s(step.plan.num_tokens)
                waited_s = time.monotonic() - step.sent_s
                if waited_s > limit_s:
                    self._link.lose(
                        f"step {step.plan.step_id} of {step.plan.num_tokens} tokens gave no result "
                        f"in {waited_s:.1f} s (limit {limit_s:.1f} s)"
                    )

    def _check_books(self) -> None:
        try:
            if self.scheduler is not None:
                self.scheduler.check_integrity()
        except RuntimeError:
            # A defect of ours. Nothing runs now, so nobody is harmed by looking; going on blindly would be worse.
            self._log.exception("the books of rows and blocks disagree: starting a new session")
            if self._link is not None:
                self._link.lose("the control plane's books disagree")
